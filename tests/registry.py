"""What the theorems are tested on: every compressor, every norm, every kind of input."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

import ef21_jax as ef21


# Cheapest for 0.02 of 12 x 20 entries are plain positions, for 0.1 Elias-Fano, for 0.25 a mask.
SHAPE = (12, 20)

COMPRESSORS = (
    ef21.Identity(),
    ef21.TopK(0.25),
    ef21.TopK(0.02),
    ef21.RandK(0.25),
    ef21.RankK(0.25),
    ef21.RankK(0.25, power_iterations=0),
    ef21.RankK(0.25, exact=True),
    ef21.Natural(),
    ef21.Natural(nearest=True),
    ef21.TopK(0.25) >> ef21.Natural(),
    ef21.TopK(0.02) >> ef21.Natural(nearest=True),
    ef21.RandK(0.25) >> ef21.Natural(),
    ef21.RankK(0.25) >> ef21.Natural(),
    ef21.RankK(0.25, exact=True) >> ef21.Natural(nearest=True),
    ef21.RankK(0.25, exact=True) >> ef21.TopK(0.25) >> ef21.Natural(nearest=True),
    ef21.Damping(1.5),
    ef21.Dropout(0.7),
    ef21.TopK(0.1),
    ef21.ColumnTopK(0.25),
    ef21.ColumnTopK(0.25, p=1.0, axis=-2),
    ef21.NuclearSharp(power_iterations=2),
    ef21.L1Sharp(),
    ef21.RandomSubspace(0.25),
    ef21.Damping(0.75) >> ef21.Natural(),
    ef21.Dropout(0.5) >> ef21.TopK(0.1),
    ef21.ColumnTopK(0.25) >> ef21.Natural(),
    ef21.RandomSubspace(0.25) >> ef21.Natural(),
)
# Their theorems at sizes of several blocks are in test_quantizers.
BLOCK_COMPRESSORS = (
    ef21.BlockTopK(),
    ef21.BlockTopK(16, 256),
    ef21.BlockTopK() >> ef21.BlockNatural(),
    ef21.BlockTopK() >> ef21.TwoLevel(),
    ef21.BlockTopK() >> ef21.ScaledSign(),
    ef21.BlockNatural(),
    ef21.Quantize(),
    ef21.Quantize(4),
    ef21.Quantize(2),
    ef21.Quantize(4, nearest=True),
    ef21.Quantize(2, nearest=True),
    ef21.ScaledSign(),
    ef21.TwoLevel(),
)
# No contraction: longer than what they are made of.
STEPS = (ef21.MaxRowSumSharp(),)

EXACT_NORMS = (
    ef21.Frobenius(),
    ef21.RMS(),
    ef21.Sign(),
    ef21.L1(),
    ef21.ColumnNorm(),
    ef21.RowNorm(),
    ef21.MaxRowSum(),
    ef21.MaxColumnSum(),
    ef21.Mixed(2, 1),
    ef21.Mixed(1.5, 4, axis=-2),
    ef21.Mixed(math.inf, 1.5),
    ef21.Spectral(exact=True),
    ef21.Nuclear(exact=True),
    ef21.SchattenP(1.5),
    ef21.SchattenP(4),
    ef21.Scaled(ef21.Sign(), 0.3),
    ef21.Scaled(ef21.Spectral(exact=True), 2.5),
    ef21.Shaped(ef21.MaxRowSum(), reduction_axis=-1, output_axis=-2),
)
ITERATED_NORMS = (ef21.Spectral(), ef21.Nuclear(), ef21.Scaled(ef21.Spectral(), 0.2))
NORMS = EXACT_NORMS + ITERATED_NORMS


def is_random(compressor):
    """Whether the message depends on the key."""
    match compressor:
        case ef21.Chain(first, then):
            return is_random(first) or is_random(then)
        case ef21.RankK(exact=exact):
            return not exact
        case ef21.Natural(nearest=nearest) | ef21.Quantize(nearest=nearest):
            return not nearest
    random = (ef21.Dropout, ef21.NuclearSharp, ef21.RandK, ef21.RandomSubspace)
    return isinstance(compressor, random)


def needs_matrix(norm):
    """Whether the norm refuses vectors."""
    if isinstance(norm, ef21.Scaled):
        return needs_matrix(norm.base)
    return not isinstance(norm, ef21.Frobenius | ef21.RMS | ef21.Sign | ef21.L1)


def with_spectrum(shape, spectrum, seed=0):
    """A float64 matrix of `shape` with the given singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    m, n = shape
    left = np.linalg.qr(rng.normal(size=(m, m)))[0][:, : min(m, n)]
    right = np.linalg.qr(rng.normal(size=(n, n)))[0][:, : min(m, n)]
    return (left * spectrum) @ right.T


def equations(jaxpr):
    """Every equation of a program, those of its loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inside)


def families(shape):
    """The inputs, by name: float64 matrices of `shape`."""
    rng = np.random.default_rng(0)
    m, n = shape
    gaussian = rng.normal(size=shape)
    i, j = np.arange(m)[:, None], np.arange(n)[None, :]
    index = np.arange(1, min(shape) + 1)
    return {
        "gaussian": gaussian,
        "sparse": gaussian * (rng.uniform(size=shape) < 0.05),
        "low rank": rng.normal(size=(m, 2)) @ rng.normal(size=(2, n)),
        "constant": np.full(shape, -0.7),
        "zero": np.zeros(shape),
        "huge": 1e30 * rng.normal(size=shape),
        "tiny": 1e-30 * rng.normal(size=shape),
        "one row": np.where(i == m // 2, gaussian, 0.0),
        "one column": np.where(j == n - 1, gaussian, 0.0),
        "one entry": np.where((i == m - 1) & (j == 0), 3.0, 0.0),
        "ties": rng.choice([-1.5, 1.5], size=shape),
        "power law": with_spectrum(shape, index**-1.0),
        "flat spectrum": with_spectrum(shape, np.ones(min(shape))),
    }


def stacked_families(shape, dtype):
    """The families, stacked along a new leading axis."""
    return jnp.asarray(np.stack(list(families(shape).values())), dtype)


DRAWS = 32


@functools.cache
def sent(compressor, dtype=jnp.float32, shape=SHAPE):
    """What becomes of every family under `DRAWS` keys.

    Returns:
      x: shape (families, *shape).
      messages: their leaves have two leading axes, (families, DRAWS).
      c: C(x), what the messages stand for: shape (families, DRAWS, *shape).
    """
    x = stacked_families(shape, dtype)
    keys = jax.random.split(jax.random.key(0), (len(x), DRAWS))
    repeated = jnp.repeat(x, DRAWS, axis=0)
    out = _send(compressor, repeated, keys.ravel())
    messages, c = jax.tree.map(
        lambda leaf: np.asarray(leaf).reshape(*keys.shape, *leaf.shape[1:]), out
    )
    return np.asarray(x), messages, c


@functools.partial(jax.jit, static_argnums=0)
def _send(compressor, x, keys):
    messages = jax.vmap(compressor.compress)(x, keys)
    return messages, jax.vmap(ef21.dense)(messages)


def draws(compressor, dtype=jnp.float32, shape=SHAPE):
    """The arrays of `sent`, in float64."""
    x, _, c = sent(compressor, dtype, shape)
    return x.astype(np.float64), c.astype(np.float64)
