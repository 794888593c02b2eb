"""What a compressor costs: encoding and decoding its own message, for one matrix.

In units of one memory copy of the matrix, and of one spectral LMO of it. As in a training step,
calls take several matrices in turn, too many for the caches, and what is made takes the place of an
old one. Also `lax.top_k` of 5 %, over the cost of the same; and for each kind
of message the sum of eight over the decoding of one.

    python -m experiments.benchmarks.compressors
    python -m experiments.benchmarks.compressors --rows 512 --columns 512 --json compressors.json
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp

import ef21_jax as ef21
from experiments.benchmarks import timing


MODULE = "experiments.benchmarks.compressors"
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


# One of each way to add up messages: a scatter, a product, one after the other.
SUMMED = ("block_4bit", "rank15_natural", "natural_4bit")
MESSAGES = 8


@dataclasses.dataclass(frozen=True)
class Config(timing.Config):
    rows: int = 768  # fan_in of the matrix
    columns: int = 3072  # fan_out
    matrices: int = 8  # that are read in turn, and as many that are written


def main(args=None):
    config = timing.configure(Config, MODULE, __doc__, args)
    shape = (config.rows, config.columns)
    key = jax.random.key(0)
    x = jax.random.normal(key, shape)

    programs = {
        "copy": (lambda x: ((), x + 1), x),
        "lmo": (lambda x: ((), ef21.Spectral().lmo(x)), x),
        "top_k": (lambda x: (jax.lax.top_k(jnp.abs(x.ravel()), max(1, x.size // 20)), None), x),
    }
    programs |= {name: (round_trip(compressor, key), x) for name, compressor in COMPRESSORS.items()}
    for name in SUMMED:
        message = jax.jit(COMPRESSORS[name].compress)(x, key)
        several = jax.tree.map(lambda leaf: jnp.stack([leaf] * MESSAGES), message)
        programs[f"{name}_decode"] = lambda message: ((), ef21.dense(message)), message
        programs[f"{name}_sum"] = lambda messages: ((), messages.total()), several
    compiled = timing.compiled(
        {
            name: (jax.jit(in_place(program), donate_argnums=1, keep_unused=True), (argument, x))
            for name, (program, argument) in programs.items()
        }
    )
    matrices = collections.deque(jnp.copy(x) for _ in range(config.matrices))
    calls = {
        name: InPlace(compiled[name], copied(argument, config.matrices), matrices)
        for name, (_, argument) in programs.items()
    }
    seconds = timing.interleaved(calls, config)

    figures, rows = {}, []
    for name, compressor in COMPRESSORS.items():
        message = jax.eval_shape(compressor.compress, x, key)
        bits = ef21.wire_bits(message) / x.size
        copies, lmos = (timing.ratio(seconds[name], seconds[unit]) for unit in ("copy", "lmo"))
        rows.append((name, f"{bits:.3f}", f"{copies:.1f}", f"{lmos:.3f}"))
        figures |= {f"{name}_over_copy": copies, f"{name}_over_lmo": lmos}
    print(timing.table((f"{shape[0]}×{shape[1]}, float32", "bits", "copies", "LMOs"), rows))
    for name in ("block", "block_4bit"):
        figures[f"top_k_over_{name}"] = timing.ratio(seconds["top_k"], seconds[name])
    for name in SUMMED:
        over = timing.ratio(seconds[f"{name}_sum"], seconds[f"{name}_decode"])
        figures[f"{name}_sum_of_{MESSAGES}_over_decode"] = over
    timing.finish(config, MODULE, args, figures)


def round_trip(compressor, key):
    """What a worker does: encode, and decode what it has sent."""

    def program(x):
        message = compressor.compress(x, key)
        return message, ef21.dense(message)

    return program


def in_place(program):
    """`program`, given the matrix that the one it returns may take the place of."""

    def wrapped(argument, last):
        rest, matrix = program(argument)
        return rest, last if matrix is None else matrix

    return wrapped


def copied(argument, count):
    """Of what a program reads, to be read in turn."""
    return collections.deque(jax.tree.map(jnp.copy, argument) for _ in range(count))


class InPlace:
    """A compiled program whose matrix takes the place of an old one, as in a training step.

    Fresh memory is had from the system page by page, which can take longer than to fill it.
    """

    def __init__(self, executable, arguments, matrices):
        self.executable, self.arguments, self.matrices = executable, arguments, matrices

    def __call__(self):
        self.arguments.rotate()
        rest, matrix = self.executable(self.arguments[0], self.matrices.popleft())
        self.matrices.append(matrix)
        return rest, matrix


if __name__ == "__main__":
    main()
