"""Compressors: pure functions of an array and a key, to a message.

Each is a frozen dataclass with one verb, `compress(x, key)`. None of them holds state, and none
communicates. They are not callable, since `optax.inject_hyperparams` takes any callable for a
schedule.

α below is the contraction factor of Euclidean norm: E‖C(x) − x‖² <= (1 − α)‖x‖² (paper M,
Definition 1, the family B_2(α)).
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from . import _packing
from ._dtypes import at_least_float32
from ._messages import (
    Floats,
    Indices,
    LowRank,
    Mask,
    Message,
    PowersOfTwo,
    Sparse,
    Strata,
    wire_bits,
)
from ._polar import orthogonalize, polar_express
from ._random import noise_bits


class Compressor(abc.ABC):
    """From an array to a message that stands for something near it.

    Attributes:
      unbiased: E C(x) = x, with independent errors of the entries.
      leaves_floats: the message holds floats that a compressor after this one (`>>`) can take on.
    """

    unbiased: bool = False
    leaves_floats: bool = True

    @abc.abstractmethod
    def compress(self, x: jax.Array, key: jax.Array) -> Message:
        """The message for `x`.

        Args:
          x: any shape, floating.
          key: a typed PRNG key. Deterministic compressors ignore it.
        """

    @abc.abstractmethod
    def contraction(self, shape: tuple[int, ...]) -> float | None:
        """The α this compressor is sure of for arrays of `shape`. None where none is proved."""

    def contraction_before(self, then: "Compressor", shape: tuple[int, ...]) -> float | None:
        """The α of `self >> then`."""
        del then, shape
        return None

    def __rshift__(self, then: "Compressor") -> "Compressor":
        """`first >> then` compresses the floats in the first's message with the second."""
        return Chain(self, then)

    def __repr__(self):
        fields = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]  # type: ignore
        shown = [
            repr(value) if f.default is dataclasses.MISSING else f"{f.name}={value!r}"
            for f, value in fields
            if value != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(Compressor):
    """Sends `x` itself. α = 1."""

    def compress(self, x, key):
        del key
        return Floats.of(x)

    def contraction(self, shape):
        del shape
        return 1.0

    def contraction_before(self, then, shape):
        return then.contraction(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Compressor):
    """Keeps the k = max(1, ⌊fraction · size⌋) entries largest in magnitude. α = k / size.

    Ties go to the lower position. Positions take one bit an entry or ⌈log₂ size⌉ bits each,
    whichever is less. Where the dense array would weigh no more, that is sent (α = 1).

    Raises:
      ValueError: unless 0 < fraction <= 1; or for a leaf of 2**31 entries or more.
    """

    fraction: float

    def __post_init__(self):
        _check_fraction(self)

    def compress(self, x, key):
        del key
        count = _count(self, x)
        bits_as_indices = count * Indices.width(x.size)
        bits_of_values = count * x.dtype.itemsize * 8
        if bits_of_values + min(x.size, bits_as_indices) >= x.size * x.dtype.itemsize * 8:
            return Floats.of(x)
        flat = x.ravel()
        mask = _largest(flat, count)
        positions = _packing.set_positions(mask, x.size, count)
        if x.size < bits_as_indices:
            where = Mask(mask, x.size, count)
        else:
            where = Indices.of(positions, x.size)
        return Sparse(Floats.of(flat[positions]), where, x.shape)

    def contraction(self, shape):
        size = math.prod(shape)
        return _kept(self.fraction, size) / size if size else 1.0

    def contraction_before(self, then, shape):
        return _contraction_of_values(self, then, shape)


@dataclasses.dataclass(frozen=True, repr=False)
class RandK(Compressor):
    """Keeps k = max(1, ⌊fraction · size⌋) random entries. α = k / size, with equality.

    Every entry is kept with probability k / size. The positions are one in each of k strata
    (see `Strata`), not a uniform k-subset, and cost nothing: both ends draw them from the seed
    that the message carries. Not scaled by size / k, hence biased and contractive, as in paper M.

    Raises:
      ValueError: unless 0 < fraction <= 1; or for a leaf of 2**31 entries or more.
    """

    fraction: float

    def __post_init__(self):
        _check_fraction(self)

    def compress(self, x, key):
        count = _count(self, x)
        if x.size == 0:
            return Floats.of(x)
        where = Strata.of(key, x.size, count)
        message = Sparse(Floats.of(x.ravel()[where.positions()]), where, x.shape)
        return message if wire_bits(message) < wire_bits(Floats.of(x)) else Floats.of(x)

    def contraction(self, shape):
        size = math.prod(shape)
        return _kept(self.fraction, size) / size if size else 1.0

    def contraction_before(self, then, shape):
        return _contraction_of_values(self, then, shape)


@dataclasses.dataclass(frozen=True, repr=False)
class RankK(Compressor):
    """Keeps r = max(1, ⌊fraction · min(m, n)⌋) directions of a matrix. α >= r / min(m, n).

    With `exact`, the truncated singular value decomposition; otherwise the projection onto the
    range of X (XᵀX)^p Ω, with Ω Gaussian and p `power_iterations`, computed by matrix products
    alone (paper M, Section 5; Halko, Martinsson, Tropp 2011). The factor along the shorter side
    is orthonormal, the other one carries the size. α of the projection holds in expectation over
    Ω, up to what the orthonormalisation in float32 leaves (a few parts in 1e4).

    Leading axes are batched. Arrays of fewer than two axes, and matrices whose factors would
    weigh no less than they do, are sent as they are.

    Raises:
      ValueError: unless 0 < fraction <= 1 and power_iterations >= 0.
    """

    fraction: float
    exact: bool = False
    power_iterations: int = 1

    def __post_init__(self):
        _check_fraction(self)
        if self.power_iterations < 0:
            raise ValueError(
                f"`power_iterations` must not be negative, got {self.power_iterations}."
            )

    def compress(self, x, key):
        if not self._applies(x.shape):
            return Floats.of(x)
        factors = self._svd if self.exact else self._subspace
        dtype = at_least_float32(x.dtype)
        # Squares of huge entries would overflow: work on a copy whose largest entry is one.
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True).astype(dtype)
        unit = x.astype(dtype) / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        left, right = factors(unit, _kept(self.fraction, min(x.shape[-2:])), key, largest)
        left, right = (Floats.of(factor.astype(x.dtype)) for factor in (left, right))
        return LowRank(left, right, x.shape)

    def _applies(self, shape):
        if len(shape) < 2 or math.prod(shape) == 0:
            return False
        m, n = shape[-2:]
        return _kept(self.fraction, min(m, n)) * (m + n) < m * n

    def _svd(self, x, rank, key, size):
        del key
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        scaled = jnp.swapaxes(vt, -1, -2)[..., :rank] * s[..., None, :rank] * size
        if x.shape[-2] <= x.shape[-1]:
            return u[..., :rank], scaled
        return u[..., :rank] * s[..., None, :rank] * size, jnp.swapaxes(vt, -1, -2)[..., :rank]

    def _subspace(self, x, rank, key, size):
        short, long = ("m", "n") if x.shape[-2] <= x.shape[-1] else ("n", "m")

        def times(basis, out, inside):  # X or Xᵀ times a basis; neither is transposed in memory
            return jnp.einsum(f"...mn,...{inside}r->...{out}r", x, basis, precision="highest")

        noise = jax.random.normal(key, (*x.shape[:-2], max(x.shape[-2:]), rank), x.dtype)
        basis = _orthonormal(times(noise, short, long))
        for _ in range(self.power_iterations):
            basis = _orthonormal(times(times(basis, long, short), short, long))
        other = times(basis, long, short) * size
        return (basis, other) if short == "m" else (other, basis)

    def contraction(self, shape):
        if not self._applies(shape):
            return 1.0
        return _kept(self.fraction, min(shape[-2:])) / min(shape[-2:])

    def contraction_before(self, then, shape):
        if not self._applies(shape):
            return then.contraction(shape)
        # One factor has columns of length one, the other carries the energy s of what is kept. If
        # the errors of their entries are independent, unbiased and at most ω of the squares, those
        # of the product add up to at most (2ω + ω²) s.
        alpha = then.contraction((min(shape[-2:]), _kept(self.fraction, min(shape[-2:]))))
        if alpha is None or not then.unbiased:
            return None
        omega = 1 - alpha
        return self.contraction(shape) * (1 - 2 * omega - omega**2)


