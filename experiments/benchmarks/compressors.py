"""What a compressor costs: encoding and decoding its own message, for one matrix.

In units of one memory copy of the matrix, and of one spectral LMO of it. All are timed in turns, so
that a busy machine slows them alike; the figure is the median of the ratios of the turns.

    python -m experiments.benchmarks.compressors
    python -m experiments.benchmarks.compressors --rows 512 --columns 512 --json compressors.json
"""

import dataclasses
import pathlib
import statistics
import time

import jax
import tqdm
import tyro

import ef21_jax as ef21
from experiments import records


COMPRESSORS = {
    "natural": ef21.Natural(),
    "top15": ef21.TopK(0.15),
    "top15_natural": ef21.TopK(0.15) >> ef21.Natural(),
    "rank15": ef21.RankK(0.15),
    "rank15_natural": ef21.RankK(0.15) >> ef21.Natural(),
    "rand15": ef21.RandK(0.15),
    "subspace15": ef21.RandomSubspace(0.15),
    "column15": ef21.ColumnTopK(0.15),
    "block": ef21.BlockTopK(),
    "block_4bit": ef21.BlockTopK() >> ef21.BlockNatural(),
    "block_2bit": ef21.BlockTopK() >> ef21.TwoLevel(),
    "natural_4bit": ef21.BlockNatural(),
    "quantize_8bit": ef21.Quantize(8),
    "quantize_4bit": ef21.Quantize(4),
    "sign": ef21.ScaledSign(),
}


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 768  # fan_in of the matrix
    columns: int = 3072  # fan_out
    turns: int = 9  # each of them times everything once
    json: pathlib.Path | None = None  # a file for the figures

    def __post_init__(self):
        for name in ("rows", "columns", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def main(args=None):
    config = tyro.cli(
        Config, args=args, prog="python -m experiments.benchmarks.compressors", description=__doc__
    )
    shape = (config.rows, config.columns)
    key = jax.random.key(0)
    x = jax.random.normal(key, shape)

    programs = {"copy": lambda x, key: x + 1, "lmo": lambda x, key: ef21.Spectral().lmo(x)}
    programs |= {name: round_trip(compressor) for name, compressor in COMPRESSORS.items()}
    compiled = {
        name: jax.jit(program).lower(x, key).compile()
        for name, program in tqdm.tqdm(programs.items(), "compiling", disable=None)
    }
    seconds = {name: [] for name in compiled}
    for _ in tqdm.trange(config.turns, desc="measuring", disable=None):
        for name, program in compiled.items():
            seconds[name].append(timed(program, x, key))

    figures = {}
    print(f"{'':16}{'bits':>8}{'copies':>10}{'LMOs':>10}   ({shape[0]} × {shape[1]}, float32)")
    for name, compressor in COMPRESSORS.items():
        message = jax.eval_shape(compressor.compress, x, key)
        bits = ef21.wire_bits(message) / x.size
        copies, lmos = (ratio(seconds[name], seconds[unit]) for unit in ("copy", "lmo"))
        print(f"{name:16}{bits:8.3f}{copies:10.1f}{lmos:10.3f}")
        figures |= {f"{name}_over_copy": copies, f"{name}_over_lmo": lmos}
    if config.json is not None:
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "json"}
        command = records.command_line("experiments.benchmarks.compressors", args)
        records.write_json(
            config.json, {"header": records.header(settings, command), "target": figures}
        )
    for name, value in figures.items():
        print(f"target {name} {value:.4f}")


def round_trip(compressor):
    """What a worker does: encode, and decode what it has sent."""

    def program(x, key):
        message = compressor.compress(x, key)
        return message, ef21.dense(message)

    return program


def timed(program, x, key):
    jax.block_until_ready(program(x, key))
    start = time.perf_counter()
    jax.block_until_ready(program(x, key))
    return time.perf_counter() - start


def ratio(mine, theirs):
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


if __name__ == "__main__":
    main()
