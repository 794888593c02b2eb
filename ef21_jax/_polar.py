"""The polar factor by Newton-Schulz iterations: matrix products only, no factorisation.

For G = U Σ Vᵀ the polar factor is U Vᵀ. Odd polynomials p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X act on
the singular values alone; a good sequence of them takes every σ in [δ, 1] close to 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._dtypes import at_least_float32


Coefficients = tuple[tuple[float, float, float], ...]

# Jordan (2024), https://kellerjordan.github.io/posts/muon: one quintic, repeated. Fast, rough:
# every σ >= 3e-3 of the Frobenius norm ends in [0.68, 1.21].
JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

# You Jiacheng (2024), a quintic of its own for each step, as optax's preset "dion" has them: every
# σ >= 0.01 ends in [0.97, 1.04]. They forgive a σ of 1.05.
YOU: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# "How much orthogonalization does Muon need?" (2026), arXiv:2606.00371: two products a step instead
# of three. Every σ >= 0.01 ends in [0.77, 1.30]. As published, σ = 1.0035 would be reversed: here
# it takes its argument over 1.01.
CUBIC: Coefficients = (
    (3.36566 / 1.01, -3.34210 / 1.01**3, 0.0),
    (2.57444, -1.49574, 0.0),
    (2.53690, -1.43126, 0.0),
    (2.44189, -1.27640, 0.0),
    (2.22305, -0.96307, 0.0),
)

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


def orthogonalize(
    x: jax.Array, coefficients: Coefficients = POLAR_EXPRESS, *, dtype: Any = None
) -> jax.Array:
    """Approximates the polar factor of every matrix in `x`.

    Args:
      x: shape (..., m, n), floating.
      coefficients: one triple (a, b, c) a step.
      dtype: of what is multiplied; sums and iterates have no less than float32. None: float32,
        float64 for that. Matrix units multiply bfloat16 many times as fast, a CPU with bfloat16
        instructions twice: six Polar Express steps then end no singular value above 1.02.

    Returns:
      Shape and dtype of `x`. Zero for zero; the same for c·x, c in 1e-30..1e30 (float32).
    """
    y = unit_scale(x.astype(at_least_float32(x.dtype)), (-2, -1))
    m, n = x.shape[-2:]
    if m == 0 or n == 0:
        return x
    dtype = y.dtype if dtype is None else jnp.dtype(dtype)
    wide = m <= n
    # All the work is done on the short side. In Gram form only the first and the last product
    # touch the long one, which pays once the matrix is half as long again as it is wide.
    iterate = _iterate_gram if max(m, n) >= 1.5 * min(m, n) else _iterate
    o = iterate(y, coefficients, wide, dtype)
    if dtype.itemsize < o.dtype.itemsize:
        # On a CPU XLA cannot run such a product with its result transposed (jax 0.10.2), so a
        # transpose that follows must not be merged into it.
        o = lax.optimization_barrier(o)
    return o.astype(x.dtype)


# Loops over the coefficients, not a program of all steps: those take long to compile. What is
# multiplied by a stays outside of the products: a + Z would lose Z to rounding.


def _iterate(y, coefficients, wide, dtype):
    def step(y, abc):
        a, b, c = abc
        gram = _gram(y, wide, dtype)
        # The square of the Gram matrix, which is symmetric, as the Gram matrix of that.
        return a * y + _apply(b * gram + c * _gram(gram, True, dtype), y, wide, dtype), None

    return lax.scan(step, y, jnp.asarray(coefficients, y.dtype))[0]


def _iterate_gram(y, coefficients, wide, dtype):
    start = 0
    for end in (*_restarts(len(coefficients), dtype), len(coefficients)):
        y = _iterate_gram_once(y, coefficients[start:end], wide, dtype)
        start = end
    return y


def _restarts(steps, dtype):
    """After which steps to begin again from the iterate.

    What rounding adds to the Gram matrix, which drifts from that of the iterate, would push
    singular values past one: in float32 to 1.8 after eight steps, with products of bfloat16 to
    6 after six, and after a restart alone at the second still to 3.8.
    """
    if dtype.itemsize >= 4:
        return () if steps <= 6 else (steps // 2,)
    return tuple(range(2, steps, 2))


def _iterate_gram_once(y, coefficients, wide, dtype):
    # Every factor is a polynomial of the first Gram matrix, so they commute and are symmetric:
    # Q ← (a + Z) Q and R ← (a + Z) R (a + Z) with Z = bR + cR².
    def factor(gram, abc):
        a, b, c = abc
        return a, b * gram + c * _product(gram, gram, dtype)

    def advance(gram, a, z):
        half = a * gram + _product(z, gram, dtype)
        return a * half + _product(z, half, dtype)

    def step(carry, abc):
        q, gram = carry
        a, z = factor(gram, abc)
        return (a * q + _product(z, q, dtype), advance(gram, a, z)), None

    # The first step finds no Q to multiply, and the last needs no R after it.
    first, *others = (tuple(jnp.asarray(abc, y.dtype)) for abc in coefficients)
    gram = _gram(y, wide, dtype)
    a, z = factor(gram, first)
    if not others:
        return a * y + _apply(z, y, wide, dtype)
    q = a * jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape) + z
    carry = (q, advance(gram, a, z))
    q, gram = lax.scan(step, carry, jnp.asarray(coefficients[1:-1], y.dtype).reshape(-1, 3))[0]
    a, z = factor(gram, others[-1])
    return _apply(a * q + _product(z, q, dtype), y, wide, dtype)


# Contractions name their axes, so nothing is ever transposed in memory.


def _product(a, b, dtype):
    return _matmul("...ij,...jk->...ik", a, b, dtype)


# Of the four blocks of a Gram matrix three are computed, in a quarter fewer operations, and the
# fourth is one of them transposed. Multiplying smaller blocks pays on a CPU alone. The products of
# the Gram form are symmetric too, and must not be made so: what rounding makes of them then grows
# from step to step, to singular values of 2.7.

_WORTH_BLOCKS = 256  # rows


def _gram(y, wide, dtype):
    short = -2 if wide else -1

    def whole(first, second):
        form = "...ik,...jk->...ij" if wide else "...ki,...kj->...ij"
        return _matmul(form, first, second, dtype)

    def blocks(y):
        first, second = _halves(y, short)
        return _symmetric(whole(first, first), whole(first, second), whole(second, second))

    if y.shape[short] < _WORTH_BLOCKS:
        return whole(y, y)
    return lax.platform_dependent(y, cpu=blocks, default=lambda y: whole(y, y))


def _halves(x, axis):
    return jnp.split(x, [x.shape[axis] // 2], axis=axis)


def _symmetric(first, corner, second):
    above = jnp.concatenate([first, corner], axis=-1)
    below = jnp.concatenate([jnp.swapaxes(corner, -1, -2), second], axis=-1)
    return jnp.concatenate([above, below], axis=-2)


def _matmul(form, a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    # Sums that leave in bfloat16 save nothing on a CPU: it then multiplies in float32.
    out = at_least_float32(dtype)
    return jnp.einsum(form, a, b, precision="highest", preferred_element_type=out)


def _apply(short, y, wide, dtype):
    form = "...ij,...jk->...ik" if wide else "...ik,...jk->...ji"
    return _matmul(form, short, y, dtype)
