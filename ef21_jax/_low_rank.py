"""Compressors of matrices that keep some directions of the shorter side, and drop the others.

With P the projection onto r of s directions, C(X) = P X. If E P commutes with X Xᵀ and gives a
direction no less weight than any of a smaller singular value, then in the Schatten-p norm, p <= 2,

    E‖X − PX‖_p^p = E tr (Xᵀ(1 − P)X)^(p/2) <= Σ σ_i^p (1 − w_i)^(p/2) <= (1 − r/s)^(p/2) ‖X‖_p^p

with w the weights, which add up to r: the trace of a concave function is concave (Jensen), and the
mean of a product of what rises and what falls is at most the product of the means (Chebyshev).
Since nothing expands, ‖X − PX‖_p <= ‖X‖_p, so α = 1 − (1 − r/s)^(p/2), which is r/s for p = 2.

PX may have entries that are √s times as large as those of X, and factors as many times. Where they
would come within four of the largest float, a smaller multiple of PX is sent: still a contraction,
but α holds for matrices whose entries are all below 1 / (4 √s) of the largest float.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ._compressors import Compressor, check_fraction, contraction_of_values, kept
from ._dtypes import at_least_float32
from ._geometry import from_euclidean, schatten_exponent, squared
from ._matrix_messages import LowRank, Subspace
from ._messages import Floats
from ._polar import orthogonalize, over_largest, polar_express, unit_scale
from ._positions import Strata
from ._random import normal


@dataclasses.dataclass(frozen=True, repr=False)
class RankK(Compressor):
    """Keeps r = max(1, ⌊fraction · min(m, n)⌋) directions of a matrix. α >= r / min(m, n).

    With `exact`, the truncated singular value decomposition (paper M's TopK SVD, Definition 10):
    in the Schatten-p norm α >= 1 − (1 − r / min(m, n))^(2/p), nothing in the spectral norm.

    Otherwise the projection onto the range of X (XᵀX)^q Ω, with Ω Gaussian and q
    `power_iterations`, computed by matrix products alone (paper M, Section 5; Halko, Martinsson,
    Tropp 2011). Its α holds in expectation over Ω, up to what the orthonormalisation in float32
    leaves (a few parts in 1e4), and is 1 − (1 − r / min(m, n))^(p/2) for p <= 2.

    The factor along the shorter side is orthonormal, the other one carries the size. Leading axes
    are batched. Arrays of fewer than two axes, and matrices whose factors would weigh no less
    than they do, are sent as they are.

    Raises:
      ValueError: unless 0 < fraction <= 1 and power_iterations >= 0.
    """

    fraction: float
    exact: bool = False
    power_iterations: int = 1

    def __post_init__(self):
        check_fraction(self, self.fraction)
        _check_iterations(self)

    def compress(self, x, key):
        if not self._applies(x.shape):
            return Floats.of(x)
        unit, largest = _unit(x)
        rank = kept(self.fraction, min(x.shape[-2:]))
        factors = _truncated(unit, rank) if self.exact else self._subspace(unit, rank, key)
        return _low_rank(factors, largest, x)

    def _applies(self, shape):
        return _is_matrix(shape) and _factors_pay(shape, kept(self.fraction, min(shape[-2:])))

    def _subspace(self, x, rank, key):
        into_short, into_long = _products(x)
        noise = normal(key, (*x.shape[:-2], max(x.shape[-2:]), rank), x.dtype)
        basis = _orthonormal(into_short(noise))
        for _ in range(self.power_iterations):
            basis = _orthonormal(into_short(into_long(basis)))
        return basis, into_long(basis)

    def contraction(self, shape, norm=None):
        if not self._applies(shape):
            return 1.0
        share = kept(self.fraction, min(shape[-2:])) / min(shape[-2:])
        p = schatten_exponent(norm)
        if self.exact and p is not None:
            return squared(share, 2 / p)
        return _of_projection(share, shape, norm)

    def contraction_before(self, then, shape, norm=None):
        if not self._applies(shape):
            return then.contraction(shape, norm)
        rank = kept(self.fraction, min(shape[-2:]))
        return _of_factors(self.contraction(shape, norm), rank, then, shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class NuclearSharp(Compressor):
    """X^♯ = σ₁ u₁ v₁ᵀ, the sharp operator of the nuclear norm (paper M, Section D.1). α = 1 / r.

    r is min(m, n). By power iterations, from a random start, matrix-vector products alone: σ₂ is
    left with (σ₂ / σ₁)^(2 · power_iterations) of its weight. α holds in expectation however close
    they are, and, as for `RankK`, is 1 − (1 − 1/r)^(p/2) in the Schatten-p norm, p <= 2.

    Leading axes are batched. Arrays of fewer than two axes, and matrices whose factors would weigh
    no less than they do, are sent as they are.

    Raises:
      ValueError: for negative `power_iterations`.
    """

    power_iterations: int = 16

    def __post_init__(self):
        _check_iterations(self)

    def compress(self, x, key):
        if not self._applies(x.shape):
            return Floats.of(x)
        unit, largest = _unit(x)
        into_short, into_long = _products(unit)
        noise = normal(key, (*x.shape[:-2], max(x.shape[-2:]), 1), unit.dtype)

        def iterate(_, direction):
            return unit_scale(into_short(into_long(direction)), (-2, -1))

        start = unit_scale(into_short(noise), (-2, -1))
        direction = jax.lax.fori_loop(0, self.power_iterations, iterate, start)
        return _low_rank((direction, into_long(direction)), largest, x)

    def _applies(self, shape):
        return _is_matrix(shape) and _factors_pay(shape, 1)

    def contraction(self, shape, norm=None):
        if not self._applies(shape):
            return 1.0
        return _of_projection(1 / min(shape[-2:]), shape, norm)

    def contraction_before(self, then, shape, norm=None):
        if not self._applies(shape):
            return then.contraction(shape, norm)
        return _of_factors(self.contraction(shape, norm), 1, then, shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class RandomSubspace(Compressor):
    """Projects onto r = max(1, ⌊fraction · min(m, n)⌋) random directions. α = r / min(m, n).

    With equality, in expectation; 1 − (1 − r / min(m, n))^(p/2) in the Schatten-p norm, p <= 2.
    Both ends draw the directions (`Subspace`) from the seed that the message carries, so that only
    coefficients are sent, r for each entry of the longer side. `shared`: all workers take the same
    directions, from a seed that need not travel, and the network adds up their messages: an
    all-reduce of the coefficients.

    Leading axes are batched; all matrices of a leaf share the directions. Arrays of fewer than two
    axes, and where the dense array would weigh no more, are sent as they are.

    Raises:
      ValueError: unless 0 < fraction <= 1; or for a matrix of 2**31 entries or more.
    """

    fraction: float
    shared: bool = False

    def __post_init__(self):
        check_fraction(self, self.fraction)

    def compress(self, x, key):
        if not _is_matrix(x.shape):
            return Floats.of(x)
        short, long = sorted(x.shape[-2:])
        rank = kept(self.fraction, short)
        directions = Strata.of(key, short, rank, shared=self.shared)
        weight = math.prod(x.shape[:-2]) * rank * long * x.dtype.itemsize
        weight += 0 if self.shared else directions.seed.nbytes
        if weight >= x.size * x.dtype.itemsize:
            return Floats.of(x)
        if short >= 46341:  # whose square is the first past 2**31
            raise ValueError(
                f"{self!r} draws directions for matrices of fewer than 2**31 entries, got shape "
                f"{x.shape}. Split the leaf, or stack it along a leading axis."
            )
        unit, largest = _unit(x)
        form = "...mn,mr->...rn" if x.shape[-2] <= x.shape[-1] else "...mn,nr->...rm"
        basis = Subspace.basis(directions, unit.dtype)
        coefficients = jnp.einsum(form, unit, basis, precision="highest")
        coefficients = _sized(coefficients, largest, -2, x.dtype)
        return Subspace(Floats.of(coefficients.astype(x.dtype)), directions, x.shape)

    def contraction(self, shape, norm=None):
        if not _is_matrix(shape):
            return 1.0
        return _of_projection(self._share(shape), shape, norm)

    def contraction_before(self, then, shape, norm=None):
        if not _is_matrix(shape):
            return then.contraction(shape, norm)
        # The coefficients are orthogonal to what is dropped, as entries are that are kept.
        if schatten_exponent(norm) != 2:
            return None
        short, long = sorted(shape[-2:])
        values = (*shape[:-2], kept(self.fraction, short), long)
        return contraction_of_values(self._share(shape), then, values, shape, norm)

    def _share(self, shape):
        return kept(self.fraction, min(shape[-2:])) / min(shape[-2:])


def _check_iterations(compressor):
    if compressor.power_iterations < 0:
        raise ValueError(
            f"`power_iterations` must not be negative, got {compressor.power_iterations}."
        )


def _is_matrix(shape):
    return len(shape) >= 2 and math.prod(shape) > 0


def _factors_pay(shape, rank):
    m, n = shape[-2:]
    return rank * (m + n) < m * n


def _of_projection(share, shape, norm):
    p = schatten_exponent(norm)
    if p is None or p > 2:
        return from_euclidean(share, shape, norm)
    return squared(share, p / 2)


def _of_factors(alpha, rank, then, shape, norm):
    # One factor has columns of length one, the other carries the energy s of what is kept. If the
    # errors of their entries are independent, unbiased and at most ω of the squares, those of the
    # product add up to at most (2ω + ω²) s.
    if schatten_exponent(norm) != 2 or not (then.unbiased and then.entrywise):
        return None
    of_entries = then.contraction((min(shape[-2:]), rank))
    if of_entries is None:
        return None
    omega = 1 - of_entries
    alpha = alpha * (1 - 2 * omega - omega**2)
    return alpha if alpha > 0 else None


def _unit(x):
    # Squares of huge entries would overflow: work on a copy whose largest entry is one.
    return over_largest(x.astype(at_least_float32(x.dtype)), (-2, -1))


def _products(x):
    """X or Xᵀ times a basis, from the longer side into the shorter and back.

    Neither is transposed in memory.
    """
    short, long = ("m", "n") if x.shape[-2] <= x.shape[-1] else ("n", "m")

    def times(basis, out, inside):
        return jnp.einsum(f"...mn,...{inside}r->...{out}r", x, basis, precision="highest")

    return (lambda basis: times(basis, short, long)), (lambda basis: times(basis, long, short))


def _low_rank(factors, largest, x):
    """The message of factors (shorter side, longer side), whose longer one lacks `largest`."""
    short, long = factors
    long = _sized(long, largest, -1, x.dtype)
    left, right = (short, long) if x.shape[-2] <= x.shape[-1] else (long, short)
    return LowRank(Floats.of(left.astype(x.dtype)), Floats.of(right.astype(x.dtype)), x.shape)


def _sized(coefficients, largest, axis, dtype):
    """`coefficients` times `largest`; or times less, so that no product can overflow.

    No entry of a product with an orthonormal basis exceeds the longest vector along `axis`, which
    may be many times the largest entry of the matrix. A quarter of the largest float is its limit,
    since `Natural` may double both factors. The whole matrix is scaled, and so still contracts.
    """
    length = jnp.sqrt(jnp.max(jnp.sum(jnp.square(coefficients), axis, keepdims=True), (-2, -1)))
    limit = jnp.asarray(float(jnp.finfo(dtype).max) / 4, coefficients.dtype)
    most = limit / jnp.maximum(length, jnp.ones_like(length))
    return coefficients * jnp.minimum(largest, most[..., None, None])


def _truncated(x, rank):
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    u, v = u[..., :rank], jnp.swapaxes(vt, -1, -2)[..., :rank]
    s = s[..., None, :rank]
    return (u, v * s) if x.shape[-2] <= x.shape[-1] else (v, u * s)


def _orthonormal(basis):
    """Columns with the same span and, but for directions lost in rounding, orthonormal."""
    return orthogonalize(basis, polar_express(8))
