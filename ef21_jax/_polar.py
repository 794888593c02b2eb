"""The polar factor by Newton-Schulz iterations: matrix products only, no factorisation.

For G = U Σ Vᵀ the polar factor is U Vᵀ. Odd polynomials p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X act on
the singular values alone; a good sequence of them takes every σ in [δ, 1] close to 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ._dtypes import at_least_float32


Coefficients = tuple[tuple[float, float, float], ...]

# Jordan (2024), https://kellerjordan.github.io/posts/muon: one quintic, repeated. Fast, rough:
# every σ >= 3e-3 of the Frobenius norm ends in [0.68, 1.21].
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

_POLAR_EXPRESS_RAW = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


@functools.lru_cache
def polar_express(steps: int) -> Coefficients:
    """Amsel, Persson, Musco, Gower (2025), arXiv:2505.16932, Algorithm 1 with ℓ = 1e-3.

    Each step is the best one for the interval that the steps before it leave; all but the last
    are damped by 1 % so that rounding cannot push a singular value out of the basin, and the last
    so much that none ends above 1. With six steps every σ >= 1e-3 of the Frobenius norm ends
    within 0.6 % of 1.

    Raises:
      ValueError: unless 1 <= steps <= 8. Past eight the last one would only repeat.
    """
    if not 1 <= steps <= len(_POLAR_EXPRESS_RAW):
        raise ValueError(f"`steps` must lie in 1..{len(_POLAR_EXPRESS_RAW)}, got {steps}.")
    damped = tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS_RAW[: steps - 1]
    )
    last = _POLAR_EXPRESS_RAW[steps - 1]
    sigmas = [10 ** (-5 * i / 20_000) for i in range(20_001)]
    for a, b, c in (*damped, last):
        sigmas = [a * s + b * s**3 + c * s**5 for s in sigmas]
    return (*damped, tuple(x / max(1.0, max(sigmas)) for x in last))  # type: ignore


POLAR_EXPRESS: Coefficients = polar_express(6)


def over_largest(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """`x` over its largest magnitude along `axes`, and that magnitude, with its axes kept.

    Zero stays zero; any normal float keeps its value, 3e38 too.
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    # XLA divides by multiplying with the reciprocal, and 1 / 3e38 underflows: first to the middle.
    middle = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2)
    to_middle = jnp.where(largest > 1, 1 / middle, middle).astype(x.dtype)
    over = jnp.where(largest > 0, largest * to_middle, jnp.ones_like(largest))
    return (x * to_middle) / over, largest


def unit_scale(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`x` over its Euclidean norm along `axes`; zero stays zero, 1e±38 keep their direction.

    Dividing by the largest entry first keeps the squares from over- and underflowing.
    """
    x, _ = over_largest(x, axes)
    norm = jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    return x / jnp.where(norm > 0, norm, jnp.ones_like(norm))


def orthogonalize(x: jax.Array, coefficients: Coefficients = POLAR_EXPRESS) -> jax.Array:
    """Approximates the polar factor of every matrix in `x`.

    Args:
      x: shape (..., m, n), floating. Narrow floats are computed in float32.
      coefficients: one triple (a, b, c) a step.

    Returns:
      Shape and dtype of `x`. Zero for zero; the same for c·x, c in 1e-30..1e30 (float32).
    """
    dtype = at_least_float32(x.dtype)
    y = unit_scale(x.astype(dtype), (-2, -1))
    m, n = x.shape[-2:]
    if m == 0 or n == 0:
        return x
    wide = m <= n
    # All the work is done on the short side. In Gram form only the first and the last product
    # touch the long one, which pays once the matrix is half as long again as it is wide.
    iterate = _iterate_gram if max(m, n) >= 1.5 * min(m, n) else _iterate
    return iterate(y, coefficients, wide).astype(x.dtype)


# Loops over the coefficients, not a program of all steps: those take long to compile.


def _iterate(y, coefficients, wide):
    def step(y, abc):
        a, b, c = abc
        gram = _gram(y, wide)
        return a * y + _apply(b * gram + c * _product(gram, gram), y, wide), None

    return lax.scan(step, y, jnp.asarray(coefficients, y.dtype))[0]


_GRAM_STEPS = 6  # in float32; the Gram matrix of more of them drifts from that of the iterate


def _iterate_gram(y, coefficients, wide):
    if len(coefficients) > _GRAM_STEPS:
        # Begin again from the iterate half way: what rounding has added to the Gram matrix would
        # push singular values past one (1.8 was seen after eight steps without).
        half = len(coefficients) // 2
        y = _iterate_gram(y, coefficients[:half], wide)
        return _iterate_gram(y, coefficients[half:], wide)

    # Every factor is a polynomial of the first Gram matrix, so they commute and are symmetric:
    # Q ← (a + Z) Q and R ← (a + Z) R (a + Z) with Z = bR + cR².
    def factor(gram, abc):
        a, b, c = abc
        return a, b * gram + c * _product(gram, gram)

    def advance(gram, a, z):
        half = a * gram + _product(z, gram)
        return a * half + _product(z, half)

    def step(carry, abc):
        q, gram = carry
        a, z = factor(gram, abc)
        return (a * q + _product(z, q), advance(gram, a, z)), None

    # The first step finds no Q to multiply, and the last needs no R after it.
    first, *others = coefficients
    gram = _gram(y, wide)
    a, z = factor(gram, first)
    q = a * jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape) + z
    if others:
        carry = (q, advance(gram, a, z))
        q, gram = lax.scan(step, carry, jnp.asarray(others[:-1], y.dtype).reshape(-1, 3))[0]
        a, z = factor(gram, others[-1])
        q = a * q + _product(z, q)
    return _apply(q, y, wide)


# Contractions name their axes, so nothing is ever transposed in memory.


def _product(a, b):
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")


def _gram(y, wide):
    form = "...ik,...jk->...ij" if wide else "...ki,...kj->...ij"
    return jnp.einsum(form, y, y, precision="highest")


def _apply(short, y, wide):
    form = "...ij,...jk->...ik" if wide else "...ik,...jk->...ji"
    return jnp.einsum(form, short, y, precision="highest")
