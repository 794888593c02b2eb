"""One layer after the other, where a compiler would begin with all of them.

XLA's CPU compiler begins all that can be begun, and so it holds what every layer of a step needs
on the way. One after the other, they need what the largest does. A dependency that is in name
only keeps the order; of barriers nothing is left when the compiler decides on it.
"""

from typing import Any

import jax
import jax.numpy as jnp


def after(tree: Any, array: jax.Array) -> Any:
    """The arrays of `tree`, bit for bit, which cannot be had before `array`.

    But for subnormal floats, which a CPU may take for zero in any arithmetic.
    """
    zero = _zero_of(array)

    def later(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x * (1 + zero).astype(x.dtype)
        return x + zero.astype(x.dtype)

    return jax.tree.map(later, tree)


def zeros_after(array: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Zeros that cannot be had before `array`.

    Inside `shard_map` they vary over the axes that `array` varies over, as the carry of a scan must
    from the beginning. Nor are zeros of one shape made but once, and copied for all who want some.
    """
    return jnp.zeros(shape, dtype) + _zero_of(array).astype(dtype)


def _zero_of(array):
    """A zero that is not known before `array`, whatever that holds: shape (), float32."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array == array
    # An array that is spread over devices stays so, which it would not on its way to a vector.
    first = array[(slice(0, 1),) * array.ndim]
    # That a float times zero is zero no compiler may assume. An empty array sums to zero.
    return jnp.sum(jnp.abs(first.astype(jnp.float32) * 0))
