"""Messages made block by block: the largest of each group, and codes of a few bits with a scale."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._blocks import Runs, Skewed
from ._codes import Code
from ._messages import Floats, Message, in_turn, wire_bits
from ._order import zeros_after
from ._positions import log2_binomial


def _static():
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockSparse(Message):
    """Zeros, but for k values in each group of `Skewed`."""

    values: Message  # (groups,), or (k, groups)
    rows: jax.Array  # (ceil(k * groups * width / 8),), uint8: which members of their groups
    block: int = _static()
    shape: tuple[int, ...] = _static()
    dtype: jnp.dtype = _static()

    @staticmethod
    def of(x: jax.Array, count: int, block: int) -> "BlockSparse":
        """The `count` entries of each group that are largest in magnitude, to the `resolution`.

        Of equals, the one at the lower position.

        Args:
          x: at least one entry.
          count: how many of each group, or all of a group that has fewer.
          block: of `Skewed`.
        """
        skewed = Skewed(x.size, block)
        count = min(count, skewed.depth)
        bits = _packing.to_bits(x.ravel())
        if count == 1:
            kept, rows = _largest_of_each(skewed, bits)
        else:
            rows = _largest_few_of_each(skewed, bits, count)
            # A group of fewer than k entries keeps some of the zeros behind the end.
            kept = bits.at[_positions(skewed, rows)].get(mode="fill", fill_value=0)
        packed = _packing.pack_lanes(rows.astype(jnp.uint8).ravel(), _width(skewed))
        return BlockSparse(Floats(kept, x.dtype), packed, block, x.shape, x.dtype)

    @staticmethod
    def resolution(count: int, depth: int) -> float:
        """By which part of themselves entries may differ and be taken for equals, at most."""
        return 0.0 if count == 1 else 2.0 ** ((depth - 1).bit_length() - 24)

    @property
    def information(self) -> float:
        """The bits that the best code for the positions would take."""
        size = math.prod(self.shape)
        skewed = Skewed(size, self.block)
        full = size - skewed.groups * (skewed.depth - 1)  # groups that are one deeper than others
        count = math.prod(jax.eval_shape(self.values.dense).shape) // skewed.groups
        return full * log2_binomial(skewed.depth, count) + (skewed.groups - full) * log2_binomial(
            skewed.depth - 1, min(count, skewed.depth - 1)
        )

    def dense(self):
        values, positions = self._entries()
        # One of each group is never one of another, but k of a group are all one in an all-zero
        # message.
        zeros = zeros_after(positions, (math.prod(self.shape),), values.dtype)
        distinct = len(values) == 1
        dense = zeros.at[positions].set(values, mode="drop", unique_indices=distinct)
        return dense.reshape(self.shape)

    def bound(self):
        return self.values.bound()

    def added_to(self, partial):
        values, positions = self._entries()
        flat = partial.ravel()
        return flat.at[positions].add(values, mode="drop").reshape(self.shape)

    def _entries(self):
        """Values, and their positions in the flat array: both (k, groups)."""
        skewed = Skewed(math.prod(self.shape), self.block)
        values = self.values.dense()
        # As one row of a matrix: of a vector, the lanes would be joined entry by entry where used.
        rows = _packing.unpack_lanes(self.rows[None], _width(skewed), values.size)
        values = values.reshape(-1, skewed.groups)
        return values, _positions(skewed, rows.reshape(values.shape))


def _width(skewed):
    return (skewed.depth - 1).bit_length()


def _positions(skewed, rows):
    """Where in the flat array the entries in `rows`, shape (k, groups), of their groups are."""
    group = jnp.arange(skewed.groups, dtype=jnp.int32)[None, :]
    return rows.astype(jnp.int32) * skewed.groups + group


def _largest_of_each(skewed, bits):
    """The largest of each group and its row: both of shape (groups,).

    By two reductions of a number each, which take what the entries are made of vector by vector.
    One of pairs would be as fast for entries that lie in memory, and four times slower for others.
    """
    split = skewed.split(bits)
    sizes = split << 1  # magnitudes order as their bits do, here without the sign
    largest = jnp.max(sizes, axis=0, keepdims=True)
    # Of equals the first: the least of the numbers whose lowest bit is the sign, the rest the row.
    sign_place = 8 * bits.dtype.itemsize - 1
    row = lax.broadcasted_iota(jnp.uint32, split.shape, 0)
    number = row << 1 | (split >> sign_place).astype(jnp.uint32)
    none = jnp.asarray(jnp.iinfo(jnp.uint32).max, jnp.uint32)
    first = jnp.min(jnp.where(sizes == largest, number, none), axis=0)
    kept = largest[0] >> 1 | (first & 1).astype(bits.dtype) << sign_place
    return kept, (first >> 1).astype(jnp.uint8)


def _largest_few_of_each(skewed, bits, count):
    """The rows of the `count` largest of each group, in order: shape (count, groups).

    An entry is ranked by one word: its magnitude, less the lowest bits where it fills the word, and
    its row. The words of each group are inserted, one after the other, into a list of the largest.
    """
    width = _width(skewed)
    word = jnp.uint64 if bits.dtype.itemsize == 8 else jnp.uint32
    unused = 1 + word.dtype.itemsize * 8 - bits.dtype.itemsize * 8
    split = skewed.split(bits)
    size = (split & _packing.magnitude_mask(bits.dtype)).astype(word)
    lower = jnp.arange(skewed.depth, dtype=word)[::-1, None]  # of equals the first counts for more
    rank = size >> max(0, width - unused) << width | lower

    def insert(ranks, new):
        # Each place takes the new one, keeps its own, or takes its neighbour's.
        before = jnp.concatenate([jnp.full_like(ranks[:1], jnp.iinfo(word).max), ranks[:-1]])
        return jnp.minimum(before, jnp.maximum(ranks, new[None, :])), None

    # Made of the data, so that the carry varies over the same mesh axes.
    empty = jnp.zeros((count, 1), word) & rank[:1]
    ranks = lax.scan(insert, empty, rank)[0]
    return (skewed.depth - 1) - (ranks & word((1 << width) - 1)).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCodes(Message):
    """A few bits for each entry and a scale for each run."""

    codes: jax.Array  # (runs, ceil(length * width / 8)), uint8
    scales: jax.Array  # (runs, 1), unsigned
    code: Code = _static()
    block: int = _static()
    shape: tuple[int, ...] = _static()
    dtype: jnp.dtype = _static()

    @staticmethod
    def of(x: jax.Array, code: Code, block: int, noise: jax.Array | None) -> "BlockCodes":
        """`x`, of at least one entry, in `code`. `noise`: of the shape of `x`."""
        runs = Runs(x.size, block)
        noise = None if noise is None else runs.split(noise.ravel())
        codes, scales = code.encode(runs.split(x.ravel()), runs.filled, noise)
        packed = _packing.pack_lanes(codes, code.width)
        return BlockCodes(packed, scales, code, block, x.shape, x.dtype)

    @property
    def information(self) -> float:
        """The bits that entries and scales would take, were all symbols of the code as likely."""
        entries = math.prod(self.shape) * math.log2(self.code.symbols)
        return entries + wire_bits(self.scales)

    def dense(self):
        runs = Runs(math.prod(self.shape), self.block)
        codes = _packing.unpack_lanes(self.codes, self.code.width, runs.length)
        decoded = self.code.decode(codes, self.scales, self.dtype)
        return runs.merge(decoded).reshape(self.shape)

    def total(self):
        width = self.code.width
        if width not in (2, 4, 8):  # lanes of single bits are too short to be worth it
            return super().total()
        # In the shape of the lanes, so that no codes are unpacked but where they are used.
        runs = Runs(math.prod(self.shape), self.block)

        def decode(message):
            codes = _packing.separate_lanes(message.codes, width)
            return self.code.decode(codes, message.scales[..., None], self.dtype)

        lanes = jax.ShapeDtypeStruct((runs.count, 8 // width, self.codes.shape[-1]), self.dtype)
        total = in_turn(lambda partial, message: partial + decode(message), lanes, self)
        total = total.reshape(runs.count, -1)[:, : runs.length]
        return runs.merge(total).reshape(self.shape)
