"""Codes of a few bits an entry, with a scale for each run of entries.

A code turns a run of floats into integers of a few bits and one scale, and back. It is a frozen
dataclass, a static part of its message, so that both ends know it.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _packing
from ._blocks import largest, total
from ._dtypes import at_least_float32


class Code(abc.ABC):
    """Interface of a code for the entries of a run. All zeros, codes and scale, decode to zero."""

    width: int  # bits an entry

    @property
    def symbols(self) -> int:
        """How many of the 2**width codes are used."""
        return 1 << self.width

    @abc.abstractmethod
    def encode(
        self, x: jax.Array, filled: jax.Array, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Codes and scales.

        Args:
          x: shape (runs, length), floating.
          filled: shape (runs, 1), int32, how many entries of the run are no padding.
          noise: uint32, of the shape of `x`, uniform. None rounds to the nearest.

        Returns:
          codes: shape (runs, length), uint8, below 2**width.
          scales: shape (runs, 1), unsigned.
        """

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What they stand for, of `dtype`. Codes may have any shape that scales broadcast to."""


@dataclasses.dataclass(frozen=True)
class _Signed(Code):
    """Zero, and L levels of either sign."""

    width: int

    @property
    def levels(self) -> int:
        """L."""
        return (1 << (self.width - 1)) - 1

    @property
    def symbols(self):
        return 2 * self.levels + 1


@dataclasses.dataclass(frozen=True)
class Powers(_Signed):
    """The nearest of 0, ±2**(t − L + 1), ..., ±2**t, where 2**t is the run's largest, rounded.

    L = 2**(width − 1) − 1. The scale is t as an exponent of a float32 (float64) holds it.
    """

    def encode(self, x, filled, noise):
        del filled, noise
        layout = _packing.layout_of(x.dtype)
        word = _packing.to_bits(x.astype(layout.float))
        magnitude = word & _packing.magnitude_mask(word.dtype)

        def nearest(magnitude):  # the exponent of the nearest power of two; 1.5 rounds up
            rounded = magnitude + layout.word(1 << (layout.mantissa - 1)) >> layout.mantissa
            return jnp.minimum(rounded, layout.word(layout.largest)).astype(jnp.int32)

        exponent = (magnitude >> layout.mantissa).astype(jnp.int32)
        top = nearest(largest(magnitude))
        bottom = top - self.levels
        # The smallest power is also the nearest for what is half of it or more.
        level = jnp.maximum(nearest(magnitude) - bottom, 1)
        level = jnp.where((exponent >= bottom) & (exponent > 0), level, 0)
        negative = (word >> layout.sign).astype(jnp.uint8)
        return negative << (self.width - 1) | level.astype(jnp.uint8), top.astype(jnp.uint16)

    def decode(self, codes, scales, dtype):
        layout = _packing.layout_of(dtype)
        word, levels = codes.astype(layout.word), layout.word(self.levels)
        level = (word & levels) << layout.mantissa
        # It may wrap around, and back when a level is added.
        bottom = (scales.astype(layout.word) - levels) << layout.mantissa
        size = jnp.where(level > 0, level + bottom, layout.word(0))
        negative = word >> (self.width - 1) << layout.sign
        return _packing.from_bits(negative | size, layout.float).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Integers(_Signed):
    """Integers from −L to L times a scale s: the run's largest over L, rounded up to 16 bits.

    L = 2**(width − 1) − 1. Two's complement.
    """

    def encode(self, x, filled, noise):
        del filled
        x = _wide(x)
        size, smallest = jnp.abs(x), _smallest(x.dtype)
        most = _most(x)
        # At least the smallest normal float, since quotients by less are flushed to zero or worse.
        scales = _to_scales(jnp.maximum(most / self.levels, smallest), most, up=True)
        scale = jnp.maximum(_from_scales(scales, x.dtype), smallest)
        to_middle = _to_middle(most)
        quotient = jnp.where(size >= smallest, (x * to_middle) / (scale * to_middle), 0.0)
        if noise is None:
            rounded = jnp.round(quotient)
        else:
            below = jnp.floor(quotient)
            uniform = (noise >> 8).astype(x.dtype) * 2.0**-24
            rounded = below + (uniform < quotient - below).astype(x.dtype)
        rounded = jnp.clip(rounded, -self.levels, self.levels).astype(jnp.int32)
        return rounded.astype(jnp.uint8) & jnp.uint8((1 << self.width) - 1), scales

    def decode(self, codes, scales, dtype):
        scale = _from_scales(scales, at_least_float32(dtype))
        sign = 1 << (self.width - 1)
        integer = (codes ^ jnp.uint8(sign)).astype(jnp.int32) - sign
        # The scale was rounded up, so L of it may be more than the largest float.
        limit = float(jnp.finfo(dtype).max)
        return jnp.clip(integer.astype(scale.dtype) * scale, -limit, limit).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Signs(Code):
    """±s, with s the mean magnitude of the run, rounded down to 16 bits. Zero becomes +s."""

    width = 1

    def encode(self, x, filled, noise):
        del noise
        x = _wide(x)
        # Sums of integers, which are exact, and are added by vectors.
        places = 30 - (x.shape[-1] - 1).bit_length()
        unit, most = _unit(x, 1 << places)
        mean = most * (total(unit).astype(x.dtype) * 2.0**-places / filled.astype(x.dtype))
        return (x < 0).astype(jnp.uint8), _to_scales(mean, most, up=False)

    def decode(self, codes, scales, dtype):
        scale = _from_scales(scales, at_least_float32(dtype)).astype(dtype)
        return jnp.where(codes > 0, -scale, scale)


@dataclasses.dataclass(frozen=True)
class TwoLevels(Code):
    """±high or ±low. An entry is high if its magnitude reaches a threshold. Zero becomes +low.

    The threshold is that one of the largest magnitude over 1, √2, 2, ..., 2**7.5 which leaves the
    least squared error. High is the mean magnitude from there on, in five significant bits; low is
    high · (r / 16)², r = 0, ..., 15, the nearest to the mean magnitude of the others. A scale is
    high as the upper bits of its float, with r in the four bits below.
    """

    width = 2

    def encode(self, x, filled, noise):
        del noise
        dtype, x = x.dtype, _wide(x)
        unit, most = _unit(x, _ONE)
        # What each threshold would give: shape (runs, thresholds). The number of entries from it on
        # and their sum are added up as one integer, with the number in the upper bits.
        tagged = unit.astype(jnp.uint32) + jnp.uint32(1 << 23)

        def count_and_add(_, threshold):
            above = jnp.where(unit >= threshold, tagged, jnp.uint32(0))
            return None, total(above)[..., 0]

        sums = lax.scan(count_and_add, None, jnp.asarray(_THRESHOLDS, jnp.int32))[1].T
        number = (sums >> 23).astype(x.dtype)
        sum_above = (sums & jnp.uint32((1 << 23) - 1)).astype(x.dtype) / _ONE
        number_below = filled.astype(x.dtype) - number
        sum_below = total(unit).astype(x.dtype) / _ONE - sum_above
        high = _five_bits(most * (sum_above / jnp.maximum(number, 1.0)), dtype)
        unit_high = high * _to_middle(most) / (most * _to_middle(most))
        unit_high = jnp.where(most >= _smallest(x.dtype), unit_high, 1.0)
        mean_below = sum_below / jnp.maximum(number_below, 1.0)
        # From r to r + 1 in the middle of the two lows, r² + r + 1/2, or a little later: so that
        # low never is more than twice the mean, and sending it never worse than sending zero.
        ratio = 256.0 * (mean_below / jnp.maximum(unit_high, 2.0**-20))
        r = jnp.floor(0.5 + jnp.sqrt(jnp.maximum(ratio - 0.26, 0.0)))
        r = jnp.minimum(r, 15.0)
        unit_low = unit_high * _share(r)
        captured = unit_high * (2.0 * sum_above - number * unit_high)
        captured += unit_low * (2.0 * sum_below - number_below * unit_low)
        # The first threshold, of the largest entry alone, has a high that is a normal float.
        captured = jnp.where(high >= _smallest(x.dtype), captured, -1.0)
        best = jnp.argmax(captured, axis=-1, keepdims=True)
        high, r = (jnp.take_along_axis(a, best, axis=-1) for a in (high, r))
        threshold = jnp.asarray(_THRESHOLDS, jnp.int32)[best]
        word = _packing.to_bits(high)
        scales = word >> _scale_shift(word.dtype) | r.astype(word.dtype)
        scales = jnp.where(most >= _smallest(x.dtype), scales, jnp.zeros_like(scales))
        is_high = (unit >= threshold).astype(jnp.uint8)
        codes = (x < 0).astype(jnp.uint8) << 1 | is_high
        return codes, scales if word.dtype.itemsize == 8 else scales.astype(jnp.uint16)

    def decode(self, codes, scales, dtype):
        wide = at_least_float32(dtype)
        word_dtype = jnp.uint64 if wide.itemsize == 8 else jnp.uint32
        scales = scales.astype(word_dtype)
        r = scales & jnp.asarray(15, word_dtype)
        high = _packing.from_bits(scales - r << _scale_shift(word_dtype), wide)
        low = high * _share(r.astype(wide))
        size = jnp.where(codes & jnp.uint8(1) > 0, high.astype(dtype), low.astype(dtype))
        return jnp.where(codes > 1, -size, size)


_ONE = (1 << 15) - 1  # the largest of a run, as `TwoLevels` counts: 256 of them are below 2**23
_THRESHOLDS = np.round(np.exp2(-np.arange(16) / 2) * _ONE)


def _share(r):
    return jnp.square(r) * (1 / 256)


def _scale_shift(word_dtype):
    # The lowest of the five bits of `high` comes to lie above the four of `r`: in a float32 by
    # dropping fifteen of the bits that are zero, in a float64 as it is.
    return jnp.asarray(0 if jnp.dtype(word_dtype).itemsize == 8 else 15, word_dtype)


def _five_bits(x, dtype):
    """Nonnegative `x` to five significant bits, and to no more than `dtype` can hold."""
    layout = _packing.layout_of(x.dtype)
    dropped = layout.mantissa - 4
    word = _packing.to_bits(x) + layout.word(1 << (dropped - 1))
    most = float(np.ldexp(31 / 16, int(jnp.finfo(dtype).maxexp) - 1))
    return jnp.minimum(_packing.from_bits(word >> dropped << dropped, x.dtype), most)


def _wide(x):
    return x.astype(at_least_float32(x.dtype))


def _smallest(dtype):
    """The smallest normal number: less is flushed to zero by some machines and not by others."""
    return float(jnp.finfo(dtype).smallest_normal)


def _unit(x, one):
    """Magnitudes over the largest of the run, as integers from 0 to `one`; and the largest."""
    most = _most(x)
    over = jnp.where(most >= _smallest(x.dtype), most * _to_middle(most), 1.0)
    unit = jnp.round(jnp.abs(x) * _to_middle(most) / over * one)
    return jnp.minimum(unit, one).astype(jnp.int32), most


def _to_middle(most):
    """A power of two by which floats up to `most` come to where the inverse of `most` is normal.

    A division by a number for each run is compiled to a multiplication by its inverse.
    """
    half = int(jnp.finfo(most.dtype).maxexp) // 2
    return jnp.where(most > 1, 2.0**-half, 2.0**half).astype(most.dtype)


def _most(x):
    """The largest magnitude of each run, found by its bits: integers are compared by vectors."""
    word = _packing.to_bits(x)
    return _packing.from_bits(largest(word & _packing.magnitude_mask(word.dtype)), x.dtype)


def _to_scales(x, most, *, up):
    """Nonnegative `x` in 16 bits, those of a bfloat16, rounded up or down. A float64 as it is.

    Zero where `most`, the largest of the run, is subnormal.
    """
    word = _packing.to_bits(x)
    if word.dtype.itemsize == 4:
        word = jnp.minimum(word + jnp.uint32(0xFFFF if up else 0) >> 16, jnp.uint32(0x7F7F))
        word = word.astype(jnp.uint16)
    return jnp.where(most >= _smallest(x.dtype), word, jnp.zeros_like(word))


def _from_scales(scales, dtype):
    if dtype.itemsize == 4:
        scales = scales.astype(jnp.uint32) << 16
    return _packing.from_bits(scales, dtype)
