"""Norms on one layer, their duals, and their linear minimization oracles.

A layer is a matrix (fan_in, fan_out), the layout of Flax, y = x W; leading axes are batched, so
stacked layers, experts and heads each get their own. A vector is taken whole. Paper M writes
weights as (fan_out, fan_in): its rows are our columns.

Every oracle gives zero for zero, and the same answer for c · g whatever c in 1e-30..1e30.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._dtypes import at_least_float32
from ._lp import equivalence, length, steepest
from ._tables import brief


class Norm(abc.ABC):
    """A norm ‖·‖ on a layer, with what an LMO step needs of it.

    Attributes:
      absolute: it depends on the magnitudes of the entries alone, and never falls when one grows.
      schatten: p, where it is the Schatten-p norm, up to a factor: (Σ σ^p)^(1/p) of the singular
        values σ. None for others.
      mixed: (p, q, axis), where it is the ℓq norm of the ℓp norms along `axis`, up to a factor. Of
        ℓp of all entries, (p, p, -1). None for others.
    """

    absolute: bool = False
    schatten: float | None = None
    mixed: tuple[float, float, int] | None = None

    @property
    def entrywise(self) -> bool:
        """Whether the oracle takes every entry by itself: the largest entry, up to a factor."""
        return self.mixed is not None and min(self.mixed[:2]) == math.inf

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

    @abc.abstractmethod
    def equivalence(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """The best ρ of ρ_lower ‖x‖ <= ‖x‖_2 <= ρ_upper ‖x‖ for a layer of `shape`.

        Paper M, Section C: its ρ with a line below and above. Leading axes do not matter.
        """

    def sharp(self, g: jax.Array) -> jax.Array:
        """g^♯ = argmax ⟨g, z⟩ − ‖z‖²/2 = −‖g‖_* lmo(g) (paper M, Section C). Dtype of `g`.

        With ‖g‖_* as the oracle attains it, −⟨g, lmo(g)⟩, which takes no decomposition.
        """
        wide = _wide(g)
        z = self.lmo(wide)
        return (jnp.sum(wide * z, axis=_layer(g), keepdims=True) * z).astype(g.dtype)

    def __repr__(self):
        return brief(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Frobenius(Norm):
    """(Σ x²)^½, its own dual. The step is the normalized gradient."""

    absolute = True
    schatten = 2.0
    mixed = (2, 2, -1)

    def norm(self, x):
        return length(_wide(x), 2, _layer(x))

    def dual(self, g):
        return self.norm(g)

    def lmo(self, g):
        return _oracle(2, g)

    def equivalence(self, shape):
        del shape
        return 1.0, 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class RMS(Norm):
    """Frobenius over √size: the norm in which a vector of ±1 has length one (Scion's BiasRMS)."""

    absolute = True
    schatten = 2.0
    mixed = (2, 2, -1)

    def norm(self, x):
        return Frobenius().norm(x) / _root_size(x.shape)

    def dual(self, g):
        return Frobenius().norm(g) * _root_size(g.shape)

    def lmo(self, g):
        return Frobenius().lmo(g) * _root_size(g.shape)

    def equivalence(self, shape):
        return _root_size(shape), _root_size(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Sign(Norm):
    """max |x|, with dual Σ |g|. The step is the negative sign; the operator norm ℓ1 → ℓ∞."""

    absolute = True
    mixed = (math.inf, math.inf, -1)

    def norm(self, x):
        return length(_wide(x), math.inf, _layer(x))

    def dual(self, g):
        return length(_wide(g), 1, _layer(g))

    def lmo(self, g):
        return -jnp.sign(g)

    def equivalence(self, shape):
        return equivalence(math.inf, math.prod(shape[-2:]))


@dataclasses.dataclass(frozen=True, repr=False)
class L1(Norm):
    """Σ |x|, with dual max |g|. The step moves one entry, the largest; of equals the first.

    First in the order of our layout: the lowest fan_in index, then the lowest fan_out index.
    """

    absolute = True
    mixed = (1, 1, -1)

    def norm(self, x):
        return length(_wide(x), 1, _layer(x))

    def dual(self, g):
        return length(_wide(g), math.inf, _layer(g))

    def lmo(self, g):
        return _oracle(1, g)

    def equivalence(self, shape):
        return equivalence(1, math.prod(shape[-2:]))


@dataclasses.dataclass(frozen=True, repr=False)
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

    @property
    def absolute(self):
        return self.base.absolute

    @property
    def schatten(self):
        return self.base.schatten

    @property
    def mixed(self):
        return self.base.mixed

    def norm(self, x):
        return self.base.norm(x) / self.scale

    def dual(self, g):
        return self.base.dual(g) * self.scale

    def lmo(self, g):
        return self.base.lmo(g) * self.scale

    def sharp(self, g):
        return (self.base.sharp(_wide(g)) * self.scale**2).astype(g.dtype)

    def equivalence(self, shape):
        lower, upper = self.base.equivalence(shape)
        return lower * self.scale, upper * self.scale


@dataclasses.dataclass(frozen=True, repr=False)
class Shaped(Norm):
    """`base` on each matrix of a leaf that holds them in another shape: `Shaped(base, 0, (1, 2))`.

    Axes count within the leaf; those that are neither reduced nor output are batched, each index
    its own matrix. Axes named together become one, in the order given. This is what
    `optax.contrib.MuonDimensionNumbers` say, and `splits` cuts the outputs of each matrix into as
    many equal parts, side by side, each a matrix of its own:

        leaf                                     reduction_axis  output_axis  splits
        convolution (h, w, in, out)              (0, 1, 2)       3
        heads (in, heads, dim), one matrix       0               (1, 2)
        heads (in, heads, dim), one each         0               2
        their projection (heads, dim, out)       (0, 1)          2
        fused (in, 3 · out)                      0               1            3
        fused (in, 3, heads, dim)                0               (2, 3)
        stacked vectors (layers, out)            ()              1

    `norm` and `dual` have one value a matrix: the batch axes in their order, then the splits, if
    there are several. `equivalence` too is about one matrix.

    Raises:
      ValueError: for `splits` below 1; where applied, for axes that the leaf has not or that are
        named twice, and for outputs that `splits` does not divide.
    """

    base: Norm
    reduction_axis: int | Sequence[int]
    output_axis: int | Sequence[int]
    splits: int = 1

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"`splits` must be at least 1, got {self.splits}.")
        for name in ("reduction_axis", "output_axis"):  # A list would not hash.
            axes = getattr(self, name)
            if not isinstance(axes, int):
                object.__setattr__(self, name, tuple(axes))

    @property
    def absolute(self):
        return self.base.absolute

    def norm(self, x):
        return self.base.norm(self._matrices(x))

    def dual(self, g):
        return self.base.dual(self._matrices(g))

    def lmo(self, g):
        return self._leaf(self.base.lmo(self._matrices(g)), g.shape)

    def sharp(self, g):
        return self._leaf(self.base.sharp(self._matrices(g)), g.shape)

    def equivalence(self, shape):
        return self.base.equivalence(self.matrix_shape(shape)[-2:])

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(*batch, fan_in, fan_out), the shape of the matrices that a leaf of `shape` holds."""
        batch, reduction, output = (
            tuple(shape[axis] for axis in axes) for axes in self._axes(shape)
        )
        fan_out = math.prod(output)
        if fan_out % self.splits:
            raise ValueError(
                f"{self!r}: {self.splits} splits do not divide the {fan_out} outputs of {shape}."
            )
        splits = (self.splits,) if self.splits > 1 else ()
        return (*batch, *splits, math.prod(reduction), fan_out // self.splits)

    def _axes(self, shape):
        """The axes of `shape`: batch, reduction, output."""
        named = [
            (axes,) if isinstance(axes, int) else axes
            for axes in (self.reduction_axis, self.output_axis)
        ]
        ndim = len(shape)
        reduction, output = (tuple(a % ndim if -ndim <= a < ndim else a for a in n) for n in named)
        batch = tuple(axis for axis in range(ndim) if axis not in reduction + output)
        if sorted(batch + reduction + output) != list(range(ndim)):
            raise ValueError(
                f"{self!r}: the axes must be among the {ndim} of {shape}, each named once at most."
            )
        return batch, reduction, output

    def _matrices(self, x):
        *batch, fan_in, fan_out = self.matrix_shape(x.shape)
        x = jnp.transpose(x, sum(self._axes(x.shape), ()))
        if self.splits == 1:
            return x.reshape(*batch, fan_in, fan_out)
        x = x.reshape(*batch[:-1], fan_in, self.splits, fan_out)
        return jnp.swapaxes(x, -2, -3)

    def _leaf(self, matrices, shape):
        order = sum(self._axes(shape), ())
        if self.splits > 1:
            matrices = jnp.swapaxes(matrices, -2, -3)
        x = matrices.reshape(*(shape[axis] for axis in order))
        return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


def _oracle(p, g):
    return -steepest(_wide(g), p, _layer(g)).astype(g.dtype)


def _layer(x):
    """The axes that make up one layer: the last two, or all of a vector's."""
    return tuple(range(max(0, x.ndim - 2), x.ndim))


def _root_size(shape):
    return math.sqrt(max(1, math.prod(shape[-2:])))


def _wide(x):
    return x.astype(at_least_float32(x.dtype))
