"""Cheap noise: a counter-based hash seeded by a key.

Rounding a large array at random wants one word an entry, and threefry costs some twenty passes
over memory for them. Two rounds of a multiply-xorshift hash of the entry's index cost about one.
Not for cryptography, nor for drawing positions: `_messages.Strata` uses the key itself.
"""

import math

import jax
import jax.numpy as jnp


def noise_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint32 of `shape`, a pure function of `key`.

    Raises:
      ValueError: for 2**32 entries or more, past which the counter would repeat.
    """
    size = math.prod(shape)
    if size >= 1 << 32:
        raise ValueError(f"Noise for {size} entries would repeat: split the leaf of {shape}.")
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    counter = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    return _mix(_mix(counter ^ first) + second)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """`jax.random.normal`, drawn flat: of several axes it takes seconds to compile on a CPU."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _mix(word):
    # "lowbias32" of C. Wellons, hash-prospector (2018): avalanche within 0.2 % of ideal.
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
