import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import BLOCK_COMPRESSORS, with_spectrum

import ef21_jax as ef21
from ef21_jax._blocks import Runs, Skewed
from ef21_jax._messages import Floats


KEY = jax.random.key(0)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SIZE = 1023  # four runs of 256, and 64 groups of 16 or 15; one size, so that programs are shared
LARGE = (768, 3072)


@functools.partial(jax.jit, static_argnums=0)
def _sent(compressor, x, key):
    message = compressor.compress(x, key)
    return message, message.dense()


def sent(compressor, x, dtype=jnp.float32, key=KEY):
    """`x` in `dtype`, the message, and what it stands for; the arrays in float64."""
    x = jnp.asarray(x, dtype)
    message, expanded = _sent(compressor, x, key)
    assert (expanded.shape, expanded.dtype) == (x.shape, dtype)
    return np.asarray(x, np.float64), message, np.asarray(expanded, np.float64)


def alpha(x, c):
    """1 − ‖C(x) − x‖² / ‖x‖²."""
    return 1 - np.sum((c - x) ** 2) / np.sum(x**2)


def inputs(size, normal=2.0**-8):
    """What runs of 256 are hard to code for: float64 arrays of shape (size,), by name.

    No entry is smaller than `normal` but for zeros.
    """
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size)
    i = np.arange(1, size + 1)
    x = {
        "gaussian": rng.normal(size=size),
        "student": rng.standard_t(2.1, size),
        "wide": signs * 2.0 ** rng.uniform(-12, 12, size),
        "mostly zero": rng.normal(size=size) * (rng.uniform(size=size) < 0.02),
        "ones": signs,
        "one": np.where(i % 256 == 7, 5.0, 0.0),
        "roots": signs * (np.sqrt(i % 256 + 1) - np.sqrt(i % 256)),
        "geometric": signs * 2.0 ** -(i % 11),
        "halfway": signs * 1.5 * 2.0 ** -(i % 3),
        "zero": np.zeros(size),
    }
    return {name: np.where(abs(a) < normal, np.sign(a) * normal, a) for name, a in x.items()}


def runs(x, block=256):
    """The runs, without padding."""
    length = Runs(x.size, block).length
    flat = x.ravel()
    return [flat[at : at + length] for at in range(0, x.size, length)]


# --- The largest of each group ---


def largest_of_groups(x, count, block, bits):
    """By definition: a stable sort of each group, on magnitudes of so many bits of mantissa."""
    groups = Skewed(x.size, block).groups
    kept = np.zeros(x.size)
    flat = x.ravel()
    fraction, exponent = np.frexp(np.abs(flat))
    size = np.ldexp(np.floor(fraction * 2.0 ** (bits + 1)), exponent)
    for group in range(groups):
        members = np.arange(group, x.size, groups)
        best = members[np.argsort(-size[members], kind="stable")[:count]]
        kept[best] = flat[best]
    return kept.reshape(x.shape)


@pytest.mark.parametrize(
    "count, block, shape, dtype",
    [
        (1, 16, (SIZE,), jnp.float32),
        (1, 16, (SIZE,), jnp.bfloat16),
        (1, 16, (SIZE,), jnp.float16),
        (2, 16, (33, 40), jnp.float32),
        (16, 256, (25, 62), jnp.float32),
        (16, 256, (SIZE,), jnp.bfloat16),
        (1, 64, (700,), jnp.float32),
        (3, 4, (1, 9), jnp.float32),
    ],
)
def test_block_topk_keeps_the_largest_of_each_group_and_the_first_of_equals(
    count, block, shape, dtype
):
    exact = dtype != jnp.float32 or count == 1 and block <= 32
    rng = np.random.default_rng(1)
    for x in (rng.normal(size=shape), rng.choice([-1.5, 1.5, 0.5], shape), np.zeros(shape)):
        x, _, c = sent(ef21.BlockTopK(count, block), x, dtype)
        np.testing.assert_array_equal(c, largest_of_groups(x, count, block, 23 if exact else 16))


