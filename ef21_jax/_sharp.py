"""Sharp operators that compress by themselves (paper M, Section D.1).

X^♯ = argmax ⟨X, Z⟩ − ‖Z‖²/2 = −‖X‖_* lmo(X): the step of Algorithm 2. Where it has few entries, a
server may broadcast it as it is, and the workers take the step themselves. The third of the
paper's three, of the nuclear norm, is `_low_rank.NuclearSharp`.
"""

import dataclasses
import math

import jax.numpy as jnp

from ._compressors import (
    Compressor,
    check_indexable,
    contraction_of_values,
)
from ._dtypes import at_least_float32, without_overflow
from ._geometry import entry_exponent, from_euclidean, squared
from ._matrix_messages import SignedOnes
from ._messages import Floats, Sparse, wire_bits
from ._positions import Local


@dataclasses.dataclass(frozen=True, repr=False)
class L1Sharp(Compressor):
    """X^♯ of Σ |x|: the largest entry of a matrix, as it is. α = 1 / (m n).

    In ℓp of the entries α = 1 − (1 − 1 / (m n))^(2/p). Leading axes are batched, and a vector is
    taken whole. Ties go to the lower position.

    Raises:
      ValueError: for a leaf of 2**31 entries or more.
    """

    def compress(self, x, key):
        del key
        check_indexable(self, x.shape, x.size)
        if x.size == 0:
            return Floats.of(x)
        entries = math.prod(x.shape[-2:])
        matrices = x.reshape(-1, entries)
        place = jnp.argmax(jnp.abs(matrices), axis=1, keepdims=True).astype(jnp.int32)
        values = jnp.take_along_axis(matrices, place, axis=1)
        return Sparse(Floats.of(values.ravel()), Local.of(place.ravel(), entries), x.shape)

    def contraction(self, shape, norm=None):
        if math.prod(shape) == 0:
            return 1.0
        p, share = entry_exponent(norm), 1 / math.prod(shape[-2:])
        return from_euclidean(share, shape, norm) if p is None else squared(share, 2 / p)

    def contraction_before(self, then, shape, norm=None):
        if math.prod(shape) == 0:
            return then.contraction(shape, norm)
        values = (math.prod(shape[:-2]),)
        return contraction_of_values(1 / math.prod(shape[-2:]), then, values, shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class MaxRowSumSharp(Compressor):
    """X^♯ of max_o Σ_i |x_io|: t · sign of the largest entry, for each output o; the rest is zero.

    All of one magnitude, t = Σ_o max_i |x_io|, so that a position and a sign for each output are
    sent, and t once. Our array is (fan_in, fan_out): one entry in each of its columns, which are
    rows of the paper's, whose norm is the max row sum ‖·‖_{∞→∞}. (The paper writes "in each
    column", and the dual norm as a sum over columns: that is the sharp operator of the max column
    sum.) An output whose column is zero gets nothing. Of equals the first. Leading axes are
    batched; a vector is one column. What would overflow becomes the largest float.

    A step, not an approximation: it is longer than X, and no α can hold for it.

    Raises:
      ValueError: for a leaf with a column of 2**31 entries or more.
    """

    def compress(self, x, key):
        del key
        if x.size == 0:
            return Floats.of(x)
        entries, columns = x.shape[-2:] if x.ndim >= 2 else (x.size, 1)
        check_indexable(self, x.shape, entries)
        matrices = x.reshape(-1, entries, columns)
        rows = jnp.argmax(jnp.abs(matrices), axis=1, keepdims=True).astype(jnp.int32)
        largest = jnp.take_along_axis(matrices, rows, axis=1)
        total = jnp.sum(jnp.abs(largest.astype(at_least_float32(x.dtype))), axis=(1, 2))
        finite = jnp.sum(largest * jnp.zeros_like(largest), axis=(1, 2))
        total = without_overflow(total.astype(x.dtype), finite)
        message = SignedOnes.of(total, rows[:, 0], jnp.sign(largest[:, 0]), entries, x.shape)
        dense = Floats.of(x)
        return message if wire_bits(message) < wire_bits(dense) else Floats.of(message.dense())

    def contraction(self, shape, norm=None):
        del norm
        return None if math.prod(shape) else 1.0
