"""What a compressor promises, kept for inputs that hypothesis draws; and sizes that nobody holds.

Hypothesis draws recipes, a batch at a time; NumPy makes the arrays from them, and one compiled
program sends them all. So there are few programs and many inputs: some thousands in the default
run, more than 100,000 in the slow one.
"""

import collections
import functools
import math
import re
import zlib
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from registry import BLOCK_COMPRESSORS, COMPRESSORS, STEPS, is_random
from test_compressors import PROJECTIONS, indexed, parts

import ef21_jax as ef21


ALL = COMPRESSORS + BLOCK_COMPRESSORS + STEPS
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype("f2"), jnp.dtype("f8"))
SHAPES = (
    (4, 6),
    (21, 25),  # several blocks of 256
    (2, 6, 5),
    (24,),
    (2, 1, 2, 1, 2, 3, 4),
    (9, 8),
    (24, 1),
    (1, 24),
    (),
    (3, 0),
    (6, 4),
    (1, 1, 1, 1, 1, 1, 3),
    (0,),
    (2, 1, 3, 4),
    (1,),
    (5, 0, 2, 1, 1, 1, 1),
)

# One of each kind, to be joined to one another.
FIRST = (
    ef21.Identity(),
    ef21.Damping(0.5),
    ef21.Dropout(0.5),
    ef21.TopK(0.2),
    ef21.RandK(0.3),
    ef21.ColumnTopK(0.4),
    ef21.RankK(0.3),
    ef21.RankK(0.3, exact=True),
    ef21.RandomSubspace(0.4),
    ef21.NuclearSharp(),
    ef21.L1Sharp(),
    ef21.BlockTopK(2, 8),
    ef21.MaxRowSumSharp(),
)
THEN = (
    ef21.Damping(1.25),
    ef21.Dropout(0.8),
    ef21.TopK(0.3),
    ef21.RandK(0.5),
    ef21.ColumnTopK(0.5),
    ef21.RankK(0.3),
    ef21.RandomSubspace(0.3),
    ef21.Natural(),
    ef21.Natural(nearest=True),
    ef21.BlockTopK(1, 4),
    ef21.BlockNatural(3, 16),
    ef21.Quantize(3, 16),
    ef21.ScaledSign(8),
    ef21.TwoLevel(16),
)
CHAINS = tuple(first >> then for first in FIRST for then in THEN)


# --- Inputs ---


class Recipe(NamedTuple):
    """All that an array is made from, but for its shape and dtype."""

    family: str
    percent: int  # of the way from 1 to the largest power of two, or to the smallest
    seed: int
    special: tuple[float, ...]


FAMILIES = (
    "ordinary",
    "zeros",
    "subnormal",
    "about the smallest normal",
    "about the largest",
    "all the largest",
    "ties",
    "constant",
    "one entry",
    "one row",
    "one column",
    "rank one",
    "flat spectrum",
    "every scale",
    "rows of every scale",
    "special",
    "mostly zero",
)


