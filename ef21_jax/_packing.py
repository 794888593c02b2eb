"""Integers on the wire: floats as their bits, small integers packed, powers of two in one byte.

Every array that travels is made here and read back here. Nothing in this module rounds, except
`powers_of_two`, whose rounding is its purpose: the reading end sees exactly the integers the
writing end saw, and both decode from those.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def to_bits(x: jax.Array) -> jax.Array:
    """The bits of a floating array, as unsigned integers of the same width and shape.

    A compiler may widen a bfloat16 collective or move a cast across it; it leaves integers alone.
    """
    return lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(bits, dtype)


def magnitude_mask(dtype: jnp.dtype) -> jax.Array:
    """All bits of a word but the sign: of `to_bits`, which then order as the magnitudes do."""
    return jnp.asarray((1 << (dtype.itemsize * 8 - 1)) - 1, dtype)


def pack(integers: jax.Array, width: int) -> jax.Array:
    """Packs nonnegative integers below 2**width into ceil(size * width / 8) bytes.

    Args:
      integers: shape (k,), uint32.
      width: bits for each, from 0 to 32. Static.

    Returns:
      Shape (ceil(k * width / 8),), uint8.
    """
    if width == 0:
        return jnp.zeros((0,), jnp.uint8)
    bits = (integers[:, None] >> _places(width)) & jnp.uint32(1)
    return jnp.packbits(bits.astype(jnp.bool).ravel(), bitorder="little")


def unpack(packed: jax.Array, width: int, size: int) -> jax.Array:
    """The inverse of `pack`, for `size` integers: shape (size,), uint32."""
    if width == 0:
        return jnp.zeros((size,), jnp.uint32)
    bits = jnp.unpackbits(packed, count=size * width, bitorder="little").reshape(size, width)
    return jnp.sum(bits.astype(jnp.uint32) << _places(width), axis=1, dtype=jnp.uint32)


def pack_lanes(codes: jax.Array, width: int) -> jax.Array:
    """Packs each row of codes below 2**width, with the row's entries a stride apart in a byte.

    Byte j of a row holds its entries j, j + m, j + 2m, ... where m is the number of bytes: whole
    vectors are shifted and joined, which is many times as fast as `pack`. A width that does not
    divide 8 is cut into some that do: 3 into 2 and 1, one after the other.

    Args:
      codes: shape (..., n), uint8.
      width: bits for each, from 0 to 8. Static.

    Returns:
      Shape (..., the sum of ceil(n * part / 8) over the parts of width), uint8.
    """
    parts = []
    for part in _lane_widths(width):
        length = -(-codes.shape[-1] * part // 8)
        lanes = 8 // part
        padding = [(0, 0)] * (codes.ndim - 1) + [(0, lanes * length - codes.shape[-1])]
        low = jnp.pad(codes & jnp.uint8((1 << part) - 1), padding)
        apart = low.reshape(*codes.shape[:-1], lanes, length)
        place = part * lax.broadcasted_iota(jnp.uint8, apart.shape, apart.ndim - 2)
        # A sum, which a compiler keeps: of ORs it would make the codes anew for each lane that is
        # unpacked from the bytes.
        parts.append(jnp.sum(apart << place, axis=-2, dtype=jnp.uint8))
        codes = codes >> jnp.uint8(part % 8)
    return jnp.concatenate([codes[..., :0], *parts], axis=-1)


def unpack_lanes(packed: jax.Array, width: int, size: int) -> jax.Array:
    """The inverse of `pack_lanes`, for rows of `size` entries: shape (..., size), uint8."""
    codes = jnp.zeros((*packed.shape[:-1], size), jnp.uint8)
    done = 0
    for part in _lane_widths(width):
        length = -(-size * part // 8)
        mask = jnp.uint8((1 << part) - 1)
        lanes = []
        for lane in range(8 // part):
            filled = min(length, max(0, size - lane * length))  # the last ones may be shorter
            lanes.append(packed[..., :filled] >> jnp.uint8(lane * part) & mask)
        codes = codes | jnp.concatenate(lanes, axis=-1) << jnp.uint8(done)
        packed, done = packed[..., length:], done + part
    return codes


def separate_lanes(packed: jax.Array, width: int) -> jax.Array:
    """The lanes of `pack_lanes`, for a width that divides 8: shape (..., 8 // width, bytes), uint8.

    Entry by entry, where `unpack_lanes` has an array to join.
    """
    shape = (*packed.shape[:-1], 8 // width, packed.shape[-1])
    place = width * lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 2)
    return packed[..., None, :] >> place & jnp.uint8((1 << width) - 1)


def _lane_widths(width):
    return [part for part in (8, 4, 2, 1) if width & part]


def pack_mask(mask: jax.Array) -> jax.Array:
    """A boolean array in one bit an entry: shape (ceil(size / 8),), uint8."""
    return jnp.packbits(mask.ravel(), bitorder="little")


def unpack_mask(packed: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack_mask`: shape (size,), bool."""
    return jnp.unpackbits(packed, count=size, bitorder="little").astype(jnp.bool)


def ranks(packed: jax.Array, size: int) -> jax.Array:
    """How many bits of a packed mask are set before each entry: shape (size,), int32.

    A cumulative sum over words of 32 bits and a population count within them, which costs a third
    of one over the entries.
    """
    padded = jnp.pad(packed, (0, -packed.size % 4))
    words = lax.bitcast_convert_type(padded.reshape(-1, 4), jnp.uint32)
    counts = lax.population_count(words).astype(jnp.int32)
    before = jnp.cumsum(counts, dtype=jnp.int32) - counts
    lower = (jnp.uint32(1) << _places(32)) - jnp.uint32(1)
    within = lax.population_count(words[:, None] & lower).astype(jnp.int32)
    return (before[:, None] + within).ravel()[:size]


def set_positions(packed: jax.Array, size: int, count: int) -> jax.Array:
    """The positions of the `count` bits that are set in a packed mask: shape (count,), int32."""
    slot = jnp.where(unpack_mask(packed, size), ranks(packed, size), count)
    entries = jnp.arange(size, dtype=jnp.int32)
    slots = jnp.zeros((count,), jnp.int32)
    return slots.at[slot].set(entries, mode="drop", unique_indices=True)


def _places(width):
    return jnp.arange(width, dtype=jnp.uint32)[None, :]


_LEVELS = 127  # a code has seven bits for the exponent, of which 0 means the number zero


def powers_of_two(x: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rounds every entry to a signed power of two, in one byte, counted down from the largest.

    Args:
      x: any shape, floating.
      noise: uint32 of the same shape, uniform: rounding is up with probability equal to the
        mantissa (to 23 bits of it), hence without bias. None rounds to the nearest power.

    Returns:
      codes: uint8, shape of `x`: a sign bit, then 0 for zero or 1..127 for an exponent.
      top: uint16, shape (): the exponent, as its float holds it, that code 127 stands for.

    The 127 binades below the largest entry are kept; what is smaller, and what is subnormal in
    float32 (float64 if that is the input), becomes zero. An entry that would round up past the
    largest finite power of two of its dtype becomes that power.
    """
    layout = layout_of(x.dtype)
    word = to_bits(x.astype(layout.float))
    magnitude = word & magnitude_mask(word.dtype)
    # Adding to the mantissa carries into the exponent with just the wanted probability. Halfway
    # (1.5 * 2**e, the middle of two powers) is also where the worst relative error is least: 1/3.
    if noise is None:
        carry = layout.word(1 << (layout.mantissa - 1))
    else:
        carry = (noise >> 9).astype(layout.word) << (layout.mantissa - 23)
    exponent = (magnitude + carry) >> layout.mantissa
    exponent = jnp.minimum(exponent, layout.word(layout.largest)).astype(jnp.int32)
    exponent = jnp.where(magnitude >> layout.mantissa == 0, 0, exponent)
    top = jnp.max(exponent, initial=0)
    level = exponent - top + _LEVELS
    level = jnp.where((exponent > 0) & (level > 0), level, 0)
    sign = (word >> layout.sign).astype(jnp.uint8) << 7
    return sign | level.astype(jnp.uint8), top.astype(jnp.uint16)


def from_powers_of_two(codes: jax.Array, top: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array of `dtype` that `codes` and `top` of `powers_of_two` stand for."""
    layout = layout_of(dtype)
    level = (codes & jnp.uint8(127)).astype(jnp.int32)
    exponent = jnp.where(level > 0, level + top.astype(jnp.int32) - _LEVELS, 0)
    sign = (codes >> 7).astype(layout.word) << layout.sign
    word = sign | exponent.astype(layout.word) << layout.mantissa
    return from_bits(word, layout.float).astype(dtype)


class Layout(NamedTuple):
    """Where a float keeps its parts: sign bit, exponent, mantissa, from the top down."""

    float: jnp.dtype  # the dtype that is taken apart
    word: type
    mantissa: int  # bits
    sign: int  # place of the sign bit
    largest: int  # exponent of the largest finite power of two of the *original* dtype


def layout_of(dtype: jnp.dtype) -> Layout:
    """How `dtype`, or the float32 that holds a narrower one, is laid out."""
    bias_of_original = jnp.finfo(dtype).maxexp - 1
    if jnp.dtype(dtype).itemsize == 8:
        return Layout(jnp.dtype(jnp.float64), jnp.uint64, 52, 63, 1023 + bias_of_original)
    # Every narrower float is exact in float32.
    return Layout(jnp.dtype(jnp.float32), jnp.uint32, 23, 31, 127 + bias_of_original)
