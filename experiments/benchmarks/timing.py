"""What the benchmarks share: programs timed in turns, ratios of turns, tables and records.

A busy machine slows whatever runs. Timed in turns all programs are slowed alike, so a figure is
the median of the ratios of the turns, and never the ratio of two runs.
"""

import dataclasses
import functools
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import tqdm
import tyro

from experiments import records


@dataclasses.dataclass(frozen=True)
class Config:
    """What every benchmark can be told."""

    turns: int = 9  # each of them times everything once
    clock: Literal["wall", "cpu"] = "wall"  # cpu: of this process, where others keep it waiting
    json: pathlib.Path | None = None  # a file for the figures

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1 and field.name != "seed":
                raise ValueError(f"`{field.name}` must be at least 1, got {value}.")
            if value == ():
                raise ValueError(f"`{field.name}` must name one at least, got none.")


def configure(config_class, module, doc, args=None):
    """The settings of the command line, after a line that says where this runs."""
    config = tyro.cli(config_class, args=args, prog=f"python -m {module}", description=doc)
    devices = sorted({device.device_kind for device in jax.devices()})
    print(f"{', '.join(devices)}, {os.cpu_count()} processor cores, jax {jax.__version__}")
    return config


def compiled(programs):
    """name -> (jitted function, arguments) compiled ahead: name -> the executable."""
    return {
        name: function.lower(*args).compile()
        for name, (function, args) in tqdm.tqdm(programs.items(), "compiling", disable=None)
    }


_AT_LEAST = 0.02  # seconds of one measurement; shorter calls are repeated


# The CPU's sums over threads: it does not see waiting, nor how well they share the work.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(calls: dict[str, Callable], config: Config) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn.

    Args:
      calls: functions of no argument. What they return is waited for, where JAX has promised it.
      config: how many turns, by which clock.
    """
    repeats = {}
    for name, call in tqdm.tqdm(calls.items(), "warming up", disable=None):
        _seconds(call, 1)
        repeats[name] = math.ceil(_AT_LEAST / _seconds(call, 1))
    seconds = {name: [] for name in calls}
    for _ in tqdm.trange(config.turns, desc="measuring", disable=None):
        for name, call in calls.items():
            if repeats[name] > 1:  # a short one would show what the one before left in the caches
                _seconds(call, 1)
            seconds[name].append(_seconds(call, repeats[name], config.clock))
    return seconds


def _seconds(call, repeats, clock="wall"):
    start = CLOCKS[clock]()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (CLOCKS[clock]() - start) / repeats


def ratio(mine: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the turns."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


@dataclasses.dataclass(frozen=True)
class MatmulPeak:
    """Square products to be timed in turns with the rest: the rate that a machine can reach.

    Attributes:
      calls: to be timed, by name.
      flops: of each, a multiplication and an addition counted as two.
    """

    calls: dict[str, Callable]
    flops: dict[str, int]

    @classmethod
    def of(cls, dtype, size=None):
        """In `dtype` and in float32, as fast as JAX does them when told nothing.

        Without a `size`, that is doubled until a product takes 50 ms.
        """
        calls, flops = {}, {}
        for name in sorted({str(dtype), "float32"}):
            n = size or 1024
            call = _product(n, name)
            while size is None and _seconds(call, 1) < 0.05:
                n *= 2
                call = _product(n, name)
            calls[f"matmul_{name}"] = call
            flops[f"matmul_{name}"] = 2 * n**3
        return cls(calls, flops)

    def rate(self, seconds):
        """Operations a second of the fastest turn."""
        return max(self.flops[name] / min(seconds[name]) for name in self.calls)


def _product(size, dtype):
    x = jnp.full((size, size), 0.5, dtype)
    call = functools.partial(jax.jit(jnp.matmul), x, x)
    jax.block_until_ready(call())  # compiles
    return call


def matmul_flops(function, *args) -> int:
    """Operations in the matrix products of a traced function, two for a multiply and add.

    Counted where they are written, so the compiler has no say in it. Those of a `while` of unknown
    length are counted once, and those of the dearest branch of a `cond`.
    """
    return _flops(jax.make_jaxpr(function)(*args))


def _flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        held = filter(_is_jaxpr, jax.tree.leaves(params, is_leaf=_is_jaxpr))
        inside = [_flops(jaxpr) for jaxpr in held]
        repeats = params["length"] if name == "scan" else 1
        total += repeats * (max(inside, default=0) if name == "cond" else sum(inside))
    return total


def _is_jaxpr(value):
    return hasattr(value, "eqns")


def table(head, rows):
    """Columns under a head, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest])

    return "\n".join(map(line, [head, *rows]))


def finish(config, module, args, figures, **more):
    """Writes the record, if one is wanted, and prints the figures as `target name value`."""
    if config.json is not None:
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "json"}
        header = records.header(settings, records.command_line(module, args))
        records.write_json(config.json, {"header": header, "target": figures, **more})
    for name, value in figures.items():
        print(f"target {name} {value:.4f}")