@dataclasses.dataclass(frozen=True, repr=False)
class Natural(Compressor):
    """Rounds to a power of two and sends a byte for each: a sign and seven bits of exponent.

    At random and without bias (Horváth et al. 2022): α = 7/8. Or to the `nearest`: α = 8/9.
    Exponents count down from the largest in the leaf; 127 binades are kept, and what is smaller
    than 2**-126 of the largest entry, or subnormal, becomes zero. Where the dense array would weigh
    no more (two entries of 16 bits, or none at all), that is sent.
    """

    nearest: bool = False
    leaves_floats = False

    @property
    def unbiased(self):  # type: ignore
        return not self.nearest

    def compress(self, x, key):
        noise = None if self.nearest else noise_bits(key, x.shape)
        message = PowersOfTwo.of(x, noise)
        return message if wire_bits(message) < wire_bits(Floats.of(x)) else Floats.of(x)

    def contraction(self, shape):
        del shape
        return 8 / 9 if self.nearest else 7 / 8


@dataclasses.dataclass(frozen=True, repr=False)
class Chain(Compressor):
    """`first >> then`: every `Floats` in the first's message, compressed again ("+" in paper M)."""

    first: Compressor
    then: Compressor

    def __post_init__(self):
        for part in (self.first, self.then):
            if not isinstance(part, Compressor):
                raise ValueError(f"`>>` joins two compressors, got {part!r}.")
        if not self.first.leaves_floats:
            raise ValueError(
                f"{self.first!r} leaves no floats for {self.then!r} to compress: swap them, or "
                "leave one out."
            )

    @property
    def leaves_floats(self):  # type: ignore
        return self.then.leaves_floats

    def compress(self, x, key):
        first_key, then_key = jax.random.split(key)
        message = self.first.compress(x, first_key)
        nodes, treedef = jax.tree.flatten(message, is_leaf=_is_floats)
        return treedef.unflatten(
            self.then.compress(node.dense(), jax.random.fold_in(then_key, i))
            if _is_floats(node)
            else node
            for i, node in enumerate(nodes)
        )

    def contraction(self, shape):
        return self.first.contraction_before(self.then, shape)

    def __repr__(self):
        then = f"({self.then!r})" if isinstance(self.then, Chain) else repr(self.then)
        return f"{self.first!r} >> {then}"


