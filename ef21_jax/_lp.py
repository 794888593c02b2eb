"""Vectors under ℓp, 1 <= p <= ∞, along any axes of an array: their length, and its steepest ascent.

All other axes are batched. Inputs are float32 or wider.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ._polar import over_largest, unit_scale


Axes = tuple[int, ...]


def conjugate(p: float) -> float:
    """The p* of the dual norm, 1/p + 1/p* = 1."""
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else p / (p - 1)


def length(x: jax.Array, p: float, axes: Axes, *, keepdims: bool = False) -> jax.Array:
    """‖x‖_p."""
    if p == math.inf:
        return jnp.max(jnp.abs(x), axis=axes, keepdims=keepdims, initial=0.0)
    if p == 1:
        return jnp.sum(jnp.abs(x), axis=axes, keepdims=keepdims)
    unit, largest = over_largest(x, axes)
    total = largest * jnp.sum(jnp.abs(unit) ** p, axis=axes, keepdims=True) ** (1 / p)
    return total if keepdims else jnp.squeeze(total, axes)


def steepest(g: jax.Array, p: float, axes: Axes) -> jax.Array:
    """argmax ⟨g, z⟩ over ‖z‖_p <= 1; zero for zero. For p = 1 ties go to the lowest index."""
    if p == math.inf:
        return jnp.sign(g)
    if p == 1:
        return jnp.where(_first_largest(jnp.abs(g), axes), jnp.sign(g), jnp.zeros_like(g))
    if p == 2:
        return unit_scale(g, axes)
    unit, _ = over_largest(g, axes)
    z = jnp.sign(g) * jnp.abs(unit) ** (1 / (p - 1))
    size = length(z, p, axes, keepdims=True)
    return z / jnp.where(size > 0, size, jnp.ones_like(size))


def equivalence(p: float, size: int) -> tuple[float, float]:
    """The best constants of lower ‖x‖_p <= ‖x‖_2 <= upper ‖x‖_p for vectors of `size` entries."""
    # One entry attains 1; entries of equal magnitude attain the other.
    ratio = max(1, size) ** (0.5 - 1 / p)
    return min(1.0, ratio), max(1.0, ratio)


def check_exponent(name: str, p: float) -> None:
    """Raises a ValueError unless 1 <= p <= ∞."""
    if not p >= 1:
        raise ValueError(f"`{name}` must be at least 1, got {p}.")


def _first_largest(size, axes):
    """Where the largest is: one place along `axes`, the lexicographically first one."""
    if math.prod(size.shape) == 0:
        return jnp.zeros(size.shape, bool)
    # One axis after the other, since an index into all of them could pass 2**31.
    for i, axis in enumerate(axes):
        rest = axes[i + 1 :]
        best = jnp.max(size, axis=rest, keepdims=True) if rest else size
        here = lax.broadcasted_iota(jnp.int32, size.shape, axis % size.ndim)
        first = jnp.argmax(best, axis=axis, keepdims=True).astype(jnp.int32)
        size = jnp.where(here == first, size, jnp.full_like(size, -1))
    return size != -1
