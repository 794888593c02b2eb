"""Compressors that keep some of the entries as they are, or some of the columns, and drop the rest.

With ρ the share that is kept, α = ρ. In ℓp of the entries, where Σ|x|^p of what is dropped is at
most 1 − ρ of all, α = 1 − (1 − ρ)^(2/p): more than ρ for p < 2, and nothing for p = ∞.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._compressors import (
    Compressor,
    check_fraction,
    check_indexable,
    contraction_of_values,
    kept,
)
from ._dtypes import at_least_float32
from ._geometry import entry_exponent, from_euclidean, is_stack, mixed_exponents, squared
from ._lp import check_exponent, length
from ._messages import Floats, Sparse, Transposed, wire_bits
from ._polar import over_largest
from ._positions import Strata, cheapest, cheapest_bytes


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Compressor):
    """Keeps the k = max(1, ⌊fraction · size⌋) entries largest in magnitude. α = k / size.

    In ℓp of the entries of a single matrix, α = 1 − (1 − k / size)^(2/p). Ties go to the lower
    position. Positions are sent in the code that is cheapest for their number (`_positions`).
    Where the dense array would weigh no more, that is sent (α = 1).

    Raises:
      ValueError: unless 0 < fraction <= 1; or for a leaf of 2**31 entries or more.
    """

    fraction: float

    def __post_init__(self):
        check_fraction(self, self.fraction)

    def compress(self, x, key):
        del key
        check_indexable(self, x.shape, x.size)
        count, itemsize = kept(self.fraction, x.size), x.dtype.itemsize
        if count * itemsize + cheapest_bytes(x.size, count) >= x.size * itemsize:
            return Floats.of(x)
        flat = x.ravel()
        mask = _packing.pack_mask(_largest(flat, count))
        positions, where = cheapest(mask, x.size, count)
        return Sparse(Floats.of(flat[positions]), where, x.shape)

    def contraction(self, shape, norm=None):
        if norm is not None and is_stack(shape):
            return None  # all may come from one of the matrices
        p, share = entry_exponent(norm), _share(self, shape)
        return from_euclidean(share, shape, norm) if p is None else squared(share, 2 / p)

    def contraction_before(self, then, shape, norm=None):
        values = (kept(self.fraction, math.prod(shape)),)
        return contraction_of_values(_share(self, shape), then, values, shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class RandK(Compressor):
    """Keeps k = max(1, ⌊fraction · size⌋) random entries. α = k / size, with equality.

    Every entry is kept with probability k / size. The positions are one in each of k strata
    (see `Strata`), not a uniform k-subset, and cost nothing: both ends draw them from the seed
    that the message carries. Not scaled by size / k, hence biased and contractive, as in paper M.
    `shared`: all workers keep the same entries, from a seed that need not travel, and the network
    adds up their messages: an all-reduce of k values.

    In an ℓ_{p,q} norm, p, q < ∞, α = 1 − (1 − k / size)^e with e = min(1, q/p) min(1, 2/q).

    Raises:
      ValueError: unless 0 < fraction <= 1; or for a leaf of 2**31 entries or more.
    """

    fraction: float
    shared: bool = False

    def __post_init__(self):
        check_fraction(self, self.fraction)

    def compress(self, x, key):
        check_indexable(self, x.shape, x.size)
        if x.size == 0:
            return Floats.of(x)
        where = Strata.of(key, x.size, kept(self.fraction, x.size), shared=self.shared)
        message = Sparse(Floats.of(x.ravel()[where.positions()]), where, x.shape)
        return message if wire_bits(message) < wire_bits(Floats.of(x)) else Floats.of(x)

    def contraction(self, shape, norm=None):
        exponents, share = mixed_exponents(norm), _share(self, shape)
        if exponents is None:
            return from_euclidean(share, shape, norm)
        p, q, _ = exponents
        if max(p, q) == math.inf:
            return squared(share, 0)
        # What is dropped of Σ|x|^p is 1 − share of it on average, and never more than all. A power
        # below one of it is so much less on average (Jensen), one above is at most itself. The
        # powers are q/p, of the sum along a column, and 2/q, of the sum over columns.
        return squared(share, min(1, q / p) * min(1, 2 / q))

    def contraction_before(self, then, shape, norm=None):
        values = (kept(self.fraction, math.prod(shape)),)
        return contraction_of_values(_share(self, shape), then, values, shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class ColumnTopK(Compressor):
    """Keeps the K = max(1, ⌊fraction · columns⌋) columns of largest ℓp norm: paper M's Top_p K.

    Definition 13. α = K / columns for p = 2, and 1 − (1 − K / columns)^(2/q) in ℓ_{p,q}. In other
    mixed norms α is that for columns whose lengths, in them, are misjudged by as much as the two
    norms of a column can differ.

    A column is the paper's, with weights (fan_out, fan_in): the outgoing weights of one input,
    x[..., i, :]. It lies along `axis` −1; with −2 the incoming weights of each output,
    x[..., :, o], are meant, as in `Mixed`. Leading axes are batched. Ties go to the lower index.
    Whole columns are sent, and where they are. Arrays of fewer than two axes, and where the dense
    array would weigh no more, are sent as they are (α = 1).

    Raises:
      ValueError: unless 0 < fraction <= 1, 1 <= p <= ∞, and `axis` is −1 or −2; or for a leaf of
        2**31 columns or more, or with as many entries in each.
    """

    fraction: float
    p: float = 2.0
    axis: int = -1

    def __post_init__(self):
        check_fraction(self, self.fraction)
        check_exponent("p", self.p)
        if self.axis not in (-1, -2):
            raise ValueError(f"`axis` must be -1 or -2, got {self.axis}.")

    def compress(self, x, key):
        del key
        if x.ndim < 2 or x.size == 0:
            return Floats.of(x)
        rows = x if self.axis == -1 else jnp.swapaxes(x, -1, -2)
        columns, entries = rows.shape[-2:]
        matrices, count = math.prod(x.shape[:-2]), kept(self.fraction, columns)
        check_indexable(self, x.shape, max(matrices * columns, entries))
        bytes_of_values = matrices * count * entries * x.dtype.itemsize
        bytes_of_positions = cheapest_bytes(matrices * columns, matrices * count)
        if bytes_of_values + bytes_of_positions >= x.size * x.dtype.itemsize:
            return Floats.of(x)
        unit, _ = over_largest(rows.astype(at_least_float32(x.dtype)), (-2, -1))
        lengths = length(unit, self.p, (-1,)).reshape(matrices, columns)
        mask = jax.vmap(lambda lengths: _largest(lengths, count))(lengths)
        mask = _packing.pack_mask(mask.ravel())
        positions, where = cheapest(mask, matrices * columns, matrices * count)
        values = rows.reshape(-1, entries)[positions]
        message = Sparse(Floats.of(values), where, rows.shape)
        return message if self.axis == -1 else Transposed(message)

    def contraction(self, shape, norm=None):
        if len(shape) < 2 or math.prod(shape) == 0:
            return 1.0
        exponents = mixed_exponents(norm)
        if exponents is None:
            return from_euclidean(self._share(shape, 2, 2), shape, norm)
        p, q, axis = exponents
        if q == math.inf or (p != q and axis != self.axis):
            return None
        return squared(self._share(shape, p, q), 2 / q)

    def contraction_before(self, then, shape, norm=None):
        if len(shape) < 2 or math.prod(shape) == 0:
            return then.contraction(shape, norm)
        p = entry_exponent(norm)
        if p is None or p == math.inf:
            return None
        columns, entries = shape[-3 - self.axis], shape[self.axis]
        values = (math.prod(shape[:-2]) * kept(self.fraction, columns), entries)
        return contraction_of_values(self._share(shape, p, p), then, values, shape, norm)

    def _share(self, shape, p, q):
        """What of Σ ‖column‖_p^q is kept, at least."""
        columns, entries = shape[-3 - self.axis], shape[self.axis]
        count = kept(self.fraction, columns)
        # A column that is kept is no shorter than one that is dropped, in the norm that ranks
        # them; in the other it is at most so many times shorter.
        misjudged = math.exp(min(700.0, q * abs(1 / self.p - 1 / p) * math.log(entries)))
        return count / (count + (columns - count) * misjudged)


def _share(compressor, shape):
    size = math.prod(shape)
    return kept(compressor.fraction, size) / size if size else 1.0


def _largest(flat, count):
    """Where the `count` entries largest in magnitude are, ties to the lower position.

    Magnitudes order as their bits do, so the smallest that is kept is found bit by bit, from the
    top, by counting: one pass a bit instead of a sort.
    """
    word = _packing.to_bits(jnp.abs(flat.astype(at_least_float32(flat.dtype))))
    places = word.dtype.itemsize * 8 - 1

    def raise_threshold(step, threshold):
        place = (places - 1 - step).astype(word.dtype)
        candidate = threshold | (jnp.ones((), word.dtype) << place)
        enough = jnp.sum(word >= candidate, dtype=jnp.int32) >= count
        return jnp.where(enough, candidate, threshold)

    # A zero made of the data, so that the carry varies over the same mesh axes as the steps.
    threshold = lax.fori_loop(0, places, raise_threshold, word[0] & jnp.zeros((), word.dtype))
    above, tied = word > threshold, word == threshold
    room = count - jnp.sum(above, dtype=jnp.int32)
    first_ties = _packing.ranks(_packing.pack_mask(tied), flat.size) < room
    return above | (tied & first_ties)
