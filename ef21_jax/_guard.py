"""What a worker brings is finite, or it brings nothing: telling the one, and making the other.

What stands in the place of what is refused is zero, on both ends, and the state that was.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._messages import Floats, dense, is_message
from ._packing import to_bits


_TOGETHER = 4  # arrays in one reduction: of a stack its gradients, messages, momenta, estimates


def all_finite(tree: Any, num_workers: int) -> jax.Array:
    """Whether no float, of arrays and of what messages stand for, exceeds the largest over 4 n.

    Then the sum of two of them is finite, see `Repeatable`, and so is the sum of that over the n
    workers. Messages are asked for their `bound`, and are not expanded.
    """
    alike: dict[Any, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(jax.tree.map(_to_look_at, tree, is_leaf=is_message)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            alike.setdefault((leaf.shape, leaf.dtype), []).append(leaf)
    finite = []
    for (_, dtype), leaves in alike.items():
        limit = _size(jnp.asarray(jnp.finfo(dtype).max / (4 * num_workers), dtype))
        for start in range(0, len(leaves), _TOGETHER):
            sizes = _largest_sizes(leaves[start : start + _TOGETHER])
            finite += [size <= limit for size in sizes]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def silenced(finite: jax.Array, messages: Any) -> Any:
    """`messages` where `finite`, else such as stand for zero."""

    def silence(node):
        if is_message(node) and node.summable:
            # What is not the addend is no worker's own: it is needed to decode the others' sum.
            return node.with_addend(or_zero(finite, node.addend()))
        # All-zero leaves stand for zero, whatever the kind of message.
        return or_zero(finite, node)

    return jax.tree.map(silence, messages, is_leaf=is_message)


def or_zero(finite: jax.Array, tree: Any) -> Any:
    """`tree` where `finite`, else zeros."""
    return select(finite, tree, optax.tree.zeros_like(tree))


def select(chosen: jax.Array, new: Any, old: Any) -> Any:
    """The arrays of `new` if `chosen`, else those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), new, old)


def _to_look_at(node):
    # Arrays, and what is sent as one, in one pass with others of their shape.
    as_it_is = isinstance(node, Floats) or not is_message(node)
    return dense(node) if as_it_is else node.bound()


def _size(x):
    """The bits of the magnitude, which order as magnitudes do, with NaN the largest of all."""
    return to_bits(x) << 1


def _largest_sizes(leaves):
    """The largest `_size` in each of some arrays of one shape and dtype.

    In one reduction, of integers: it reads what the arrays are made of, and they are not made.
    """
    sizes = tuple(_size(leaf) for leaf in leaves)
    zeros = tuple(size.dtype.type(0) for size in sizes)
    axes = tuple(range(sizes[0].ndim))
    return lax.reduce(sizes, zeros, lambda a, b: tuple(map(lax.max, a, b)), axes)
