"""Messages: what a compressor puts on the wire.

A message is a pytree whose leaves are integers, exactly as they travel, and which can expand
itself (`dense`). Its cost is what those leaves weigh; there is no formula beside them. Messages
nest: the values of a `Sparse` are themselves a message, and a compressor that follows another
(`first >> then`) replaces the innermost `Floats`.

Two rules hold for every kind. A message whose leaves are all zero stands for the zero array:
that is how a refused message is silenced on both ends. And `total` adds up n stacked messages
without holding n dense arrays.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._grouping import map_grouped


class Message(abc.ABC):
    """Interface of a compressed array. Leaves are integer arrays; all else is static."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The array this message stands for."""

    def total(self) -> jax.Array:
        """The sum of the arrays that n messages, stacked along a new leading axis, stand for."""

        def add(partial, message):
            return partial + message.dense(), None

        first = jax.eval_shape(lambda m: jax.tree.map(lambda leaf: leaf[0], m).dense(), self)
        return lax.scan(add, _zeros_varying_like(first, self), self)[0]


def dense(message: Message | jax.Array) -> jax.Array:
    """The array a message stands for. An array stands for itself."""
    return message.dense() if isinstance(message, Message) else message


def is_message(x: Any) -> bool:
    """Whether `x` is a message: the `is_leaf` of every map over a tree of them."""
    return isinstance(x, Message)


def expand(messages: Any) -> Any:
    """The tree of arrays that a tree of messages stands for."""
    nodes, treedef = jax.tree.flatten(messages, is_leaf=is_message)
    return treedef.unflatten(map_grouped(lambda _, m: dense(m), [None] * len(nodes), nodes))


def wire_bits(message: Any) -> int:
    """What a message, or a whole tree of them, takes on the wire: an exact Python integer.

    It depends on shapes and dtypes alone, so the output of `jax.eval_shape` will do.
    """
    return sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(message))


def _static():
    return dataclasses.field(metadata={"static": True})


