"""Messages that stand for matrices by something smaller: factors, coordinates, a row a column."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._dtypes import at_least_float32
from ._messages import Floats, Message
from ._polar import over_largest
from ._positions import Strata


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Message):
    """The matrix `left @ right.T`, or a stack of them."""

    left: Message  # (..., m, r)
    right: Message  # (..., n, r)
    shape: tuple[int, ...] = _static()

    def dense(self):
        product = jnp.einsum(
            "...mr,...nr->...mn", self.left.dense(), self.right.dense(), precision="highest"
        )
        return product.reshape(self.shape)

    def bound(self):  # an entry is the product of two rows
        return _longest(self.left.dense(), -1) * _longest(self.right.dense(), -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignedOnes(Message):
    """Matrices with at most one entry that is not zero in each column, all of one magnitude."""

    magnitude: Message  # (matrices,)
    packed: jax.Array  # (ceil(columns * width / 8),), uint8: 0, or 1 + row, plus m where negative
    entries: int = _static()  # m, of a column
    columns: int = _static()  # of all matrices
    shape: tuple[int, ...] = _static()

    @staticmethod
    def of(
        magnitude: jax.Array,
        rows: jax.Array,
        signs: jax.Array,
        entries: int,
        shape: tuple[int, ...],
    ) -> "SignedOnes":
        """What stands for `magnitude` · `signs` at `rows`.

        Args:
          magnitude: shape (matrices,).
          rows: shape (matrices, n), int32, where the entry of each column is.
          signs: shape (matrices, n): −1, 0 or 1.
          entries: m, of a column.
          shape: of the array, (..., m, n) or (m,).
        """
        code = jnp.where(signs < 0, rows + (1 + entries), rows + 1)
        code = jnp.where(signs == 0, jnp.zeros_like(code), code).astype(jnp.uint32)
        packed = _packing.pack(code.ravel(), (2 * entries).bit_length())
        return SignedOnes(Floats.of(magnitude), packed, entries, rows.size, shape)

    def dense(self):
        m, magnitude = self.entries, self.magnitude.dense().reshape(-1, 1, 1)
        code = _packing.unpack(self.packed, (2 * m).bit_length(), self.columns).astype(jnp.int32)
        code = code.reshape(magnitude.size, 1, -1)
        row = jnp.where(code > m, code - m, code)
        here = lax.broadcasted_iota(jnp.int32, (1, m, 1), 1) + 1 == row
        entry = jnp.where(code > m, -magnitude, magnitude)
        return jnp.where(here, entry, jnp.zeros_like(entry)).reshape(self.shape)

    def bound(self):
        return self.magnitude.bound()

    @property
    def information(self) -> float:
        """The bits that the best code for positions and signs would take."""
        return self.columns * math.log2(2 * self.entries + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspace(Message):
    """Matrices in a random subspace that both ends draw: cosines of given frequencies.

    The basis Q of the shorter side, s, is orthonormal: r columns of the cosine transform, after
    one random sign a row. It is made entry by entry, without a factorisation.
    """

    coefficients: Message  # (..., r, longer side)
    frequencies: Strata  # r of s
    shape: tuple[int, ...] = _static()

    @staticmethod
    def basis(frequencies: Strata, dtype: jnp.dtype) -> jax.Array:
        """Q: shape (s, r)."""
        size = frequencies.size
        frequency = frequencies.positions().astype(jnp.uint32)[None, :]
        row = jnp.arange(size, dtype=jnp.uint32)[:, None]
        # Exact: below 2**32, since a matrix of fewer than 2**31 entries has a side below 46341.
        phase = ((2 * row + 1) * frequency % jnp.uint32(4 * size)).astype(dtype)
        cosine = jnp.cos(phase * jnp.asarray(math.pi / (2 * size), dtype))
        weight = jnp.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size)).astype(dtype)
        signs = jax.random.rademacher(jax.random.fold_in(frequencies.key(), 1), (size, 1), dtype)
        return signs * weight * cosine

    def dense(self):
        values = self.coefficients.dense()
        basis = self.basis(self.frequencies, at_least_float32(values.dtype))
        m, n = self.shape[-2:]
        form = f"sr,...rl->...{'sl' if m <= n else 'ls'}"
        product = jnp.einsum(form, basis, values.astype(basis.dtype), precision="highest")
        return product.astype(values.dtype)

    def bound(self):  # the rows of the basis are no longer than one
        return _longest(self.coefficients.dense(), -2)

    @property
    def summable(self):
        return self.frequencies.shared and self.coefficients.summable

    def _addend(self):
        return self.coefficients.addend()

    def _with_addend(self, addend):
        return dataclasses.replace(self, coefficients=self.coefficients.with_addend(addend))


def _longest(x: jax.Array, axis: int) -> jax.Array:
    """The largest Euclidean norm of the vectors along `axis`, or a little more: shape ()."""
    x = x.astype(at_least_float32(x.dtype))
    unit, largest = over_largest(x, tuple(range(x.ndim)))  # squares of huge floats overflow
    norm = jnp.sqrt(jnp.max(jnp.sum(jnp.square(unit), axis), initial=0))
    return largest.reshape(()) * norm * (1 + 2**-10)
