"""What one collective carries: not little, and not much more than that.

A collective costs milliseconds however little it carries, and messages are many small arrays. So
these share one row of bytes. An array that is large goes by itself, since a copy would cost more
than it saves; and arrays that are larger still may go in pieces, since whatever is sent, n times as
much is received, and held.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


_LARGE = 1 << 22  # bytes, of an array that is not copied into the shared row
_PIECE = 1 << 20  # bytes, of a piece, about: it takes longer to send than to begin with


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays as rows: shape (*lead, length) each.

    Attributes:
      rows: the shared one of bytes first, if there is one, then the large arrays.
      shapes: of the arrays, without the leading axes.
    """

    rows: tuple[jax.Array, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    @staticmethod
    def of(arrays: Sequence[jax.Array], lead: int = 0) -> "Rows":
        """`arrays`: unsigned integers, the first `lead` axes of which are the same for all."""
        shapes = tuple(jax.ShapeDtypeStruct(x.shape[lead:], x.dtype) for x in arrays)
        small = [_bytes(x, lead) for x, s in zip(arrays, shapes, strict=True) if not _large(s)]
        large = [_flat(x, lead) for x, s in zip(arrays, shapes, strict=True) if _large(s)]
        shared = [jnp.concatenate(small, axis=-1)] if small else []
        return Rows((*shared, *large), shapes)

    def carried(self, collective: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        """The arrays, after `collective` has taken each row to another, with its own lead.

        `collective` must leave the last axis as it is.
        """
        rows = [collective(row) for row in self.rows]
        shared, large = (rows[0], rows[1:]) if len(rows) > self._num_large else (None, rows)
        arrays, start, large = [], 0, iter(large)
        for shape in self.shapes:
            if _large(shape):
                row = next(large)
                arrays.append(row.reshape(*row.shape[:-1], *shape.shape))
                continue
            stop = start + shape.size * shape.dtype.itemsize
            arrays.append(_from_bytes(shared[..., start:stop], shape))
            start = stop
        return arrays

    @property
    def _num_large(self):
        return sum(map(_large, self.shapes))


def pieces(arrays: Sequence[jax.Array], axis: int) -> int:
    """Into how many equal pieces arrays of one length along `axis` are cut.

    As near to the size of a piece as can be, by a factor: a prime number of layers can be cut into
    single ones alone, and is, where these are not much smaller.
    """
    (length,) = {x.shape[axis] for x in arrays}
    wanted = sum(x.size * x.dtype.itemsize for x in arrays) / _PIECE
    if wanted < 2:
        return 1
    return min(
        (n for n in range(1, length + 1) if length % n == 0),
        key=lambda n: max(n / wanted, wanted / n),
    )


def piece_by_piece(
    function: Callable[[list[jax.Array]], jax.Array], arrays: Sequence[jax.Array], axis: int
) -> jax.Array:
    """`function` of `arrays`, one of their `pieces` after the other.

    What is made on the way takes the memory of one piece.

    Args:
      function: from pieces to an array whose first axis is what `axis` is of the pieces.
      arrays: of one length along `axis`.
      axis: along which they are cut.
    """
    count = pieces(arrays, axis)
    if count == 1:
        return function(list(arrays))
    size = arrays[0].shape[axis] // count

    def of_piece(number):
        return function([lax.dynamic_slice_in_dim(x, number * size, size, axis) for x in arrays])

    made = lax.map(of_piece, jnp.arange(count, dtype=jnp.int32))
    return made.reshape(count * size, *made.shape[2:])


def _large(shape):
    return shape.size * shape.dtype.itemsize >= _LARGE


def _flat(x, lead):
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def _bytes(x, lead):
    if x.dtype != jnp.uint8:
        x = lax.bitcast_convert_type(x, jnp.uint8)  # one more axis, of the bytes
    return _flat(x, lead)


def _from_bytes(row, shape):
    lead = row.shape[:-1]
    if shape.dtype == jnp.uint8:
        return row.reshape(*lead, *shape.shape)
    words = row.reshape(*lead, *shape.shape, shape.dtype.itemsize)
    return lax.bitcast_convert_type(words, shape.dtype)
