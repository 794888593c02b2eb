"""Compressors that work block by block: the largest of each group, and a few bits an entry.

Beyond the papers. None sorts, none factors, and each reads its input a few times at most. They
combine: `BlockTopK() >> BlockNatural()` keeps one entry of sixteen in half a bit a parameter.

α and ω hold for entries that are zero or normal floats, of float32 for narrower ones: those that
are subnormal become zero. In float16, what is decoded is rounded to its spacing near zero.
"""

import dataclasses
import math

from ._block_messages import BlockCodes, BlockSparse
from ._blocks import Runs, Skewed
from ._codes import Integers, Powers, Signs, TwoLevels
from ._compressors import Compressor, check_indexable, contraction_of_values
from ._geometry import entry_exponent, from_euclidean, is_stack, squared
from ._messages import Floats, wire_bits
from ._random import noise_bits


@dataclasses.dataclass(frozen=True, repr=False)
class BlockTopK(Compressor):
    """Keeps the `count` entries largest in magnitude of each group of `block`. α = count / block.

    The groups are skewed: a constant stride apart, so that their members differ in row and column
    (see `Skewed`). Then little is lost against the same share taken from the whole: one of 16
    captures 0.85 of what that would or more, 16 of 256 captures 0.98, and both take a pass or
    some passes instead of a sort. A position is one in its group: four bits for 16, eight for 256.
    Of equals the lower position is kept; where count > 1, entries are equals that differ by less
    than one part in 2^16.

    A small array has groups that are smaller, and α is count over the largest. In ℓp of the entries
    of one matrix, α = 1 − (1 − count / block)^(2/p). Where the dense array would weigh no more,
    that is sent.

    Raises:
      ValueError: unless 1 <= count < block <= 256; or for a leaf of 2**31 entries or more.
    """

    count: int = 1
    block: int = 16

    def __post_init__(self):
        _check_integer(self, "block", 2, 256)
        _check_integer(self, "count", 1, self.block - 1)

    def compress(self, x, key):
        del key
        if x.size == 0:
            return Floats.of(x)
        check_indexable(self, x.shape, x.size)
        return _lighter(BlockSparse.of(x, self.count, self.block), x)

    def contraction(self, shape, norm=None):
        if norm is not None and is_stack(shape):
            return None  # a group has members in several of the matrices
        p, share = entry_exponent(norm), self._share(shape, norm)
        return from_euclidean(share, shape, norm) if p is None else squared(share, 2 / p)

    def contraction_before(self, then, shape, norm=None):
        if math.prod(shape) == 0:
            return then.contraction(shape, norm)
        skewed = Skewed(math.prod(shape), self.block)
        count = min(self.count, skewed.depth)
        values = (skewed.groups,) if count == 1 else (count, skewed.groups)
        return contraction_of_values(self._share(shape, norm), then, values, shape, norm)

    def _share(self, shape, norm):
        """What of Σ|x|^p is kept, at least; of Σx² for other norms."""
        size = math.prod(shape)
        if size == 0:
            return 1.0
        depth = Skewed(size, self.block).depth
        count = min(self.count, depth)
        # An entry that is left out may exceed one that is kept by as much as `BlockSparse` ignores.
        excess = 1 + BlockSparse.resolution(count, depth)
        return count / (count + (depth - count) * excess ** (entry_exponent(norm) or 2))


