"""The one rule about precision: narrow floats are computed and remembered in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def at_least_float32(dtype: Any) -> jnp.dtype:
    """float64 for float64; float32 for every other floating dtype."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype).itemsize == 8 else jnp.float32)


def widen(tree: Any) -> Any:
    """Every narrow floating leaf in float32. Takes arrays and `jax.ShapeDtypeStruct`s alike."""

    def widen_leaf(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        dtype = at_least_float32(leaf.dtype)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return jnp.asarray(leaf, dtype)

    return jax.tree.map(widen_leaf, tree)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`. Where that is narrower, no compiler may take the rounding back."""
    # XLA drops a cast to fewer bits and back (it allows itself excess precision), unless barred.
    return x if x.dtype == dtype else lax.optimization_barrier(x.astype(dtype))


def without_overflow(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y`, with the largest float where it is infinite and `x` is not."""
    largest = jnp.copysign(jnp.asarray(jnp.finfo(y.dtype).max, y.dtype), y)
    return jnp.where(jnp.isinf(y) & jnp.isfinite(x), largest, y)
