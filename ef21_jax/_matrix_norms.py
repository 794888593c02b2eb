"""Norms that see a matrix as an operator: by its singular values, or by its rows and columns.

A matrix is (fan_in, fan_out), y = x W. Paper M writes Wᵀ, (fan_out, fan_in), and its names are
used: a *column* holds the weights of one input, and is a row of our array; a *row* holds those of
one output, and is a column of ours.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ._dtypes import at_least_float32
from ._lp import check_exponent, conjugate, equivalence, length, steepest
from ._norms import Norm
from ._polar import POLAR_EXPRESS, Coefficients, orthogonalize, over_largest, unit_scale


@dataclasses.dataclass(frozen=True, repr=False)
class Spectral(Norm):
    """The largest singular value, with dual their sum. The step is −U Vᵀ: Muon.

    By Newton-Schulz iterations, with `coefficients` and `dtype` as of `orthogonalize`: with
    `jnp.bfloat16` faster where a machine multiplies that faster, and a little less exact. `exact`
    takes a singular value decomposition instead, which is slow and meant for checking. `norm` and
    `dual` always do.

    Raises:
      ValueError: where applied to an array of fewer than two axes.
    """

    coefficients: Coefficients = POLAR_EXPRESS
    exact: bool = False
    dtype: Any = None

    schatten = math.inf

    def norm(self, x):
        return SchattenP(math.inf).norm(_matrix(self, x))

    def dual(self, g):
        return SchattenP(math.inf).dual(_matrix(self, g))

    def lmo(self, g):
        if self.exact:
            return SchattenP(math.inf).lmo(_matrix(self, g))
        return -orthogonalize(_matrix(self, g), self.coefficients, dtype=self.dtype)

    def equivalence(self, shape):
        return SchattenP(math.inf).equivalence(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Nuclear(Norm):
    """The sum of the singular values, with dual the largest. The step is −u vᵀ of the top pair.

    By `squarings` of the Gram matrix of the short side, r x r, matrix products alone: about the
    work of a spectral step. It attains r^(−½^(squarings + 1)) of the dual norm or more, whatever
    the spectrum: 0.996 for r = 1024. Of equal singular values it takes one combination, starting
    from the lowest index. `exact` takes a singular value decomposition instead, which is slow and
    meant for checking. `norm` and `dual` always do; `sharp` does as `lmo`.

    Raises:
      ValueError: for negative `squarings`; where applied to an array of fewer than two axes.
    """

    squarings: int = 10
    exact: bool = False

    schatten = 1.0

    def __post_init__(self):
        if self.squarings < 0:
            raise ValueError(f"`squarings` must not be negative, got {self.squarings}.")

    def norm(self, x):
        return SchattenP(1).norm(_matrix(self, x))

    def dual(self, g):
        return SchattenP(1).dual(_matrix(self, g))

    def lmo(self, g):
        if self.exact:
            return SchattenP(1).lmo(_matrix(self, g))
        wide = _matrix(self, g).astype(at_least_float32(g.dtype))
        return -_top_pair(wide, self.squarings).astype(g.dtype)

    def equivalence(self, shape):
        return SchattenP(1).equivalence(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class SchattenP(Norm):
    """(Σ σ^p)^(1/p) of the singular values, dual to p* = p / (p − 1). Steps −U σ^(p* − 1) Vᵀ.

    All of it by singular value decompositions, not meant for a training step: they are slow, and
    on CPUs LAPACK was seen to hang under `vmap`. Of p = 1, 2 and ∞, `Nuclear`, `Frobenius` and
    `Spectral` are the same by matrix products.

    Raises:
      ValueError: unless 1 <= p <= ∞; where applied to an array of fewer than two axes.
    """

    p: float

    def __post_init__(self):
        check_exponent("p", self.p)

    @property
    def schatten(self):
        return float(self.p)

    def norm(self, x):
        return length(_singular_values(_matrix(self, x)), self.p, (-1,))

    def dual(self, g):
        return length(_singular_values(_matrix(self, g)), conjugate(self.p), (-1,))

    def lmo(self, g):
        x = unit_scale(_matrix(self, g).astype(at_least_float32(g.dtype)), (-2, -1))
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        # A direction of no weight has no sign: it is left out rather than guessed.
        noise = jnp.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
        weights = steepest(jnp.where(s > noise, s, jnp.zeros_like(s)), self.p, (-1,))
        z = jnp.einsum("...mr,...r,...rn->...mn", u, weights, vt, precision="highest")
        return -z.astype(g.dtype)

    def equivalence(self, shape):
        return equivalence(self.p, min(shape[-2:]))


@dataclasses.dataclass(frozen=True, repr=False)
class Mixed(Norm):
    """ℓ_{p,q}: the ℓq norm of the ℓp norms along `axis`; dual to ℓ_{p*,q*} (paper M, Section D).

    Along −1, the default, these are of the paper's columns, the outgoing weights of each input
    (rows of our array); along −2 of its rows, the incoming weights of each output. Where an
    exponent is 1, ties go to the lowest index.

    Raises:
      ValueError: unless 1 <= p, q <= ∞ and `axis` is −1 or −2; where applied to an array of fewer
        than two axes.
    """

    p: float
    q: float
    axis: int = -1

    absolute = True

    def __post_init__(self):
        check_exponent("p", self.p)
        check_exponent("q", self.q)
        if self.axis not in (-1, -2):
            raise ValueError(f"`axis` must be -1 or -2, got {self.axis}.")

    @property
    def mixed(self):
        return self.p, self.q, self.axis

    def norm(self, x):
        return _mixed_length(_wide_matrix(self, x), self.p, self.q, self.axis)

    def dual(self, g):
        p, q = conjugate(self.p), conjugate(self.q)
        return _mixed_length(_wide_matrix(self, g), p, q, self.axis)

    def lmo(self, g):
        wide = _wide_matrix(self, g)
        inner = steepest(wide, self.p, (self.axis,))
        unit, _ = over_largest(wide, (-2, -1))  # or the lengths could overflow
        duals = length(unit, conjugate(self.p), (self.axis,), keepdims=True)
        outer = steepest(duals, self.q, (-3 - self.axis,))
        return -(inner * outer).astype(g.dtype)

    def equivalence(self, shape):
        inner = equivalence(self.p, shape[self.axis])
        outer = equivalence(self.q, shape[-3 - self.axis])
        return inner[0] * outer[0], inner[1] * outer[1]


class _Operator(Norm):
    """A mixed norm by the name it has as a norm of operators."""

    absolute = True
    mixed: tuple[float, float, int]

    def norm(self, x):
        return Mixed(*self.mixed).norm(_matrix(self, x))

    def dual(self, g):
        return Mixed(*self.mixed).dual(_matrix(self, g))

    def lmo(self, g):
        return Mixed(*self.mixed).lmo(_matrix(self, g))

    def equivalence(self, shape):
        return Mixed(*self.mixed).equivalence(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class ColumnNorm(_Operator):
    """The operator norm ℓ1 → ℓ2: the largest, over the inputs, Euclidean norm along fan_out.

    max_i (Σ_o x_io²)^½, with dual Σ_i (Σ_o g_io²)^½. The step normalizes the outgoing weights of
    each input: the rows of our array, the columns of the paper's.
    """

    mixed = (2, math.inf, -1)


@dataclasses.dataclass(frozen=True, repr=False)
class RowNorm(_Operator):
    """The operator norm ℓ2 → ℓ∞: the largest, over the outputs, Euclidean norm along fan_in.

    max_o (Σ_i x_io²)^½, with dual Σ_o (Σ_i g_io²)^½. The step normalizes the incoming weights of
    each output: the columns of our array, the rows of the paper's.
    """

    mixed = (2, math.inf, -2)


@dataclasses.dataclass(frozen=True, repr=False)
class MaxRowSum(_Operator):
    """The operator norm ℓ∞ → ℓ∞: the largest, over the outputs, sum of magnitudes along fan_in.

    max_o Σ_i |x_io|, with dual Σ_o max_i |g_io|. The step moves one incoming weight of each
    output, the largest, of equals the first: one entry in each column of our array, in each row
    of the paper's. (Its Section D.1 writes the dual as a sum over columns, and one entry in each
    of them: that is `MaxColumnSum`.)
    """

    mixed = (1, math.inf, -2)


@dataclasses.dataclass(frozen=True, repr=False)
class MaxColumnSum(_Operator):
    """The operator norm ℓ1 → ℓ1: the largest, over the inputs, sum of magnitudes along fan_out.

    max_i Σ_o |x_io|, with dual Σ_i max_o |g_io|. The step moves one outgoing weight of each
    input, the largest, of equals the first: one entry in each row of our array, in each column of
    the paper's.
    """

    mixed = (1, math.inf, -1)


def _matrix(norm, x):
    if x.ndim < 2:
        raise ValueError(
            f"{norm!r} needs a matrix, got shape {x.shape}: give vectors RMS() or Sign()."
        )
    return x


def _wide_matrix(norm, x):
    return _matrix(norm, x).astype(at_least_float32(x.dtype))


def _mixed_length(x, p, q, axis):
    return length(length(x, p, (axis,)), q, (-1,))


def _singular_values(x):
    unit, largest = over_largest(x.astype(at_least_float32(x.dtype)), (-2, -1))
    return jnp.linalg.svd(unit, compute_uv=False) * largest[..., 0]


def _top_pair(x, squarings):
    """u vᵀ of the largest singular value, or of a combination of those close to it.

    Let P = G^N with N = 2^squarings and G the Gram matrix. The column v = P e_j of the largest
    diagonal entry P_jj >= tr P / r >= λ^N / r has ⟨v, G v⟩ / ⟨v, v⟩ >= P_jj^(1/N) >= λ r^(−1/N),
    since the moments Σ λ_i^k (v_i)_j² of the eigenvalues are log-convex in k.
    """
    if 0 in x.shape:
        return x
    x = unit_scale(x, (-2, -1))
    form = "...ik,...jk->...ij" if x.shape[-2] <= x.shape[-1] else "...ki,...kj->...ij"
    gram = jnp.einsum(form, x, x, precision="highest")

    def square(_, power):
        power, _ = over_largest(power, (-2, -1))
        return jnp.einsum("...ij,...jk->...ik", power, power, precision="highest")

    power = jax.lax.fori_loop(0, squarings, square, gram)
    largest = jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1, keepdims=True)
    column = jnp.take_along_axis(power, largest[..., None], axis=-1)[..., 0]
    short = unit_scale(column, (-1,))
    if x.shape[-2] <= x.shape[-1]:
        long = unit_scale(jnp.einsum("...mn,...m->...n", x, short, precision="highest"), (-1,))
        return short[..., :, None] * long[..., None, :]
    long = unit_scale(jnp.einsum("...mn,...n->...m", x, short, precision="highest"), (-1,))
    return long[..., :, None] * short[..., None, :]
