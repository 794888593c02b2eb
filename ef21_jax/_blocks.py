"""An array cut into blocks, in two ways: to choose within, and to scale by.

The entries that compete for a place in the message should differ in scale, or a block of large
ones keeps too few and a block of small ones too many. `Skewed` therefore takes the members of a
group from rows and columns all over the array. The entries that share a scale should be alike:
`Runs` are neighbours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Skewed:
    """Groups of up to `block` entries, a constant stride apart: g, g + G, g + 2G, ...

    The stride is the number of groups, G: the least number not below size / block that has no
    factor in common with size. So the members of a group lie in different columns, whatever the
    length of a row, and in different rows. A group is a column of the array read as G to a row, and
    what is done within groups is done to whole vectors.
    """

    size: int
    block: int

    @property
    def groups(self) -> int:
        """G."""
        count = -(-self.size // self.block)
        while math.gcd(count, self.size) > 1:
            count += 1
        return count

    @property
    def depth(self) -> int:
        """How many entries the largest group has: at most `block`."""
        return -(-self.size // self.groups)

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """Where each of the `depth` rows begins and ends in the flat array. The last is shorter."""
        starts = range(0, self.size, self.groups)
        return tuple((start, min(start + self.groups, self.size)) for start in starts)

    def rows(self, flat: jax.Array) -> list[jax.Array]:
        """`depth` arrays of shape (groups,): the first members, the second ones, ...

        Groups that end before have a zero. Slices, since a pad would copy.
        """
        rows = [lax.slice_in_dim(flat, start, end) for start, end in self.ends]
        rows[-1] = jnp.pad(rows[-1], (0, self.groups - rows[-1].size))
        return rows

    def split(self, flat: jax.Array) -> jax.Array:
        """Shape (depth, groups): the `rows` as one array."""
        return jnp.pad(flat, (0, self.depth * self.groups - self.size)).reshape(self.depth, -1)

    def join(self, rows: list[jax.Array]) -> jax.Array:
        """The inverse of `rows`: shape (size,)."""
        return jnp.concatenate(
            [lax.slice_in_dim(r, 0, end - at) for r, (at, end) in zip(rows, self.ends, strict=True)]
        )

    def merge(self, split: jax.Array) -> jax.Array:
        """The inverse of `split`: shape (size,)."""
        return lax.slice_in_dim(split.reshape(-1), 0, self.size)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of at most `block` neighbours, all of one length but for the last, which is padded."""

    size: int
    block: int

    @property
    def count(self) -> int:
        """How many runs there are."""
        return -(-self.size // self.block)

    @property
    def length(self) -> int:
        """Entries in a run, padding included: as equal as can be, so that there is little."""
        return -(-self.size // max(1, self.count))

    def split(self, flat: jax.Array) -> jax.Array:
        """Shape (count, length), zeros at the end."""
        return jnp.pad(flat, (0, self.count * self.length - self.size)).reshape(-1, self.length)

    def merge(self, split: jax.Array) -> jax.Array:
        """The inverse of `split`: shape (size,)."""
        return lax.slice_in_dim(split.reshape(-1), 0, self.size)

    @property
    def filled(self) -> jax.Array:
        """How many entries of each run are no padding: shape (count, 1), int32."""
        run = jnp.arange(self.count, dtype=jnp.int32)[:, None]
        of_last = self.size - (self.count - 1) * self.length
        return jnp.where(run == self.count - 1, of_last, self.length).astype(jnp.int32)


def fold(combine: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`x` with its last axis cut into eight and the pieces combined, entry by entry.

    What is left to reduce is an eighth. A reduction over a last axis is done one entry at a time
    on a CPU, this one by vectors.
    """
    pieces = 8
    if x.shape[-1] % pieces:
        return x
    return functools.reduce(combine, jnp.split(x, pieces, axis=-1))


def largest(x: jax.Array) -> jax.Array:
    """The maximum over the last axis, which is kept with length one."""
    return jnp.max(fold(jnp.maximum, x), axis=-1, keepdims=True)


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which is kept with length one."""
    return jnp.sum(fold(jnp.add, x), axis=-1, keepdims=True, dtype=x.dtype)