class _Coded(Compressor):
    """A code with a scale for each run of `block` neighbours."""

    leaves_floats = False
    block: int

    def _code(self):
        raise NotImplementedError

    def _noise(self, key, shape):
        del key, shape
        return None

    def compress(self, x, key):
        if x.size == 0:
            return Floats.of(x)
        return _lighter(BlockCodes.of(x, self._code(), self.block, self._noise(key, x.shape)), x)

    def contraction(self, shape, norm=None):
        size = math.prod(shape)
        if size == 0:
            return 1.0
        if norm is not None and is_stack(shape):
            return None  # a run may have entries of two of the matrices
        alpha = self._alpha(Runs(size, self.block).length)
        return None if alpha is None else from_euclidean(alpha, shape, norm)

    def _alpha(self, length):
        """α for one run of `length` entries. What holds for each run holds for all of them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, repr=False)
class BlockNatural(_Coded):
    """Rounds to the nearest of zero and a few powers of two, a sign and an exponent of few bits.

    With b bits there are L = 2^(b−1) − 1 powers, counted down from the one nearest to the largest
    of the `block`. α = (8/9) / (1 + (block − 1) / (3 · 2^(L−2))²): 0.8649 for four bits in blocks
    of 256, which take 4.06 bits an entry with their scales. As `Natural`, what would round up past
    the largest finite power of two becomes that power.

    Raises:
      ValueError: unless 2 <= bits <= 8 and block >= 1.
    """

    bits: int = 4
    block: int = 256

    def __post_init__(self):
        _check_integer(self, "bits", 2, 8)
        _check_integer(self, "block", 1)

    def _code(self):
        return Powers(self.bits)

    def _alpha(self, length):
        # Let 2u be the smallest power. An entry from 1.5 u on is off by a third of it at most, as
        # the largest one, M, is; so its squared error exceeds x²/9 by nothing. One below is off
        # by min(|x|, 2u − |x|), whose square exceeds x²/9 by at most (8/9) min(x², u²). With
        # S = Σ min(x², u²) over all but the largest, the share that is lost is at most
        # 1/9 + (8/9) S / (M² + S), and S <= (length − 1) u². The largest power, 2^L u, is nearest
        # to M, so M >= (3/4) 2^L u. Attained by M = (3/4) 2^L u and all else just below u.
        ratio = 0.75 * 2.0 ** Powers(self.bits).levels
        return 8 / 9 / (1 + (length - 1) / ratio**2)


@dataclasses.dataclass(frozen=True, repr=False)
class Quantize(_Coded):
    """Rounds to integers of `bits` bits times a scale: the largest of the block over the most.

    At random and without bias, with E‖C(x) − x‖² <= `omega` ‖x‖²; or to the `nearest`. α = 1 − ω
    where ω < 1. In blocks of 256: ω is 0.0043, 0.77 and 7.7 for 8, 4 and 2 bits (the last does not
    contract by itself); to the nearest α is 0.995, 0.42 and 0.007.

    A scale takes 16 bits, rounded up, so that no entry exceeds the range. Entries within one part
    in 128 of the largest float may be clipped, and those within 2^bits of the smallest normal one
    are rounded to multiples of it.

    Raises:
      ValueError: unless 2 <= bits <= 8 and block >= 1.
    """

    bits: int = 8
    block: int = 256
    nearest: bool = False

    def __post_init__(self):
        _check_integer(self, "bits", 2, 8)
        _check_integer(self, "block", 1)

    @property
    def unbiased(self):  # type: ignore
        return not self.nearest

    def _code(self):
        return Integers(self.bits)

    def _noise(self, key, shape):
        return None if self.nearest else noise_bits(key, shape)

    def _alpha(self, length):
        omega = self._omega(length)
        return 1 - omega if omega < 1 else None

    def omega(self, shape: tuple[int, ...]) -> float:
        """ω of E‖C(x) − x‖² <= ω‖x‖², in Euclidean norm, for arrays of `shape`."""
        size = math.prod(shape)
        return self._omega(Runs(size, self.block).length) if size else 0.0

    def _omega(self, length):
        # In units of the scale: the largest entry is between `most` and L, for the scale was
        # rounded up by at most one part in 128. Let φ(y) be the squared error of an entry y: of the
        # largest at most `of_most`. Of the others φ has period one, so the worst quotient
        # (Σ φ(y)) / (most² + Σ y²) has them in [0, 1], and all equal.
        most = Integers(self.bits).levels / (1 + 2**-7)
        gap = Integers(self.bits).levels - most
        others = length - 1
        if self.nearest:  # φ = min(y, 1 − y)²: the worst is y = 1/2
            of_most = min(gap, 0.5) ** 2
            exact = (of_most + others / 4) / (most**2 + others / 4)
        else:  # φ = y (1 − y): the worst is y = √(c² + c) − c with c = most² / others
            of_most = gap * (1 - gap) if gap < 0.5 else 0.25
            exact = of_most / most**2
            if others:
                c = most**2 / others
                y = math.sqrt(c * c + c) - c
                exact += y * (1 - y) / (c + y * y)
        # A product of an integer and the scale is rounded to as little as a bfloat16.
        root = math.sqrt(exact)
        return (root + 2**-9 * (1 + root)) ** 2


@dataclasses.dataclass(frozen=True, repr=False)
class ScaledSign(_Coded):
    """The sign times the mean magnitude of the `block`: one bit. α = 1 / block.

    What is kept of a block is ‖x‖₁² / (d ‖x‖₂²) of ‖x‖₂² for d entries: all of it where the
    magnitudes are equal, 2/π of it for a Gaussian. A block of zeros is zero; a zero in another
    block becomes plus the mean, as a positive entry does. The mean takes 16 bits, rounded down.

    Raises:
      ValueError: unless 1 <= block <= 2**14.
    """

    block: int = 256

    def __post_init__(self):
        _check_integer(self, "block", 1, 1 << 14)

    def _code(self):
        return Signs()

    def _alpha(self, length):
        # Let S be d times what is sent for the mean. Of d ‖x‖₂² there is kept 2 ‖x‖₁ S − S², which
        # is ‖x‖₁² − (‖x‖₁ − S)². S is off by one part in 2^7 at most, for the 16 bits, and by L for
        # the sum of integers, in which each entry but the largest, M, is off by no more than
        # itself and M / d: so L² <= M L <= (‖x‖₁² − ‖x‖₂²) / 2. At least (1 − 2^−13) ‖x‖₂² is kept.
        return (1 - 2**-13) / length


@dataclasses.dataclass(frozen=True, repr=False)
class TwoLevel(_Coded):
    """The sign and one of two magnitudes of the `block`: two bits. α = 1/16.

    Which magnitudes, and which entries get the higher one, is chosen to lose as little as can be
    (see `TwoLevels`); 0.88 of a Gaussian is kept, and 0.978 of the largest of each 16. A block of
    zeros is zero; a zero in another block becomes plus the lower magnitude.

    Raises:
      ValueError: unless 1 <= block <= 256.
    """

    block: int = 256

    def __post_init__(self):
        _check_integer(self, "block", 1, 256)

    def _code(self):
        return TwoLevels()

    def _alpha(self, length):
        # In units in which the largest entry, M, is one, let n_j entries be of τ_j = 2^(−j/2) or
        # more, j = 0, ..., 15. To send the mean of those captures (Σ|x|)² / n_j >= n_j τ_j² of
        # ‖x‖². Let C be the most that any j captures. Those with τ_j <= |x| < τ_(j−1) = √2 τ_j are
        # n_j − n_(j−1); summed by parts,
        #     ‖x‖² <= n_0 + Σ (n_j − n_(j−1)) τ_(j−1)² + length τ_15²
        #          <= Σ n_j (τ_(j−1)² − τ_j²) + length τ_15² <= 15 C + 256 · 2^−15 C.
        # What is sent in place of the mean is off by 2^−5, for five bits, and 2^−7, for sums of
        # integers, of which the square is lost; so is less than one of the 16 in all, with what
        # the thresholds lack of their values as integers. Sending low captures nothing negative.
        del length
        return 1 / 16


def _lighter(message, x):
    return message if wire_bits(message) < wire_bits(Floats.of(x)) else Floats.of(x)


def _check_integer(compressor, name, least, most=None):
    value = getattr(compressor, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        fits = False
    else:
        fits = most is None or value <= most
    if not fits:
        bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ValueError(
            f"`{name}` of {type(compressor).__name__} must be an integer {bounds}, got {value!r}."
        )
