"""Compressors: pure functions of an array and a key, to a message.

Each is a frozen dataclass with one verb, `compress(x, key)`. None of them holds state, and none
communicates. They are not callable, since `optax.inject_hyperparams` takes any callable for a
schedule.

α is the contraction factor: E‖C(x) − x‖² <= (1 − α)‖x‖² (paper M, Definition 1). The docstrings
give that of the Euclidean norm, the family B_2(α). `contraction(shape, norm)` gives the one in the
norm of a layer, B(α); for B_*(α) pass the norm that is dual to it: `Nuclear()` for `Spectral()`,
`L1()` for `Sign()`, `Mixed(p*, q*)` for `Mixed(p, q)`.

It holds for entries that are zero or normal floats, of float32 for narrower ones: any that is
subnormal may become zero. What is computed, and not only chosen, is rounded by the spacing of its
dtype: near zero, in float16, that may be much of it.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from ._dtypes import without_overflow
from ._geometry import (
    Geometry,
    entry_exponent,
    from_euclidean,
    is_stack,
    mixed_exponents,
    squared,
)
from ._messages import Floats, Message, PowersOfTwo, Sometimes, wire_bits
from ._random import noise_bits
from ._tables import brief


class Compressor(abc.ABC):
    """From an array to a message that stands for something near it.

    Attributes:
      unbiased: E C(x) = x.
      entrywise: it treats each entry by itself, with errors independent of each other, and its α
        holds for each of them.
      leaves_floats: the message holds floats that a compressor after this one (`>>`) can take on.
      shared: all workers draw alike, so that the network can add up their messages.
      numbers: None; of a stack of layers (`CompressEach`), the numbers of the leaves they were.
    """

    unbiased: bool = False
    entrywise: bool = False
    leaves_floats: bool = True
    shared: bool = False
    numbers: tuple[int, ...] | None = None

    @abc.abstractmethod
    def compress(self, x: jax.Array, key: jax.Array) -> Message:
        """The message for `x`.

        Args:
          x: any shape, floating.
          key: a typed PRNG key. Deterministic compressors ignore it. For a `shared` compressor it
            must be the same at all workers.
        """

    @abc.abstractmethod
    def contraction(self, shape: tuple[int, ...], norm: Geometry | None = None) -> float | None:
        """The α this compressor is sure of for arrays of `shape`. None where none is proved.

        Args:
          shape: of a leaf.
          norm: the one α is meant in, for each matrix of the leaf. None is the Euclidean norm of
            the whole leaf.
        """

    def contraction_before(
        self, then: "Compressor", shape: tuple[int, ...], norm: Geometry | None = None
    ) -> float | None:
        """The α of `self >> then`."""
        del then, shape, norm
        return None

    def __rshift__(self, then: "Compressor") -> "Compressor":
        """`first >> then` compresses the floats in the first's message with the second."""
        return Chain(self, then)

    def __repr__(self):
        return brief(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(Compressor):
    """Sends `x` itself. α = 1, in every norm."""

    unbiased = True
    entrywise = True

    def compress(self, x, key):
        del key
        return Floats.of(x)

    def contraction(self, shape, norm=None):
        del shape, norm
        return 1.0

    def contraction_before(self, then, shape, norm=None):
        return then.contraction(shape, norm)


@dataclasses.dataclass(frozen=True, repr=False)
class Damping(Compressor):
    """γ x (paper M, Definition 8). α = 1 − (1 − γ)², in every norm.

    It saves nothing. What would overflow becomes the largest float.

    Raises:
      ValueError: unless 0 < γ < 2.
    """

    factor: float

    entrywise = True

    def __post_init__(self):
        if not 0 < self.factor < 2:
            raise ValueError(f"`factor` of Damping must lie in (0, 2), got {self.factor}.")

    def compress(self, x, key):
        del key
        return Floats.of(without_overflow(x * jnp.asarray(self.factor, x.dtype), x))

    def contraction(self, shape, norm=None):
        del shape, norm
        return 1 - (1 - self.factor) ** 2

    def contraction_before(self, then, shape, norm=None):
        # x − C(γx) is (1 − γ) x and γx − C(γx): orthogonal on average, where that is unbiased.
        alpha = then.contraction(shape, norm)
        if alpha is None:
            return None
        withheld, lost = abs(1 - self.factor), self.factor * math.sqrt(1 - alpha)
        orthogonal = then.unbiased and entry_exponent(norm) == 2
        alpha = 1 - (withheld**2 + lost**2 if orthogonal else (withheld + lost) ** 2)
        return alpha if alpha > 0 else None


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(Compressor):
    """`x` with a probability, else zero, all of it (paper M, Definition 9). α = p, in every norm.

    Also known as the Bernoulli compressor; not scaled by 1 / p, hence biased. Messages have one
    size here, and zeros are sent as they are: it saves nothing on the wire, and only
    `PaperConvention` counts what it saves on average.

    Raises:
      ValueError: unless 0 < probability <= 1.
    """

    probability: float

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"`probability` of Dropout must lie in (0, 1], got {self.probability}. It is that "
                "of sending."
            )

    def compress(self, x, key):
        keep = jax.random.bernoulli(key, self.probability)
        return Sometimes(Floats.of(jnp.where(keep, x, jnp.zeros_like(x))), self.probability)

    def contraction(self, shape, norm=None):
        del shape, norm
        return self.probability

    def contraction_before(self, then, shape, norm=None):
        alpha = then.contraction(shape, norm)
        return None if alpha is None else self.probability * alpha