def _is_floats(node):
    return isinstance(node, Floats)


def _check_fraction(compressor):
    if not 0 < compressor.fraction <= 1:
        raise ValueError(
            f"`fraction` of {type(compressor).__name__} must lie in (0, 1], got "
            f"{compressor.fraction}. It is the share that is kept: 0.15 for 15 %."
        )


def _kept(fraction, size):
    """How many are kept of `size`, as in paper M, Table 2."""
    # 0.15 * 20 is 3.0000000000000004 in one order of products and 2.9999999999999996 in another:
    # a share that is whole but for rounding counts as whole.
    return min(size, max(1, math.floor(fraction * size * (1 + 1e-12))))


def _count(compressor, x):
    if x.size >= 1 << 31:
        raise ValueError(
            f"{compressor!r} cannot index a leaf of shape {x.shape}: {x.size} entries, and "
            "positions are int32. Split the leaf, or stack it along a leading axis."
        )
    return _kept(compressor.fraction, x.size)


def _contraction_of_values(sparse, then, shape):
    # What `then` loses lies on the kept entries, so the two errors are orthogonal:
    # ‖x‖² − ‖x_S‖² + (1 − α')‖x_S‖² = ‖x‖² − α'‖x_S‖². Where the dense array is sent instead, which
    # its dtype decides, `then` acts on all of it.
    of_values = then.contraction((_kept(sparse.fraction, math.prod(shape)),))
    of_dense = then.contraction(shape)
    if of_values is None or of_dense is None:
        return None
    return min(of_values * sparse.contraction(shape), of_dense)


def _largest(flat, count):
    """A packed mask of the `count` entries largest in magnitude, ties to the lower position.

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
    return _packing.pack_mask(above | (tied & first_ties))


def _orthonormal(basis):
    """Columns with the same span and, but for directions lost in rounding, orthonormal."""
    return orthogonalize(basis, polar_express(8))
