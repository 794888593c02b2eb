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
PARTS = ("tracing", "compiling", "total")  # the seconds


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    turns: int = 3  # each of them compiles everything once
    methods: tuple[MethodName, ...] = tuple(METHODS)
    model: ModelName = "124m"  # whose shapes the step has
    deeper: bool = True  # also with twice the layers
    donate: bool = True  # parameters and state to the step, as training does


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    model = PRESETS[config.model]
    # The second is compiled once, for its size alone.
    models = [model, dataclasses.replace(model, layers=2 * model.layers)][: 1 + config.deeper]
    jobs = [(name, model) for _ in range(config.turns) for name in config.methods]
    jobs += [(name, deeper) for deeper in models[1:] for name in config.methods]
    measures = {(name, model): [] for name, model in jobs}
    with nothing_cached():
        for name, model in tqdm.tqdm(jobs, "compiling", disable=None):
            measures[name, model].append(measure(METHODS[name], model, config))
    report(config, args, models, measures)


def report(config, args, models, measures):
    figures, rows = {}, []
    for name in config.methods:
        turns, *deeper = (measures[name, model] for model in models)
        seconds = [statistics.median(turn[part] for turn in turns) for part in PARTS]
        last, *grown = [turns[-1], *(found[0] for found in deeper)]
        prefix = "" if name == BASE else f"{name}_"
        figures |= {
            f"{prefix}compile_seconds": seconds[-1],
            f"{prefix}temporary_mb": last["temporary"] / 1e6,
            f"{prefix}instructions": last["instructions"],
            f"{prefix}computing": last["computing"],
        }
        for found in grown:
            figures[f"{prefix}computing_growth"] = found["computing"] / last["computing"]
        sizes = [found[kind] for kind in ("instructions", "computing") for found in (last, *grown)]
        temporary = f"{last['temporary'] / 1e6:.0f}"
        rows.append((name, *(f"{s:.2f}" for s in seconds), temporary, *map(str, sizes)))
    counts = [f"{kind} at {model.layers}" for kind in ("all", "computing") for model in models]
    print(timing.table((f"{config.model}, seconds:", *PARTS, "temporary MB", *counts), rows))
    details = [
        {"method": name, "layers": model.layers, "turns": turns}
        for (name, model), turns in measures.items()
    ]
    timing.finish(config, MODULE, args, figures, measures=details)


@contextlib.contextmanager
def nothing_cached():
    """Without JAX's cache on disk, if the environment has one."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def measure(tx, model, config):
    """Seconds, bytes and instructions of the step of one method."""
    clock = timing.CLOCKS[config.clock]
    params = parameter_shapes(model)
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    begin = clock()
    step = jax.jit(optimizer_step(tx), donate_argnums=(1, 2) if config.donate else ())
    lowered = step.lower(params, params, state)
    traced = clock()
    executable = lowered.compile()
    end = clock()
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
