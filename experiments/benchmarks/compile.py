"""What a compiled optimizer step of NanoGPT-124M costs before and beside its run.

Seconds until it can run (tracing and compiling, with nothing cached), the memory that it needs
beside its arguments, and how the program grows from the model's 12 layers to 24: in all
instructions of the compiled program, and in those that compute, not gather, stack or move. A
program that treats equal layers together has as many of the latter at 24 layers. Shapes suffice:
nothing is allocated or run.

    python -m experiments.benchmarks.compile
    python -m experiments.benchmarks.compile --methods uncompressed optax_muon --json compile.json
"""

import collections
import contextlib
import dataclasses
import re
import statistics
import time

import jax
import tqdm

from experiments.benchmarks import timing
from experiments.benchmarks.step import (
    METHODS,
    PRESETS,
    MethodName,
    ModelName,
    optimizer_step,
    parameter_shapes,
)


MODULE = "experiments.benchmarks.compile"
BASE = "uncompressed"  # whose figures have no prefix


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 3  # each of them compiles everything once
    methods: tuple[MethodName, ...] = tuple(METHODS)
    model: ModelName = "124m"  # whose shapes the step has

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError(f"`methods` must be among {list(METHODS)}, got none.")


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    model = PRESETS[config.model]
    deeper = dataclasses.replace(model, layers=2 * model.layers)
    measures = {name: [] for name in config.methods}
    grown = {}
    with (
        nothing_cached(),
        tqdm.tqdm(
            total=(config.turns + 1) * len(config.methods), desc="compiling", disable=None
        ) as bar,
    ):
        for _ in range(config.turns):
            for name in config.methods:
                measures[name].append(measure(METHODS[name], model))
                bar.update()
        for name in config.methods:
            grown[name] = measure(METHODS[name], deeper)
            bar.update()

    figures, rows = {}, []
    for name, turns in measures.items():
        last, deep = turns[-1], grown[name]
        tracing, compiling, total = (
            statistics.median(turn[part] for turn in turns)
            for part in ("tracing", "compiling", "total")
        )
        prefix = "" if name == BASE else f"{name}_"
        figures |= {
            f"{prefix}compile_seconds": total,
            f"{prefix}temporary_mb": last["temporary"] / 1e6,
            f"{prefix}instructions": last["instructions"],
            f"{prefix}computing": last["computing"],
            f"{prefix}computing_growth": deep["computing"] / last["computing"],
        }
        rows.append(
            (
                name,
                f"{tracing:.2f}",
                f"{compiling:.2f}",
                f"{total:.2f}",
                f"{last['temporary'] / 1e6:.0f}",
                *(f"{m[kind]}" for kind in ("instructions", "computing") for m in (last, deep)),
            )
        )
    layers = [
        f"{count} at {n}" for count in ("all", "computing") for n in (model.layers, deeper.layers)
    ]
    head = (f"{config.model}, seconds:", "tracing", "compiling", "total", "temporary MB", *layers)
    print(timing.table(head, rows))
    timing.finish(config, MODULE, args, figures, turns=measures, deeper=grown)


@contextlib.contextmanager
def nothing_cached():
    """Without JAX's cache on disk, if the environment has one."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def measure(tx, model):
    """Seconds, bytes and instructions of the step of one method."""
    params = parameter_shapes(model)
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    begin = time.perf_counter()
    step = jax.jit(optimizer_step(tx), donate_argnums=(1, 2))
    lowered = step.lower(params, params, state)
    traced = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()
    opcodes = count_opcodes(executable.as_text())
    return {
        "tracing": traced - begin,
        "compiling": end - traced,
        "total": end - begin,
        "temporary": executable.memory_analysis().temp_size_in_bytes,
        "instructions": sum(opcodes.values()),
        "computing": sum(n for opcode, n in opcodes.items() if opcode not in MOVES),
    }


# Instructions that name, take apart, join, copy or hold arrays, or call others that are counted.
MOVES = frozenset(
    "parameter constant tuple get-tuple-element bitcast bitcast-convert copy copy-start copy-done "
    "reshape transpose slice concatenate pad broadcast iota dynamic-slice dynamic-update-slice "
    "fusion call while conditional async-start async-done after-all".split()
)


def count_opcodes(text):
    """opcode -> how often it stands in the text of an HLO module, fused computations included."""
    return collections.Counter(
        re.findall(r"^\s+(?:ROOT )?%?\S+ = .*? ([a-z][a-z0-9-]*)\(", text, re.M)
    )


if __name__ == "__main__":
    main()