@dataclasses.dataclass(frozen=True, repr=False)
class Natural(Compressor):
    """Rounds to a power of two and sends a byte for each: a sign and seven bits of exponent.

    At random and without bias (Horváth et al. 2022): α = 7/8, in every ℓ_{p,q} norm with p, q <= 2.
    Or to the `nearest`, at most a third of the entry away: α = 8/9, in every absolute norm.

    Exponents count down from the largest in the leaf; 127 binades are kept, and what is smaller
    than 2**-126 of the largest entry, or subnormal, becomes zero. What would round up past the
    largest finite power of two becomes that power. α holds up to both. Where the dense array would
    weigh no more (two entries of 16 bits, or none at all), that is sent.

    Raises:
      ValueError: if random, for a leaf of 2**32 entries or more.
    """

    nearest: bool = False

    entrywise = True
    leaves_floats = False

    @property
    def unbiased(self):  # type: ignore
        return not self.nearest

    def compress(self, x, key):
        noise = None if self.nearest else noise_bits(key, x.shape)
        message = PowersOfTwo.of(x, noise)
        return message if wire_bits(message) < wire_bits(Floats.of(x)) else Floats.of(x)

    def contraction(self, shape, norm=None):
        if self.nearest:
            absolute = norm is None or norm.absolute
            return 8 / 9 if absolute else from_euclidean(8 / 9, shape, norm)
        # The errors' root mean squares are at most √(1/8) of the entries, and ‖E ·²‖^½, of entries,
        # exceeds (E‖·‖²)^½ where both exponents are at most two (Minkowski).
        exponents = mixed_exponents(norm)
        bounded = exponents is not None and max(exponents[:2]) <= 2
        return 7 / 8 if bounded else from_euclidean(7 / 8, shape, norm)


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
        if self.first.shared != self.then.shared:
            raise ValueError(
                f"{self.first!r} >> {self.then!r}: only where both are shared do such messages "
                "add up. Leave out `shared`."
            )

    @property
    def shared(self):  # type: ignore
        return self.first.shared

    @property
    def unbiased(self):  # type: ignore
        return self.first.unbiased and self.then.unbiased

    @property
    def entrywise(self):  # type: ignore
        return self.first.entrywise and self.then.entrywise

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

    def contraction(self, shape, norm=None):
        return self.first.contraction_before(self.then, shape, norm)

    def __repr__(self):
        then = f"({self.then!r})" if isinstance(self.then, Chain) else repr(self.then)
        return f"{self.first!r} >> {then}"


def _is_floats(node):
    return isinstance(node, Floats)


def check_fraction(compressor: Compressor, fraction: float) -> None:
    """Raises a ValueError unless 0 < fraction <= 1."""
    if not 0 < fraction <= 1:
        raise ValueError(
            f"`fraction` of {type(compressor).__name__} must lie in (0, 1], got {fraction}. It is "
            "the share that is kept: 0.15 for 15 %."
        )


def check_indexable(compressor: Compressor, shape: tuple[int, ...], entries: int) -> None:
    """Raises a ValueError where an int32 cannot tell one entry from another."""
    if entries >= 1 << 31:
        raise ValueError(
            f"{compressor!r} cannot index a leaf of shape {shape}: {entries} places, and positions "
            "are int32. Split the leaf, or stack it along a leading axis."
        )


def kept(fraction: float, size: int) -> int:
    """How many are kept of `size`, as in paper M, Table 2."""
    # 0.15 * 20 is 3.0000000000000004 in one order of products and 2.9999999999999996 in another:
    # a share that is whole but for rounding counts as whole.
    return min(size, max(1, math.floor(fraction * size * (1 + 1e-12))))


def contraction_of_values(
    share: float,
    then: Compressor,
    values: tuple[int, ...],
    shape: tuple[int, ...],
    norm: Geometry | None,
) -> float | None:
    """The α of sending a part of the entries, as `then` compresses them.

    What `then` loses lies on the entries that are kept, and what is not kept lies elsewhere. So of
    Σ|x|^p there is lost all but `share`, and of this what `then` loses, by its α' no more than
    (1 − α')^(p/2): a share (1 − (1 − α')^(p/2)) of it stays. This is α for p = 2, and the square
    of an ℓp norm falls by no less a share for p < 2. Where the dense array is sent instead, which
    its dtype decides, `then` acts on all of it.

    Args:
      share: what of Σ|x|^p is kept, at least, or in expectation.
      then: what acts on the values.
      values: their shape.
      shape: that of the leaf.
      norm: ℓp of the entries with p <= 2; None is returned for others.
    """
    p = entry_exponent(norm)
    if p is None or p > 2 or (norm is not None and is_stack(shape)):
        return None
    of_values = then.contraction(values, norm)
    of_dense = then.contraction(shape, norm)
    if of_values is None or of_dense is None:
        return None
    stays = squared(of_values, p / 2)
    return None if stays is None else min(share * stays, of_dense)
