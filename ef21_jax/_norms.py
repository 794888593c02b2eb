"""Norms on one layer, their duals, and their linear minimization oracles.

A layer is a matrix (fan_in, fan_out), the layout of Flax; leading axes are batched, so stacked
layers, experts and heads each get their own. A vector is taken whole. Paper M writes weights as
(fan_out, fan_in).

Every oracle gives zero for zero, and the same answer for c · g whatever c in 1e-20..1e20.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from ._dtypes import at_least_float32
from ._polar import POLAR_EXPRESS, Coefficients, orthogonalize, unit_scale


class Norm(abc.ABC):
    """A norm ‖·‖ on a layer, with what an LMO step needs of it."""

    @abc.abstractmethod
    def norm(self, x: jax.Array) -> jax.Array:
        """‖x‖. Shape: the leading axes of `x`. At least float32."""

    @abc.abstractmethod
    def dual(self, g: jax.Array) -> jax.Array:
        """‖g‖_* = max ⟨g, z⟩ over ‖z‖ <= 1. Shape and dtype as of `norm`."""

    @abc.abstractmethod
    def lmo(self, g: jax.Array) -> jax.Array:
        """argmin ⟨g, z⟩ over ‖z‖ <= 1, so that ⟨g, lmo(g)⟩ = −‖g‖_*. Shape and dtype of `g`.

        Mind the sign: it is a descent direction, to be added (paper M, equation 2).
        """

    def sharp(self, g: jax.Array) -> jax.Array:
        """g^♯ = argmax ⟨g, z⟩ − ‖z‖²/2 = −‖g‖_* lmo(g) (paper M, Section C). Dtype of `g`."""
        dual = self.dual(g)
        length = dual.reshape(dual.shape + (1,) * (g.ndim - dual.ndim))
        return (-length * self.lmo(g).astype(dual.dtype)).astype(g.dtype)


@dataclasses.dataclass(frozen=True)
class Frobenius(Norm):
    """(Σ x²)^½, its own dual. The step is the normalized gradient."""

    def norm(self, x):
        x, axes = _wide(x), _layer(x)
        largest = jnp.max(jnp.abs(x), axis=axes, initial=0.0)
        over = jnp.where(largest > 0, largest, jnp.ones_like(largest))
        over = over.reshape(over.shape + (1,) * len(axes))
        return largest * jnp.sqrt(jnp.sum(jnp.square(x / over), axis=axes))

    def dual(self, g):
        return self.norm(g)

    def lmo(self, g):
        return -_in_float32(lambda g: unit_scale(g, _layer(g)), g)


@dataclasses.dataclass(frozen=True)
class RMS(Norm):
    """Frobenius over √size: the norm in which a vector of ±1 has length one (Scion's BiasRMS)."""

    def norm(self, x):
        return Frobenius().norm(x) / _root_size(x)

    def dual(self, g):
        return Frobenius().norm(g) * _root_size(g)

    def lmo(self, g):
        return Frobenius().lmo(g) * _root_size(g)


@dataclasses.dataclass(frozen=True)
class Sign(Norm):
    """max |x|, with dual Σ |g|. The step is the negative sign; the operator norm ℓ1 → ℓ∞."""

    def norm(self, x):
        return jnp.max(jnp.abs(_wide(x)), axis=_layer(x), initial=0.0)

    def dual(self, g):
        return jnp.sum(jnp.abs(_wide(g)), axis=_layer(g))

    def lmo(self, g):
        return -jnp.sign(g)


@dataclasses.dataclass(frozen=True)
class Spectral(Norm):
    """The largest singular value, with dual their sum. The step is −U Vᵀ: Muon.

    By Newton-Schulz iterations; `exact` takes a singular value decomposition instead, which is
    slow and meant for checking. `norm` and `dual` always do.

    Raises:
      ValueError: where applied to an array of fewer than two axes.
    """

    coefficients: Coefficients = POLAR_EXPRESS
    exact: bool = False

    def norm(self, x):
        return jnp.max(_singular_values(x), axis=-1, initial=0.0)

    def dual(self, g):
        return jnp.sum(_singular_values(g), axis=-1)

    def lmo(self, g):
        _check_matrix(g)
        if self.exact:
            return -_in_float32(_exact_polar, g)
        return -orthogonalize(g, self.coefficients)

    def __repr__(self):
        shown = []
        if self.coefficients != POLAR_EXPRESS:
            shown.append(f"coefficients={self.coefficients!r}")
        if self.exact:
            shown.append("exact=True")
        return f"Spectral({', '.join(shown)})"


@dataclasses.dataclass(frozen=True)
class Scaled(Norm):
    """The norm whose unit ball is `scale` times that of `base`: steps are `scale` times as long.

    Raises:
      ValueError: unless `scale` is positive and finite.
    """

    base: Norm
    scale: float

    def __post_init__(self):
        if not 0 < self.scale < math.inf:
            raise ValueError(f"`scale` must be positive and finite, got {self.scale}.")

    def norm(self, x):
        return self.base.norm(x) / self.scale

    def dual(self, g):
        return self.base.dual(g) * self.scale

    def lmo(self, g):
        return self.base.lmo(g) * self.scale


def _layer(x):
    """The axes that make up one layer: the last two, or all of a vector's."""
    return tuple(range(max(0, x.ndim - 2), x.ndim))


def _root_size(x):
    return math.sqrt(max(1, math.prod(x.shape[axis] for axis in _layer(x))))


def _wide(x):
    return x.astype(at_least_float32(x.dtype))


def _in_float32(f, x):
    return f(_wide(x)).astype(x.dtype)


def _check_matrix(x):
    if x.ndim < 2:
        raise ValueError(
            f"Spectral() needs a matrix, got shape {x.shape}: give vectors RMS() or Sign()."
        )


def _singular_values(x):
    _check_matrix(x)
    wide = _wide(x)
    largest = jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True, initial=0.0)
    over = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return jnp.linalg.svd(wide / over, compute_uv=False) * largest[..., 0]


def _exact_polar(x):
    u, s, vt = jnp.linalg.svd(unit_scale(x, (-2, -1)), full_matrices=False)
    # A direction of no weight has no sign: it is left out rather than guessed.
    keep = s > jnp.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    return jnp.einsum("...mr,...rn->...mn", u * keep[..., None, :].astype(x.dtype), vt)