def test_several_of_nearly_equal_entries_are_ranked_to_sixteen_bits():
    size = 1550  # groups of up to 222, so that the words have eight bits for a row
    groups = Skewed(size, 256).groups
    x = np.zeros(size)
    x[0], x[groups], x[2 * groups] = 1.0, 1 + 2**-17, 1 - 2**-17  # 1.0, then one taken for it
    x[1], x[1 + groups], x[1 + 2 * groups] = 1.0, 1 + 2**-15, 2.0
    x[3 * groups] = 2.0
    given = x
    x, _, c = sent(ef21.BlockTopK(2, 256), given)
    kept = [0, 1 + groups, 1 + 2 * groups, 3 * groups]
    np.testing.assert_array_equal(np.flatnonzero(c), sorted(kept))
    np.testing.assert_array_equal(c, largest_of_groups(x, 2, 256, 16))
    # One alone is found exactly.
    given = np.where(given == 2, 0, given)
    x, _, c = sent(ef21.BlockTopK(1, 256), given)
    np.testing.assert_array_equal(np.flatnonzero(c), [groups, 1 + groups])


def energy_families(shape):
    """The six kinds of matrix on which plain blocks fail or do not."""
    rng = np.random.default_rng(0)
    m, n = shape
    gaussian = rng.normal(size=shape)
    return {
        "gaussian": gaussian,
        "student 3": rng.standard_t(3, shape),
        "student 2.1": rng.standard_t(2.1, shape),
        "columns": gaussian * rng.lognormal(0, 1.5, (1, n)),
        "rows": gaussian * rng.lognormal(0, 1.5, (m, 1)),
        "spectrum": with_spectrum(shape, 1.0 / np.arange(1, m + 1)),
    }