def made(recipe, shape, dtype):
    """The array of a recipe: float64, exact in `dtype`."""
    info, rng = jnp.finfo(dtype), np.random.default_rng(recipe.seed)
    largest, smallest = float(info.max), float(info.smallest_normal)
    exponents = int(info.minexp), int(info.maxexp) - 4  # so that eight times as much is finite
    scale = 2.0 ** (abs(recipe.percent) * exponents[recipe.percent > 0] // 100)
    normal = np.clip(rng.standard_normal(shape), -4, 4)
    signs = np.where(normal < 0, -1.0, 1.0)
    row, column = np.indices(shape)[-2:] if len(shape) >= 2 else np.zeros((2, *shape), int)
    number = np.arange(normal.size).reshape(shape)
    x = scale * normal
    match recipe.family:
        case "zeros":
            x = 0.0 * signs
        case "subnormal":
            steps = rng.integers(0, 1 << rng.integers(1, info.nmant + 1), shape)
            x = signs * steps * float(info.smallest_subnormal)
        case "about the smallest normal":
            x = smallest * normal * 2.0 ** rng.integers(-2, 12)
        case "about the largest":
            size = rng.uniform(0.25, 1.0, shape) ** rng.integers(0, 3)
            x = signs * size * (largest * 2.0 ** -rng.integers(0, 4))
        case "all the largest":
            x = signs * largest
        case "ties":
            x = signs * scale * rng.choice([1.0, 1.5, 0.75], shape)
        case "constant":
            x = np.full(shape, scale * rng.uniform(-2, 2))
        case "one entry":
            x = np.where(number == rng.integers(max(1, x.size)), x, 0.0)
        case "one row":
            x = np.where(row == np.max(row, initial=0), x, 0.0)
        case "one column":
            x = np.where(column == np.max(column, initial=0) // 2, x, 0.0)
        case "rank one":
            of_row, of_column = rng.uniform(-2, 2, (2, 32))
            x = scale * of_row[row] * of_column[column]
        case "flat spectrum" if len(shape) >= 2 and x.size:
            wide = shape[-2] < shape[-1]
            q = np.linalg.qr(np.swapaxes(normal, -1, -2) if wide else normal)[0]
            x = scale * (np.swapaxes(q, -1, -2) if wide else q)
        case "every scale":
            x = signs * np.exp2(rng.uniform(*exponents, shape))
        case "rows of every scale":
            x = normal * np.exp2(rng.uniform(*exponents, 32))[row]
        case "special":
            x = np.where(rng.uniform(size=shape) < 0.5, rng.choice(recipe.special, shape), x)
        case "mostly zero":
            x = np.where(rng.uniform(size=shape) < 0.1, x, 0.0)
    return np.asarray(np.clip(x, -largest, largest).astype(dtype), np.float64)


BATCH = 64


@strategies.composite
def recipes(draw, dtype, seed):
    """A batch. Even the simplest one that hypothesis draws has arrays of every family."""
    width = 16 if dtype == jnp.float16 else max(32, 8 * dtype.itemsize)
    floats = strategies.floats(allow_nan=False, allow_infinity=False, width=width)
    special = tuple(draw(strategies.lists(floats, min_size=1, max_size=4)))
    seed += draw(strategies.integers(0, 2**32 - 1))
    family, percent = strategies.integers(0, len(FAMILIES) - 1), strategies.integers(-100, 100)
    return [
        Recipe(FAMILIES[(i + draw(family)) % len(FAMILIES)], draw(percent), seed + i, special)
        for i in range(BATCH)
    ]


# --- What is promised ---


def rounding(compressor, dtype):
    """What the loss may exceed 1 − α by, as in test_compressors: of all parts of a chain."""
    eps = float(jnp.finfo(dtype).eps)

    def of_part(part):
        match part:
            case ef21.Damping():
                return 2 * eps
            case ef21.ColumnTopK():
                return 4 * float(jnp.finfo(jnp.float32).eps)
            case ef21.RankK() | ef21.NuclearSharp() | ef21.RandomSubspace():
                return (1.5 * eps) ** 2 + 2e-6
        return 0.0

    return 1e-12 + sum(map(of_part, parts(compressor)))


def rounding_of_a_draw(compressor, dtype):
    """What the loss of one draw may exceed 1 by.

    Of a projection whose coefficients another compressor errs on by as much as all of them, C(x) is
    up to 2 ‖x‖ long and as far from x as zero. Rounding moves it by half an eps of its length, in
    a single draw perhaps straight away from x: to a distance of (1 + eps) ‖x‖.
    """
    first, *then = parts(compressor)
    errs = bool(then) and any(isinstance(p, ef21.RandomSubspace) for p in (first, *then))
    return (1 + float(jnp.finfo(dtype).eps)) ** 2 - 1 if errs else 0.0


CHOOSING = {ef21.Identity, ef21.Dropout, ef21.TopK, ef21.RandK, ef21.L1Sharp, ef21.BlockTopK}


def excepted(compressor, x, exponent, dtype):
    """The length of what the docstrings except from α, of each of the arrays times 2**exponent.

    If C(x) is C(y), or has the same bound, then ‖C(x) − x‖ <= √(1 − α) ‖y‖ + ‖y − x‖, and y − x is
    what is subnormal, or above the limit of a code. What is computed, and not only chosen, is
    rounded by the spacing that its dtype has near zero.
    """
    info = jnp.finfo(dtype)
    wide = jnp.finfo(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    smallest, limit = float(wide.smallest_normal), float(info.max)
    kinds = {type(part) for part in parts(compressor)}
    if kinds <= CHOOSING:
        return norms(times_power(np.where(np.abs(x) < smallest, x, 0.0), exponent))
    if kinds & {ef21.Natural, ef21.BlockNatural}:
        limit = 2.0 ** (info.maxexp - 1)
    elif ef21.Quantize in kinds:
        limit /= 1 + 2**-7
    spacing = max(smallest, float(info.smallest_subnormal))
    near_zero = np.full(len(x), spacing * math.sqrt(math.prod(x.shape[1:])))
    clipped = times_power(x - np.clip(x, -limit, limit), exponent)
    return times_power(near_zero, exponent) + norms(clipped)


def scaled_down(compressor, x, dtype):
    """Which arrays a projection may scale down, lest its product overflow."""
    if not any(isinstance(part, PROJECTIONS) for part in parts(compressor)):
        return np.zeros(len(x), bool)
    short = min(x.shape[-2:]) if x.ndim > 2 else 1
    largest = np.max(np.abs(x.reshape(len(x), -1)), axis=1)
    return largest > float(jnp.finfo(dtype).max) / (4.04 * math.sqrt(short))


def never_expands(compressor):
    """Whether ‖C(x) − x‖ <= ‖x‖ for every draw, and not only for their mean."""
    of = parts(compressor)
    if any(isinstance(part, ef21.MaxRowSumSharp) for part in of):
        return False  # a step
    if any(isinstance(part, ef21.Quantize) and not part.nearest for part in of):
        return False  # a small entry may be off by a scale that is large
    if len(of) > 1 and any(isinstance(part, ef21.RankK | ef21.NuclearSharp) for part in of):
        return False  # errors of both factors
    gain = math.prod(part.factor for part in of if isinstance(part, ef21.Damping))
    return gain * (2 if ef21.Natural() in of else 1) <= 2


def norms(x):
    """Of each of the arrays."""
    return np.sqrt(np.sum(x.reshape(len(x), -1) ** 2, axis=1))


def times_power(x, exponent):
    """Each of the arrays times 2**exponent: exact, but where it overflows."""
    with np.errstate(over="ignore"):
        return np.ldexp(x, exponent.reshape(-1, *(1,) * (x.ndim - 1)))


# --- Sending and looking ---


class Broken(NamedTuple):
    """A promise that was not kept, with all that is needed to see it again."""

    promise: str
    compressor: ef21.Compressor
    dtype: str
    shape: tuple[int, ...]
    recipe: Recipe
    key: str
    by: float


class Tally:
    """How many inputs there were; and what random compressors lost, less what they may on average.

    The latter is kept for each family, and checked once it is complete.
    """

    def __init__(self):
        self.inputs = 0
        self.excess = collections.defaultdict(list)

    def add(self, compressor, recipe, excess):
        """`excess`: shape (draws,)."""
        self.excess[compressor, recipe.family].append(excess)
        self.excess[compressor, "all"].append(excess)

    def broken(self):
        """Where the mean is positive, by an empirical Bernstein bound (Maurer, Pontil 2009).

        Of n independent numbers in a range R the mean exceeds its expectation by more than
        √(2 V l / n) + 7 R l / (3 (n − 1)), V being their variance, with probability 2 exp(−l) at
        most. With l = 24.5 the first term is seven standard errors, and the probability 5e-11.
        R is what was seen. None of the compressors here keeps all or nothing with a chance below
        0.15, and that 200 draws are all of one kind has a chance of 0.85^200 = 8e-15.
        """
        found = []
        for (compressor, family), of_arrays in self.excess.items():
            excess = np.concatenate(of_arrays)
            n = excess.size
            if n < 200:
                continue
            margin = 7 * excess.std(ddof=1) / math.sqrt(n) + 58 * np.ptp(excess) / (n - 1)
            if excess.mean() > margin:
                found.append((compressor, family, n, float(excess.mean()), float(margin)))
        return found


@functools.partial(jax.jit, static_argnums=0)
def compress(compressor, x, keys):
    return jax.vmap(compressor.compress)(x, keys)


@jax.jit
def decode(messages):
    """Compiled apart from `compress`: the other end of the wire."""
    return jax.vmap(ef21.dense)(messages)


def broken(compressor, dtype, shape, batch, draws, tally):
    """Sends a batch and looks at all that comes of it: the promises that were not kept."""
    draws = draws if is_random(compressor) else 1
    x = np.stack([made(recipe, shape, dtype) for recipe in batch])
    with jax.enable_x64(dtype == jnp.float64):
        one = jax.ShapeDtypeStruct(shape, dtype)
        bits = ef21.wire_bits(jax.eval_shape(compressor.compress, one, jax.random.key(0)))
        # The keys are a function of the batch, so that a failure fails again.
        seed = zlib.crc32(repr(batch).encode())
        keys = jax.random.split(jax.random.key(seed), len(x) * draws)
        messages = compress(compressor, jnp.asarray(np.repeat(x, draws, axis=0), dtype), keys)
        leaves = [np.array(leaf) for leaf in jax.tree.leaves(messages)]
        copies = jax.tree.unflatten(jax.tree.structure(messages), map(jnp.asarray, leaves))
        c, again = np.asarray(decode(messages)), np.asarray(decode(copies))
    tally.inputs += len(x)
    found = []

    def promise(name, excess):
        """Kept where `excess`, one or `draws` for each array, is nowhere positive."""
        excess = np.asarray(excess, np.float64).reshape(len(x), -1)
        for i in np.flatnonzero(~np.all(excess <= 0, axis=1)):
            j = int(np.argmax(excess[i]))
            key = f"split(key({seed}), {len(keys)})[{i * draws + j}]"
            case = (compressor, dtype.name, shape, batch[i], key, float(excess[i, j]))
            found.append(Broken(name, *case))

    each = np.zeros(len(x))
    unsigned = all(np.issubdtype(leaf.dtype, np.unsignedinteger) for leaf in leaves)
    promise("only unsigned integers travel", each + (not unsigned))
    weight = sum(leaf.nbytes for leaf in leaves) * 8 / len(keys)
    promise("the wire bits are what the leaves weigh", each + abs(weight - bits))
    dense_bits = math.prod(shape) * dtype.itemsize * 8
    promise("the message weighs no more than the array", each + (bits - dense_bits))
    promise("shape and dtype are kept", each + ((c.shape[1:], c.dtype) != (shape, dtype)))
    promise("what is decoded is a function of the message", each + (c.tobytes() != again.tobytes()))
    if found or math.prod(shape) == 0:
        return found
    c = c.astype(np.float64).reshape(len(x), draws, *shape)
    finite = np.isfinite(c).reshape(len(x), draws, -1).all(axis=2)
    promise("what is finite stays finite", ~finite)
    c = np.where(finite.reshape(len(x), draws, *(1,) * len(shape)), c, 0.0)

    # A loss of 1 is ‖x‖². All is divided by a power of two before it is squared.
    exponent = -np.frexp(np.max(np.abs(x.reshape(len(x), -1)), axis=1))[1]
    unit = times_power(x, exponent)
    size, zero = norms(unit)[:, None], np.all(unit.reshape(len(x), -1) == 0, axis=1)[:, None]
    promise("zero stays zero", zero & np.any(c.reshape(len(x), draws, -1), axis=2))
    error = norms((times_power(c, exponent) - unit[:, None]).reshape(-1, *shape))
    spared = excepted(compressor, x, exponent, dtype)[:, None]
    lost = np.maximum(0.0, error.reshape(len(x), draws) - spared)
    loss = (np.where(zero | ~finite, 0.0, lost) / np.where(zero, 1.0, size)) ** 2
    if never_expands(compressor):
        most = 1 + 1e-6 + rounding_of_a_draw(compressor, dtype)
        promise("no draw is further from x than zero is", loss - most)
    alpha = compressor.contraction(shape)
    if alpha is None:
        return found
    promise("α is in (0, 1]", each + (not 0 < alpha <= 1))
    excess = loss - (1 - alpha + rounding(compressor, dtype))
    tells = ~scaled_down(compressor, x, dtype)
    if not is_random(compressor):
        promise("α holds", np.where(tells[:, None], excess, 0.0))
        return found
    # An array of which nothing much is promised would only hide the others.
    for i in np.flatnonzero(tells & (spared < 0.01 * size)[:, 0]):
        tally.add(compressor, batch[i], excess[i])
    return found


def send_generated(compressor, dtype, shape, batches, draws, tally):
    """Sends `batches` batches that hypothesis draws, each array under `draws` keys."""
    seed = zlib.crc32(repr((compressor, dtype.name, shape)).encode())

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=batches,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # what fails is one array of a batch, and it is named
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(recipes(dtype, seed))
    def generated(batch):
        if math.prod(shape) == 0:
            batch = batch[:2]  # all alike
        found = broken(compressor, dtype, shape, batch, draws, tally)
        assert not found, found

    generated()


@pytest.mark.parametrize("i", range(len(ALL)), ids=lambda i: repr(ALL[i]))
def test_what_is_promised_holds_for_generated_inputs(i):
    tally = Tally()
    send_generated(ALL[i], DTYPES[i % 4], SHAPES[i % 6], 2, 64, tally)
    assert tally.inputs == 2 * BATCH
    assert not tally.broken()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_promised_holds_for_a_hundred_thousand_inputs():
    tally = Tally()
    for i, compressor in enumerate(ALL):
        for j, shape in enumerate(SHAPES[i % 2 :: 2]):
            send_generated(compressor, DTYPES[(i // 2 + j + j // 4) % 4], shape, 5, 16, tally)
        jax.clear_caches()  # of programs that no other compressor needs
    for i, chain in enumerate(CHAINS):
        row, column = divmod(i, len(THEN))
        send_generated(
            chain, DTYPES[(row + column) % 4], SHAPES[(row + 3 * column) % 7], 2, 32, tally
        )
        if column == 0:
            jax.clear_caches()
    assert tally.inputs >= 100_000
    assert not tally.broken()
    print(f"{tally.inputs} inputs")


# --- Sizes that nobody holds ---

LARGE = ((2**16, 2**15 + 8), (2**31 + 8,), (2**33,), (3, 2**31))
SMALLER = ((2**11, 2**10 + 8), (2**21 + 8,), (2**23,), (3, 2**21))  # by 2**10
SOME_CHAINS = CHAINS[:: len(THEN) - 1]


@pytest.mark.parametrize("compressor", ALL + SOME_CHAINS, ids=repr)
def test_messages_past_two_to_the_31_are_right_in_size_or_refused(compressor):
    key = jax.random.key(0)

    def there_and_back(x, key):
        message = compressor.compress(x, key)
        return ef21.dense(message), message

    for shape, smaller in zip(LARGE, SMALLER, strict=True):
        leaf, small = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape, smaller))
        try:
            program, out = jax.make_jaxpr(there_and_back, return_shape=True)(leaf, key)
        except ValueError as error:
            assert re.search(r"\d{10}", str(error)) and "plit the leaf" in str(error)
            continue
        assert (out[0].shape, out[0].dtype) == (shape, jnp.bfloat16)
        for size, dtype in indexed(program.jaxpr):
            assert size <= jnp.iinfo(dtype).max + 1, shape
        # No part of the message grows by less than nothing, nor by more than the leaf does.
        of_small = jax.tree.leaves(jax.eval_shape(compressor.compress, small, key))
        for large_part, part in zip(jax.tree.leaves(out[1]), of_small, strict=True):
            assert large_part.dtype == part.dtype
            assert part.size <= large_part.size <= 1.01 * 2**10 * part.size
