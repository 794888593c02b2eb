"""Where the kept entries of an array are: sets of positions, in as few bytes as their kind allows.

A leaf's code is chosen from its size and the number of positions alone (`cheapest`), so that what
travels has one shape. With k of n kept and u = n / k: `Indices` take k ⌈log₂ n⌉ bits, `EliasFano`
about k (2 + log₂ u), a `Mask` n. One position in each run of u takes `Local` k ⌈log₂ u⌉, and those
that both ends draw, `Strata`, a seed. No code for a set of k can take less than log₂ C(n, k).

Positions are int32: arrays of fewer than 2**31 entries.
"""

import abc
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from . import _packing
from ._order import zeros_after


def _static():
    return dataclasses.field(metadata={"static": True})


@functools.cache
def log2_binomial(n: int, k: int) -> float:
    """log₂ C(n, k)."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


class Positions(abc.ABC):
    """Interface: `count` distinct positions in an array of `size` entries."""

    size: int
    count: int

    @abc.abstractmethod
    def positions(self) -> jax.Array:
        """Shape (count,), int32."""

    def place(self, values: jax.Array) -> jax.Array:
        """Zeros of shape (size, ...) with `values`, shape (count, ...), at the positions."""
        positions = self.positions()
        zeros = zeros_after(positions, (self.size, *values.shape[1:]), values.dtype)
        # `set`, since `add` would take subnormal values for zero. In an all-zero message positions
        # repeat, in all others they do not.
        return zeros.at[positions].set(values)

    def add_to(self, partial: jax.Array, values: jax.Array) -> jax.Array:
        """`partial`, of any shape with `size` rows of values, and `values` added to it in place."""
        rows = partial.reshape(self.size, *values.shape[1:])
        return rows.at[self.positions()].add(values).reshape(partial.shape)

    @property
    def information(self) -> float:
        """The bits that the best code for such positions would take."""
        return log2_binomial(self.size, self.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Indices(Positions):
    """k positions, packed in the fewest bits that can tell any of them."""

    packed: jax.Array  # (ceil(k * width / 8),), uint8
    size: int = _static()  # of the array they point into
    count: int = _static()  # k

    @staticmethod
    def width(size: int) -> int:
        """Bits a position in an array of `size` entries takes."""
        return (size - 1).bit_length()

    @staticmethod
    def bytes(size: int, count: int) -> int:
        """What they weigh."""
        return _bytes(count * Indices.width(size))

    @staticmethod
    def of(positions: jax.Array, size: int) -> "Indices":
        """`positions`: shape (k,), distinct, below `size`."""
        packed = _packing.pack(positions.astype(jnp.uint32), Indices.width(size))
        return Indices(packed, size, positions.size)

    def positions(self):
        return _packing.unpack(self.packed, Indices.width(self.size), self.count).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask(Positions):
    """k positions as one bit an entry: least of all once more than a quarter is kept."""

    packed: jax.Array  # (ceil(size / 8),), uint8
    size: int = _static()
    count: int = _static()

    @staticmethod
    def bytes(size: int, count: int) -> int:
        """What it weighs."""
        del count
        return _bytes(size)

    def positions(self):
        return _packing.set_positions(self.packed, self.size, self.count)

    def place(self, values):
        # No scatter: every entry that is set looks up its value by its rank.
        mask = _packing.unpack_mask(self.packed, self.size)
        placed = values.at[_packing.ranks(self.packed, self.size)].get(mode="clip")
        mask = mask.reshape(mask.shape + (1,) * (values.ndim - 1))
        return jnp.where(mask, placed, jnp.zeros_like(placed))

    def add_to(self, partial, values):
        return partial + self.place(values).reshape(partial.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EliasFano(Positions):
    """k ascending positions: low bits as they are, high bits as how far each is from the last.

    Position number i, of value p, sets the bit (p >> low) + i of a mask (Elias 1974; Fano 1971).
    The bits that are set ascend, so number i is found again as the i-th of them.
    """

    upper: jax.Array  # (ceil((k + (size - 1 >> low) + 1) / 8),), uint8
    lower: jax.Array  # (ceil(k * low / 8),), uint8
    size: int = _static()
    count: int = _static()

    @staticmethod
    @functools.cache
    def low(size: int, count: int) -> int:
        """How many low bits are kept apart: about log₂ (size / count), the cheapest number."""
        return min(range(Indices.width(size) + 1), key=lambda low: sum(_parts(size, count, low)))

    @staticmethod
    def bytes(size: int, count: int) -> int:
        """What they weigh."""
        return sum(_parts(size, count, EliasFano.low(size, count)))

    @staticmethod
    def of(positions: jax.Array, size: int) -> "EliasFano":
        """`positions`: shape (k,), ascending, below `size`."""
        count = positions.size
        low = EliasFano.low(size, count)
        places = (positions >> low) + jnp.arange(count, dtype=jnp.int32)
        mask = jnp.zeros((count + ((size - 1) >> low) + 1,), jnp.bool)
        mask = mask.at[places].set(True, unique_indices=True, indices_are_sorted=True)
        lower = positions.astype(jnp.uint32) & jnp.uint32((1 << low) - 1)
        return EliasFano(_packing.pack_mask(mask), _packing.pack(lower, low), size, count)

    def positions(self):
        low = EliasFano.low(self.size, self.count)
        length = self.count + ((self.size - 1) >> low) + 1
        places = _packing.set_positions(self.upper, length, self.count)
        # Below zero only in an all-zero message, whose positions do not matter.
        high = jnp.maximum(places - jnp.arange(self.count, dtype=jnp.int32), 0)
        lower = _packing.unpack(self.lower, low, self.count).astype(jnp.int32)
        return (high << low) | lower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Local(Positions):
    """One position in each of `count` runs of equal length: only its place in the run is sent."""

    packed: jax.Array  # (ceil(count * width / 8),), uint8
    size: int = _static()
    count: int = _static()

    @staticmethod
    def of(within: jax.Array, length: int) -> "Local":
        """`within`: shape (count,), below `length`: the place in every run."""
        packed = _packing.pack(within.astype(jnp.uint32), Indices.width(length))
        return Local(packed, within.size * length, within.size)

    @property
    def information(self):
        return self.count * math.log2(self.size // self.count)

    def positions(self):
        length = self.size // self.count
        within = _packing.unpack(self.packed, Indices.width(length), self.count)
        return within.astype(jnp.int32) + length * jnp.arange(self.count, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strata(Positions):
    """k random positions that both ends draw from a seed: one in each of k neighbouring strata.

    The strata cut [0, size) into k runs whose lengths differ by at most one, and all of them are
    shifted around the circle by one uniform offset. So the positions are distinct, no sort is
    needed, and every entry is drawn with probability exactly k / size: the mean over the offset
    of one over the length of the stratum it falls into is k / size, since there are k strata.
    """

    seed: jax.Array  # the words of a key, uint32
    impl: str = _static()
    size: int = _static()
    count: int = _static()
    shared: bool = _static()  # whether all workers draw them from the same seed

    @staticmethod
    def of(key: jax.Array, size: int, count: int, *, shared: bool) -> "Strata":
        """The positions that `key` draws."""
        return Strata(jax.random.key_data(key), str(jax.random.key_impl(key)), size, count, shared)

    @property
    def information(self):
        return self.seed.size * 32

    def key(self) -> jax.Array:
        """The key that the positions are drawn from."""
        return jax.random.wrap_key_data(self.seed, impl=self.impl)

    def positions(self):
        shift_key, inside_key = jax.random.split(self.key())
        quotient, remainder = divmod(self.size, self.count)
        stratum = jnp.arange(self.count, dtype=jnp.int32)
        start = stratum * quotient + jnp.minimum(stratum, remainder)
        length = quotient + (stratum < remainder).astype(jnp.int32)
        inside = jax.random.randint(inside_key, (self.count,), 0, length, jnp.int32)
        shift = jax.random.randint(shift_key, (), 0, self.size, jnp.int32)
        # The sum of two positions may pass 2**31; the remainder is taken without forming it.
        position = start + inside
        wrapped = position >= self.size - shift
        return jnp.where(wrapped, position - (self.size - shift), position + shift)


def cheapest_bytes(size: int, count: int) -> int:
    """What `cheapest` weighs for `count` positions in an array of `size` entries."""
    return _kind(size, count).bytes(size, count)


def cheapest(mask: jax.Array, size: int, count: int) -> tuple[jax.Array, Positions]:
    """The lightest code for the positions of the `count` bits that are set in a packed mask.

    Returns:
      The positions, ascending, shape (count,); and the code.
    """
    positions = _packing.set_positions(mask, size, count)
    kind = _kind(size, count)
    return positions, Mask(mask, size, count) if kind is Mask else kind.of(positions, size)


def _kind(size, count):
    return min((Indices, Mask, EliasFano), key=lambda kind: kind.bytes(size, count))


def _bytes(bits):
    return -(-bits // 8)


def _parts(size, count, low):
    """Bytes of the lower and of the upper half of an Elias-Fano code."""
    return _bytes(count * low), _bytes(count + ((size - 1) >> low) + 1)