@pytest.mark.parametrize("count, block, share", [(1, 16, 0.85), (16, 256, 0.98)])
def test_skewed_groups_capture_nearly_what_the_whole_would(count, block, share):
    for name, x in energy_families((128, 512)).items():
        x, _, c = sent(ef21.BlockTopK(count, block), x)
        best = np.sort((x**2).ravel())[-(x.size // 16) :].sum()
        assert np.sum(c**2) >= share * best, name


# --- The codes, by their definitions ---


def nearest_power_of_few(x, levels):
    """The nearest of 0 and `levels` powers of two down from the one nearest to the largest."""
    c = np.zeros_like(x)
    if not np.any(x):
        return c
    fraction, exponent = np.frexp(np.max(np.abs(x)))
    top = exponent if fraction >= 0.75 else exponent - 1
    book = np.concatenate([[0.0], 2.0 ** np.arange(top - levels + 1.0, top + 1)])
    for i, value in enumerate(np.abs(x)):
        distance = np.abs(book - value)
        c[i] = book[np.flatnonzero(distance == distance.min())[-1]]  # the upper of two
    return np.copysign(c, x)


@pytest.mark.parametrize(
    "bits, block, dtype",
    [(4, 256, jnp.float32), (4, 256, jnp.bfloat16), (4, 256, jnp.float16), (3, 64, jnp.float32)],
)
def test_block_natural_is_the_nearest_of_a_few_powers_of_two(bits, block, dtype):
    for name, x in inputs(SIZE).items():
        x, _, c = sent(ef21.BlockNatural(bits, block), x, dtype)
        wanted = [nearest_power_of_few(run, 2 ** (bits - 1) - 1) for run in runs(x, block)]
        np.testing.assert_array_equal(c, np.concatenate(wanted), name)


def rounded_up(x):
    """To a bfloat16, that is to eight significant bits."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.ceil(fraction * 256) / 256, exponent)


@pytest.mark.parametrize(
    "bits, dtype",
    [(8, "float32"), (4, "float32"), (2, "float32"), (3, "float32")]
    + [(8, "bfloat16"), (4, "float16")],
)
def test_quantize_rounds_to_multiples_of_a_scale(bits, dtype):
    dtype = jnp.dtype(dtype)
    levels = 2 ** (bits - 1) - 1
    for name, x in inputs(SIZE).items():
        for nearest in (True, False):
            x, message, c = sent(ef21.Quantize(bits, nearest=nearest), x, dtype)
            for run, got, bits_of_scale in zip(runs(x), runs(c), message.scales, strict=True):
                scale = (np.asarray(bits_of_scale, np.uint32) << 16).view(np.float32)[0]
                exact = np.abs(run).max() / levels
                assert rounded_up(exact) <= scale <= rounded_up(exact * (1 + 2**-22))
                off = np.abs(got - run)
                spacing = np.abs(got) * float(jnp.finfo(dtype).eps) / 2
                assert np.all(off <= scale * (1 / 2 if nearest else 1) * (1 + 1e-5) + spacing)
                integers = got / scale if scale else got
                wrong = np.abs(integers - np.round(integers)) * scale
                assert np.all(wrong <= spacing + 1e-5 * scale), name


@pytest.mark.parametrize(
    "block, dtype",
    [(256, jnp.float32), (256, jnp.bfloat16), (256, jnp.float16), (100, jnp.float32)],
)
def test_scaled_sign_is_the_sign_times_the_mean_magnitude(block, dtype):
    for name, x in inputs(SIZE).items():
        x, _, c = sent(ef21.ScaledSign(block), x, dtype)
        for run, got in zip(runs(x, block), runs(c, block), strict=True):
            mean = np.abs(run).mean()
            assert len(set(np.abs(got))) == 1, name
            assert mean * (1 - 2**-7) * (1 - 1e-4) <= np.abs(got[0]) <= mean, name
            np.testing.assert_array_equal(got < 0, (run < 0) & (mean > 0))


def best_two_levels(x):
    """The most that two magnitudes capture: of all ways to cut the sorted run."""
    size = np.sort(np.abs(x))[::-1]
    above, number = np.cumsum(size), np.arange(1, x.size + 1)
    below = above[-1] - above
    captured = above**2 / number + below**2 / np.maximum(x.size - number, 1)
    return captured.max() / max(np.sum(x**2), 1e-300)


@pytest.mark.parametrize(
    "block, dtype",
    [(256, jnp.float32), (256, jnp.bfloat16), (256, jnp.float16), (100, jnp.float32)],
)
def test_two_level_keeps_nearly_what_the_best_two_magnitudes_do(block, dtype):
    for name, x in inputs(SIZE).items():
        x, _, c = sent(ef21.TwoLevel(block), x, dtype)
        for run, got in zip(runs(x, block), runs(c, block), strict=True):
            if not np.any(run):
                assert not np.any(got)
                continue
            levels = sorted(set(np.abs(got)))
            assert len(levels) <= 2
            assert np.min(np.abs(run)[np.abs(got) == levels[-1]]) >= np.max(
                np.abs(run)[np.abs(got) < levels[-1]], initial=0.0
            )
            assert np.all(got * run >= 0) and np.all(got[run == 0] >= 0)
            assert alpha(run, got) >= 0.95 * best_two_levels(run), name
            # High is the mean of those that are high, in five bits; low is of a grid below it.
            high, low = levels[-1], levels[0]
            mean = np.abs(run)[np.abs(got) == high].mean()
            assert abs(high - mean) <= 0.04 * mean
            assert math.frexp(high)[0] * 32 % 1 == 0
            r = 16 * math.sqrt(low / high)
            assert abs(r - round(r)) <= 0.05 and (low == high or r < 15.1)


# --- α ---


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_every_block_compressor_contracts_by_its_alpha(compressor):
    bound = compressor.contraction((SIZE,))
    for dtype in DTYPES:
        for name, x in inputs(SIZE).items():
            x, _, c = sent(compressor, x, dtype)
            assert np.all(np.isfinite(c))
            if name == "zero":
                assert np.all(c == 0)
            elif bound is not None:
                # One draw of those that are random: on these inputs the bound leaves room for it.
                assert alpha(x, c) >= bound - 1e-9, (name, dtype)


def test_alpha_of_block_natural_is_attained_and_no_worse():
    assert ef21.BlockNatural().contraction(LARGE) == pytest.approx(8 / 9 / (1 + 255 / 96**2))
    assert ef21.BlockNatural().contraction(LARGE) >= 0.86
    chain = ef21.BlockTopK() >> ef21.BlockNatural()
    assert chain.contraction(LARGE) >= 0.86 / 16
    u = 1.0
    worst = np.full(256, u * (1 - 1e-6))
    worst[17] = 96 * u
    x, _, c = sent(ef21.BlockNatural(), worst)
    assert np.count_nonzero(c) == 1
    assert alpha(x, c) == pytest.approx(ef21.BlockNatural().contraction((256,)), abs=1e-5)
    # Entries of any size below the largest: none do worse.
    rng = np.random.default_rng(0)
    low = rng.uniform(0.25, 4, (200, 1)) * np.ones((1, 256))
    for x in (
        low,
        low * rng.uniform(0.5, 1, low.shape),
        low * 2.0 ** -rng.integers(0, 9, low.shape),
    ):
        x[:, 99] = rng.uniform(64, 128, 200)
        x, _, c = sent(ef21.BlockNatural(), x)
        lost = np.sum((c - x) ** 2, axis=1) / np.sum(x**2, axis=1)
        assert np.max(lost) <= 1 - ef21.BlockNatural().contraction((256,))
    # The same as the values of a top-1 of 16: all entries of a group alike but for one group.
    size, groups = 4096, Skewed(4096, 16).groups
    value = np.where(np.arange(groups) == 3, 96.0, 1 - 1e-6)
    x, _, c = sent(chain, np.resize(value, size))
    assert chain.contraction((size,)) <= alpha(x, c) <= 1.1 * chain.contraction((size,))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_omega_of_quantize_bounds_the_error_and_is_nearly_attained(bits):
    random, nearest = ef21.Quantize(bits), ef21.Quantize(bits, nearest=True)
    levels = 2 ** (bits - 1) - 1
    assert random.unbiased and not nearest.unbiased
    c = levels**2 / 255
    y = math.sqrt(c * c + c) - c
    keys = jax.random.split(KEY, 64)
    for part, compressor in ((y, random), (0.4999, nearest)):
        omega = compressor.omega((256,))
        got = compressor.contraction((256,))
        assert got == (1 - omega if omega < 1 else None)
        x = np.full(256, part / levels)
        x[5] = 1.0  # rounds up to no more than itself, for these scales
        scale = rounded_up(np.float32(1 / levels))
        x[np.arange(256) != 5] = part * scale
        x = jnp.asarray(x, jnp.float32)
        send = jax.vmap(lambda key, x=x, c=compressor: ef21.dense(c.compress(x, key)))
        c_of_x = np.asarray(jax.jit(send)(keys), np.float64)
        lost = np.sum((c_of_x - np.asarray(x, np.float64)) ** 2, axis=1) / np.sum(np.square(x))
        tolerance = 4 * lost.std() / 8
        assert 0.95 * omega - 0.0005 - tolerance <= lost.mean() <= omega + tolerance
    assert ef21.Quantize(2).contraction(LARGE) is None
    assert ef21.Quantize().contraction(LARGE) >= 0.995
    assert 0 < ef21.Quantize(2, nearest=True).contraction(LARGE) <= 0.02


def test_alpha_of_scaled_sign_is_attained_by_one_entry():
    for block in (4, 256):
        x, _, c = sent(ef21.ScaledSign(block), np.where(np.arange(1024) % block == 1, -3.0, 0.0))
        bound = ef21.ScaledSign(block).contraction((1024,))
        assert bound <= alpha(x, c) <= 1 / block


def test_no_input_comes_near_the_bound_of_two_levels():
    # Between the thresholds everywhere, as much in each octave, is about the worst there is.
    powers = 2.0 ** -(np.arange(1, 257) ** np.linspace(0.1, 1, 20)[:, None] / 16)
    roots = np.arange(1, 257) ** -np.linspace(0.1, 3, 20)[:, None]
    for x in (powers, roots):
        x, _, c = sent(ef21.TwoLevel(), np.maximum(x, 2.0**-60))
        kept = 1 - np.sum((c - x) ** 2, axis=1) / np.sum(x**2, axis=1)
        assert np.min(kept) >= 0.6
        assert np.min(kept) >= ef21.TwoLevel().contraction((256,)) == 1 / 16


@pytest.mark.parametrize(
    "compressor, gaussian",
    [
        (ef21.BlockTopK(), 0.283),
        (ef21.BlockTopK() >> ef21.BlockNatural(), 0.272),
        (ef21.BlockTopK() >> ef21.TwoLevel(), 0.275),
        (ef21.BlockTopK() >> ef21.ScaledSign(), 0.267),
        (ef21.BlockNatural(), 0.960),
        (ef21.TwoLevel(), 0.875),
        (ef21.ScaledSign(), 0.634),
        (ef21.Quantize(4, nearest=True), 0.980),
    ],
    ids=repr,
)
def test_what_is_kept_of_gaussian_data(compressor, gaussian):
    x, _, c = sent(compressor, np.random.default_rng(0).normal(size=(128, 1024)))
    assert gaussian <= alpha(x, c) <= gaussian + 0.01


@pytest.mark.parametrize(
    "compressor, shape, norm, bound",
    [
        (ef21.BlockTopK(), (64, 64), None, 1 / 16),
        (ef21.BlockTopK(), (64, 64), ef21.Frobenius(), 1 / 16),
        (ef21.BlockTopK(), (64, 64), ef21.L1(), 1 - (15 / 16) ** 2),
        (ef21.BlockTopK(), (64, 64), ef21.Sign(), None),
        (ef21.BlockTopK(), (64, 64), ef21.Spectral(), None),
        (ef21.BlockTopK(), (2, 64, 64), None, 1 / 16),
        (ef21.BlockTopK(), (2, 64, 64), ef21.Frobenius(), None),
        (ef21.BlockTopK(4, 64), (64, 64), None, 4 / 64),
        (ef21.BlockTopK(), (12, 20), None, 1 / 15),  # 17 groups of 15 or 14
        (ef21.BlockTopK(), (5,), None, 1 / 5),
        (ef21.BlockTopK(), (), None, 1),
        (ef21.BlockTopK(), (0, 3), None, 1),
        (ef21.BlockTopK() >> ef21.ScaledSign(16), (64, 64), None, 1 / 256),
        (ef21.BlockTopK() >> ef21.BlockNatural(), (64, 64), ef21.Frobenius(), 0.87671 / 16),
        (ef21.BlockTopK() >> ef21.TwoLevel(), (64, 64), ef21.Sign(), None),
        (ef21.BlockTopK() >> ef21.Quantize(2), (64, 64), None, None),
        (ef21.BlockNatural(), (1,), None, 8 / 9),
        (ef21.BlockNatural(), (2, 64, 64), ef21.Frobenius(), None),
        (ef21.BlockNatural(), (64, 64), ef21.Spectral(), None),
        (ef21.ScaledSign(64), (64, 64), None, 1 / 64),
        (ef21.ScaledSign(), (0,), None, 1),
    ],
    ids=repr,
)
def test_alpha_is_as_counted_by_hand(compressor, shape, norm, bound):
    got = compressor.contraction(shape, norm)
    assert got == (bound if bound is None else pytest.approx(bound, rel=2e-4))


# --- Bias ---


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantize_is_unbiased(bits):
    trials = 2048
    rng = np.random.default_rng(3)
    # Few values, many times each: equal noise for equal entries would show in their mean.
    x = jnp.asarray(np.repeat(rng.uniform(-1, 1, (300, 1)), 2, axis=1), jnp.float32)

    @jax.jit
    def rounded(keys):
        c = ef21.Quantize(bits)
        return jax.vmap(lambda key: ef21.dense(c.compress(x, key)))(keys)

    got = np.asarray(rounded(jax.random.split(KEY, trials)), float)
    deviation = got.std(axis=0, ddof=1) / np.sqrt(trials)
    assert np.mean(deviation > 0) > 0.9
    assert np.all(np.abs(got.mean(axis=0) - np.asarray(x, float)) <= 4.5 * deviation + 1e-5)
    # Independent: the errors of equal neighbours are not correlated.
    error = got - np.asarray(x, float)
    spread = np.maximum(np.mean(error**2, axis=(0, 2)), 1e-30)
    correlation = np.mean(error[..., 0] * error[..., 1], axis=0) / spread
    assert np.max(np.abs(correlation)) <= 5 / np.sqrt(trials)
    assert abs(np.mean(correlation)) <= 5 / np.sqrt(trials * 300)


# --- Bits ---

GROUPS = 147457  # one more than 768 * 3072 / 16
CODED_RUNS = 577  # of 256 of the values


def bits_of(compressor, shape=LARGE, dtype=jnp.float32):
    message = jax.eval_shape(compressor.compress, jax.ShapeDtypeStruct(shape, dtype), KEY)
    return ef21.wire_bits(message)


@pytest.mark.parametrize(
    "compressor, bits, most",
    [
        (ef21.BlockTopK(), GROUPS * 32 + 73729 * 8, 2.251),
        (ef21.BlockTopK(16, 256), 16 * 9217 * (32 + 8), 2.501),
        (ef21.BlockTopK() >> ef21.Natural(), GROUPS * 8 + 16 + 73729 * 8, 0.751),
        (
            ef21.BlockTopK() >> ef21.BlockNatural(),
            CODED_RUNS * (256 * 4 + 16) + 73729 * 8,
            0.51,
        ),
        (ef21.BlockTopK() >> ef21.TwoLevel(), CODED_RUNS * (256 * 2 + 16) + 73729 * 8, 0.38),
        (ef21.BlockTopK() >> ef21.ScaledSign(), CODED_RUNS * (256 + 16) + 73729 * 8, 0.317),
        (ef21.BlockNatural(), 9216 * (256 * 4 + 16), 4.1),
        (ef21.Quantize(), 9216 * (256 * 8 + 16), 8.1),
        (ef21.Quantize(4), 9216 * (256 * 4 + 16), 4.1),
        (ef21.Quantize(2), 9216 * (256 * 2 + 16), 2.1),
        (ef21.TwoLevel(), 9216 * (256 * 2 + 16), 2.1),
        (ef21.ScaledSign(), 9216 * (256 + 16), 1.07),
    ],
    ids=repr,
)
def test_bits_are_those_counted_by_hand(compressor, bits, most):
    assert bits_of(compressor) == bits
    assert bits / math.prod(LARGE) <= most
    assert bits_of(compressor, dtype=jnp.bfloat16) <= bits


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_no_message_outweighs_the_dense_array(compressor):
    for shape in [(), (0,), (1,), (2,), (1, 9), (4, 0), (6, 7), (2, 3, 4)]:
        for dtype in DTYPES:
            x = jax.ShapeDtypeStruct(shape, dtype)
            assert bits_of(compressor, shape, dtype) <= ef21.wire_bits(x)


def test_where_dense_is_cheaper_dense_is_sent():
    x = np.random.default_rng(0).normal(size=33)
    for compressor in (
        ef21.Quantize(8, block=1),
        ef21.BlockTopK(15, 16),
        ef21.ScaledSign(1),
        ef21.TwoLevel(1),
        ef21.BlockTopK(15, 16) >> ef21.Quantize(8, block=1),
    ):
        x, message, c = sent(compressor, x, jnp.bfloat16)
        assert isinstance(message, Floats) and ef21.wire_bits(message) == 33 * 16
        np.testing.assert_array_equal(c, x)


# --- Extremes ---


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_the_largest_and_the_smallest_floats_stay_finite(compressor):
    rng = np.random.default_rng(0)
    bound = compressor.contraction((SIZE,))
    for dtype in DTYPES:
        info = jnp.finfo(dtype)
        most, least = float(info.max), float(info.smallest_normal)
        for size in (0.4 * most, 512 * least):
            x, _, c = sent(compressor, size * rng.uniform(-1, 1, SIZE), dtype)
            assert np.all(np.isfinite(c))
            normal = np.where(np.abs(x) < least, 0.0, x)
            if bound is not None and size > 1:
                assert alpha(normal, c) >= bound - 1e-6
        # The very largest may be clipped, and the subnormal become zero; neither grows.
        for x in (np.full(SIZE, most), np.where(np.arange(SIZE) % 2, most, -most)):
            x, _, c = sent(compressor, x, dtype)
            assert np.all(np.isfinite(c)) and np.sum((c / most - x / most) ** 2) <= SIZE
        x, _, c = sent(compressor, np.full(SIZE, least / 4), dtype)
        assert np.all(np.abs(c) <= least)


@pytest.mark.parametrize(
    "compressor",
    [ef21.BlockTopK(), ef21.BlockTopK(16, 256), ef21.BlockNatural(), ef21.BlockTopK(2, 32)]
    + [ef21.BlockTopK() >> ef21.BlockNatural()],
    ids=repr,
)
def test_a_zero_stays_a_zero(compressor):
    x, _, c = sent(compressor, inputs(SIZE)["mostly zero"])
    assert np.any(c) and not np.any(c[x == 0])


@pytest.mark.parametrize(
    "compressor",
    [
        ef21.BlockTopK(2, 32),
        ef21.Quantize(4),
        ef21.TwoLevel(),
        ef21.BlockNatural(),
        ef21.ScaledSign(),
    ],
    ids=repr,
)
def test_float64_is_coded_in_float64(compressor):
    with jax.enable_x64(True):
        for size in (1e-200, 1.0, 1e300):
            x = jnp.asarray(size * np.random.default_rng(0).normal(size=(20, 40)), jnp.float64)
            message, c = _sent(compressor, x, KEY)
            assert c.dtype == jnp.float64
            assert alpha(np.asarray(x) / size, np.asarray(c) / size) >= compressor.contraction(
                (800,)
            )
            assert all(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(message))


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_leaves_past_two_to_the_31_are_coded_or_refused(compressor):
    large = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.bfloat16)
    if "BlockTopK" in repr(compressor):
        with pytest.raises(ValueError, match=r"BlockTopK\(.*\) cannot index.*\(65536, 65536\)"):
            jax.eval_shape(compressor.compress, large, KEY)
        return
    if isinstance(compressor, ef21.Quantize) and not compressor.nearest:
        with pytest.raises(ValueError, match="65536, 65536"):
            jax.eval_shape(compressor.compress, large, KEY)
        large = jax.ShapeDtypeStruct(((1 << 16) - 1, 1 << 16), jnp.bfloat16)
    message = jax.eval_shape(compressor.compress, large, KEY)
    assert jax.eval_shape(ef21.dense, message).shape == large.shape
    small = bits_of(compressor, (1 << 11, 1 << 11), jnp.bfloat16) / 2**22
    assert ef21.wire_bits(message) / math.prod(large.shape) == pytest.approx(small, rel=1e-2)


# --- Under JAX ---


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_lanes_equal_the_loop_and_their_total_is_the_sum(compressor):
    shape, n = (SIZE,), 4
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)
    keys = jax.random.split(KEY, n)

    @jax.jit
    def lanes(x, keys):
        messages = jax.vmap(compressor.compress)(x, keys)
        silenced = jax.tree.map(jnp.zeros_like, messages)
        return messages, jax.vmap(ef21.dense)(messages), messages.total(), silenced.total()

    messages, expanded, added, nothing = lanes(x, keys)
    assert (added.shape, added.dtype) == (shape, jnp.float32)
    assert np.all(np.asarray(nothing) == 0)
    np.testing.assert_allclose(added, np.sum(expanded, axis=0, dtype=float), rtol=1e-5, atol=1e-5)
    for i in (0, n - 1):
        alone, dense = _sent(compressor, x[i], keys[i])
        jax.tree.map(
            np.testing.assert_array_equal, alone, jax.tree.map(lambda leaf, i=i: leaf[i], messages)
        )
        np.testing.assert_array_equal(dense, expanded[i])


def test_layers_of_equal_shape_are_compressed_each_by_itself():
    tree = {name: jnp.asarray(inputs(640)[name], jnp.float32) for name in ("gaussian", "student")}
    compressor = ef21.BlockTopK() >> ef21.BlockNatural()
    messages = jax.jit(lambda tree: ef21.compress(compressor, tree, KEY))(tree)
    for name, x in tree.items():
        np.testing.assert_array_equal(messages[name].dense(), _sent(compressor, x, KEY)[1])


# --- Values ---


@pytest.mark.parametrize("compressor", BLOCK_COMPRESSORS, ids=repr)
def test_block_compressors_are_values(compressor):
    again = eval(repr(compressor), vars(ef21))
    assert again == compressor and hash(again) == hash(compressor)
    assert repr(again) == repr(compressor)


def test_representations_leave_out_what_is_usual():
    assert repr(ef21.BlockTopK()) == "BlockTopK()"
    assert repr(ef21.BlockTopK(16, 256)) == "BlockTopK(count=16, block=256)"
    assert repr(ef21.Quantize(4, nearest=True)) == "Quantize(bits=4, nearest=True)"
    assert repr(ef21.BlockTopK() >> ef21.TwoLevel()) == "BlockTopK() >> TwoLevel()"


@pytest.mark.parametrize(
    "kind, name, value",
    [
        (ef21.BlockTopK, "block", 1),
        (ef21.BlockTopK, "block", 257),
        (ef21.BlockTopK, "block", 16.0),
        (ef21.BlockTopK, "count", 0),
        (ef21.BlockTopK, "count", 16),
        (ef21.BlockTopK, "count", True),
        (ef21.BlockNatural, "bits", 1),
        (ef21.BlockNatural, "bits", 9),
        (ef21.BlockNatural, "block", 0),
        (ef21.Quantize, "bits", 1),
        (ef21.Quantize, "bits", 16),
        (ef21.Quantize, "block", -1),
        (ef21.ScaledSign, "block", 0),
        (ef21.ScaledSign, "block", 2**15),
        (ef21.TwoLevel, "block", 0),
        (ef21.TwoLevel, "block", 257),
    ],
)
def test_bad_settings_are_named(kind, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` of {kind.__name__} must .*got {value}\."):
        kind(**{name: value})


@pytest.mark.parametrize(
    "first", [ef21.BlockNatural(), ef21.Quantize(), ef21.ScaledSign(), ef21.TwoLevel()], ids=repr
)
def test_nothing_can_follow_a_code(first):
    with pytest.raises(ValueError, match="leaves no floats"):
        first >> ef21.TopK(0.1)