def _zeros_varying_like(shape, witness):
    # Inside `shard_map` a scan must start from a carry that varies over the axes its steps vary
    # over. Adding a zero made of the messages gives it just those.
    zero = jax.tree.leaves(witness)[0].ravel()[:1].astype(shape.dtype) * 0
    return jnp.zeros(shape.shape, shape.dtype) + jnp.sum(zero)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Floats(Message):
    """An array as it is: the bits of its floats."""

    bits: jax.Array  # (...), unsigned, as wide as the floats
    dtype: jnp.dtype = _static()

    @staticmethod
    def of(x: jax.Array) -> "Floats":
        """The message that stands for exactly `x`."""
        return Floats(_packing.to_bits(x), x.dtype)

    def dense(self):
        return _packing.from_bits(self.bits, self.dtype)

    def total(self):
        return jnp.sum(self.dense(), axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Message):
    """Signed powers of two, a byte each, and the exponent of the largest."""

    codes: jax.Array  # (...), uint8: a sign bit and seven of exponent, counted down from `top`
    top: jax.Array  # (), uint16: the exponent that code 127 stands for
    dtype: jnp.dtype = _static()

    @staticmethod
    def of(x: jax.Array, noise: jax.Array | None) -> "PowersOfTwo":
        """`x` rounded as `_packing.powers_of_two` does."""
        return PowersOfTwo(*_packing.powers_of_two(x, noise), x.dtype)

    def dense(self):
        return _packing.from_powers_of_two(self.codes, self.top, self.dtype)


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

    def total(self):
        # One product of the n factors side by side.
        left, right = (jax.vmap(dense)(factor) for factor in (self.left, self.right))
        product = jnp.einsum("w...mr,w...nr->...mn", left, right, precision="highest")
        return product.reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Indices:
    """k flat positions, packed in the fewest bits that can tell any of them."""

    packed: jax.Array  # (ceil(k * width / 8),), uint8
    size: int = _static()  # of the array they point into
    count: int = _static()  # k

    @staticmethod
    def width(size: int) -> int:
        """Bits a position in an array of `size` entries takes."""
        return (size - 1).bit_length()

    @staticmethod
    def of(positions: jax.Array, size: int) -> "Indices":
        """`positions`: shape (k,), distinct, below `size`."""
        packed = _packing.pack(positions.astype(jnp.uint32), Indices.width(size))
        return Indices(packed, size, positions.size)

    def positions(self) -> jax.Array:
        """Shape (k,), int32."""
        return _packing.unpack(self.packed, Indices.width(self.size), self.count).astype(jnp.int32)

    def place(self, values: jax.Array) -> jax.Array:
        """Zeros of shape (size,) with `values` at the positions."""
        # `add`, not `set`: an all-zero message repeats position 0.
        return jnp.zeros((self.size,), values.dtype).at[self.positions()].add(values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """k flat positions as one bit an entry: fewer bits than indices once k is no small share."""

    packed: jax.Array  # (ceil(size / 8),), uint8
    size: int = _static()
    count: int = _static()

    def place(self, values: jax.Array) -> jax.Array:
        """Zeros of shape (size,) with `values`, in order, where the mask is set."""
        mask = _packing.unpack_mask(self.packed, self.size)
        placed = values.at[_packing.ranks(self.packed, self.size)].get(mode="clip")
        return jnp.where(mask, placed, jnp.zeros_like(placed))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strata:
    """k random positions that both ends draw from a seed: one in each of k neighbouring strata.

    The strata cut [0, size) into k runs whose lengths differ by at most one, and all of them are
    shifted around the circle by one uniform offset. So the positions are distinct, no sort is
    needed, and every entry is drawn with probability exactly k / size: the mean over the offset
    of one over the length of the stratum it falls into is k / size, since there are k strata.
    """

    seed: jax.Array  # the words of a key, uint32
    impl: str = _static()
    size: int = _static()
    count: int = _static()

    @staticmethod
    def of(key: jax.Array, size: int, count: int) -> "Strata":
        """The positions that `key` draws."""
        return Strata(jax.random.key_data(key), str(jax.random.key_impl(key)), size, count)

    def positions(self) -> jax.Array:
        """Shape (k,), int32, distinct."""
        key = jax.random.wrap_key_data(self.seed, impl=self.impl)
        shift_key, inside_key = jax.random.split(key)
        quotient, remainder = divmod(self.size, self.count)
        stratum = jnp.arange(self.count, dtype=jnp.int32)
        start = stratum * quotient + jnp.minimum(stratum, remainder)
        length = quotient + (stratum < remainder).astype(jnp.int32)
        inside = jax.random.randint(inside_key, (self.count,), 0, length, jnp.int32)
        shift = jax.random.randint(shift_key, (), 0, self.size, jnp.int32)
        # The sum of two positions may pass 2**31; the remainder is taken without forming it.
        position = start + inside
        wrapped = position >= self.size - shift
        return jnp.where(wrapped, position - (self.size - shift), position + shift)

    def place(self, values: jax.Array) -> jax.Array:
        """Zeros of shape (size,) with `values` at the positions."""
        return jnp.zeros((self.size,), values.dtype).at[self.positions()].add(values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Message):
    """Zeros, but for k values at given positions."""

    values: Message  # (k,)
    where: Indices | Mask | Strata
    shape: tuple[int, ...] = _static()

    def dense(self):
        return self.where.place(self.values.dense()).reshape(self.shape)

    def total(self):
        if isinstance(self.where, Mask):
            return super().total()
        # One scatter for all n messages.
        values = jax.vmap(dense)(self.values).ravel()
        positions = jax.vmap(type(self.where).positions)(self.where).ravel()
        zeros = jnp.zeros((math.prod(self.shape),), values.dtype)
        return zeros.at[positions].add(values).reshape(self.shape)
