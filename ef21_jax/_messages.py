"""Messages: what a compressor puts on the wire.

A message is a pytree whose leaves are integers, exactly as they travel, and which can expand
itself (`dense`). Its cost is what those leaves weigh; there is no formula beside them. Messages
nest: the values of a `Sparse` are themselves a message, and a compressor that follows another
(`first >> then`) replaces the innermost `Floats`.

Two rules hold for every kind. A message whose leaves are all zero stands for the zero array:
that is how a refused message is silenced on both ends. And `total` adds up n stacked messages in
memory that does not grow with n.

Some messages can be added on their way, by the network itself: those whose floats are a linear
function of the array, and the same function at all workers. Then

    mean = message.with_addend(lax.pmean(message.addend(), axis_name)).dense()

is the mean of the arrays, at the cost of an all-reduce of the floats alone.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._grouping import each_layer
from ._order import after, zeros_after
from ._positions import Positions, Strata


class Message(abc.ABC):
    """Interface of a compressed array. Leaves are integer arrays; all else is static."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The array this message stands for."""

    @property
    def summable(self) -> bool:
        """Whether the messages of all workers add as their `addend`s do."""
        return False

    def addend(self) -> jax.Array:
        """The floats that add. Raises a ValueError unless the message is `summable`."""
        self._check_summable()
        return self._addend()

    def with_addend(self, addend: jax.Array) -> "Message":
        """This message with other floats: `with_addend(addend())` is the message itself."""
        self._check_summable()
        return self._with_addend(addend)

    def _check_summable(self):
        if not self.summable:
            raise ValueError(f"{type(self).__name__}: such messages do not add up, only arrays do.")

    def _addend(self) -> jax.Array:
        raise NotImplementedError

    def _with_addend(self, addend: jax.Array) -> "Message":
        raise NotImplementedError

    def added_to(self, partial: jax.Array) -> jax.Array:
        """The sum of `partial` and the array this message stands for."""
        return partial + self.dense()

    def bound(self) -> jax.Array:
        """What no entry of the array exceeds in magnitude: shape (), floating.

        Not finite where a float of the message is not. Of all of the message, but not of the array,
        where that takes more than a look at each entry to make.
        """
        return jnp.max(jnp.abs(self.dense()), initial=0)

    def total(self) -> jax.Array:
        """The sum of the arrays that n messages, stacked along a new leading axis, stand for.

        One after the other: in memory that does not grow with n, and with the same bits wherever
        they are added up.
        """
        first = jax.eval_shape(lambda m: jax.tree.map(lambda leaf: leaf[0], m).dense(), self)
        return in_turn(lambda partial, message: message.added_to(partial), first, self)


def dense(message: Message | jax.Array) -> jax.Array:
    """The array a message stands for. An array stands for itself."""
    return message.dense() if isinstance(message, Message) else message


def is_message(x: Any) -> bool:
    """Whether `x` is a message: the `is_leaf` of every map over a tree of them."""
    return isinstance(x, Message)


def expand(messages: Any) -> Any:
    """The tree of arrays that a tree of messages stands for."""
    return jax.tree.map(dense, messages, is_leaf=is_message)


def expand_in_turn(messages: Any) -> Any:
    """`expand`, one message after the other, so that the arrays need not be held together."""
    nodes, treedef = jax.tree.flatten(messages, is_leaf=is_message)
    arrays, before = [], None
    for node in nodes:
        if not is_message(node) or isinstance(node, Floats):  # there is nothing to be made
            arrays.append(dense(node))
            continue
        before = dense(node if before is None else after(node, before))
        arrays.append(before)
    return treedef.unflatten(arrays)


def wire_bits(message: Any) -> int:
    """What a message, or a whole tree of them, takes on the wire: an exact Python integer.

    It depends on shapes and dtypes alone, so the output of `jax.eval_shape` will do. Of messages
    that the network adds up only the floats travel: what else is in them every worker has.
    """
    nodes = jax.tree.leaves(message, is_leaf=is_message)
    travelling = [
        jax.eval_shape(lambda node=node: node.addend())
        if is_message(node) and node.summable
        else node
        for node in nodes
    ]
    return sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(travelling))


def _static():
    return dataclasses.field(metadata={"static": True})


def in_turn(
    add: Callable[[jax.Array, Any], jax.Array], like: jax.ShapeDtypeStruct, messages: Any
) -> jax.Array:
    """`add`s to zeros of the shape and dtype of `like` each of the stacked messages, in order."""
    zeros = zeros_after(jax.tree.leaves(messages)[0], like.shape, like.dtype)
    return lax.scan(lambda partial, message: (add(partial, message), None), zeros, messages)[0]


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

    @property
    def summable(self):
        return True

    def _addend(self):
        return self.dense()

    def _with_addend(self, addend):
        return Floats.of(addend)


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
class Stacked(Message):
    """Layers along a leading axis: messages of one kind, each of its leaves stacked."""

    layers: Message

    def dense(self):
        return each_layer(dense, self.layers)

    def total(self):
        by_layer = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), self.layers)
        return each_layer(lambda messages: messages.total(), by_layer)

    def bound(self):
        return jnp.max(jax.vmap(lambda message: message.bound())(self.layers))

    @property
    def summable(self):
        return self.layers.summable

    def _addend(self):
        return jax.vmap(lambda message: message.addend())(self.layers)

    def _with_addend(self, addend):
        together = jax.vmap(lambda message, addend: message.with_addend(addend))
        return Stacked(together(self.layers, addend))


class _Around(Message):
    """A message whose floats are those of another, `inner`."""

    inner: Message

    def bound(self):
        return self.inner.bound()

    @property
    def summable(self):
        return self.inner.summable

    def _addend(self):
        return self.inner.addend()

    def _with_addend(self, addend):
        return dataclasses.replace(self, inner=self.inner.with_addend(addend))  # type: ignore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(_Around):
    """The array of another message with its last two axes swapped."""

    inner: Message

    def dense(self):
        return jnp.swapaxes(self.inner.dense(), -1, -2)

    def total(self):
        return jnp.swapaxes(self.inner.total(), -1, -2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sometimes(_Around):
    """The array of another message, which is zero but with some probability.

    Zeros travel like other numbers here: what could be saved, a wire of changing length would save.
    """

    inner: Message
    probability: float = _static()

    def dense(self):
        return self.inner.dense()

    def total(self):
        return self.inner.total()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Message):
    """Zeros, but for k values, or rows of values, at given positions."""

    values: Message  # (k,), or (k, n) for rows
    where: Positions
    shape: tuple[int, ...] = _static()

    def dense(self):
        return self.where.place(self.values.dense()).reshape(self.shape)

    def added_to(self, partial):
        return self.where.add_to(partial, self.values.dense())

    def bound(self):
        return self.values.bound()

    @property
    def summable(self):
        return isinstance(self.where, Strata) and self.where.shared and self.values.summable

    def _addend(self):
        return self.values.addend()

    def _with_addend(self, addend):
        return dataclasses.replace(self, values=self.values.with_addend(addend))
