import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef21_jax import _packing


# --- Integers ---


def test_packing_loses_nothing_and_takes_no_more_bytes_than_it_must():
    rng, size = np.random.default_rng(0), 13
    integers = {w: rng.integers(0, 2**w, size, dtype=np.uint32) for w in range(33)}

    @jax.jit
    def there_and_back(integers):
        packed = {w: _packing.pack(x, w) for w, x in integers.items()}
        return packed, {w: _packing.unpack(p, w, size) for w, p in packed.items()}

    packed, unpacked = there_and_back(integers)
    for width in range(33):
        assert packed[width].dtype == jnp.uint8
        assert packed[width].shape == (-(-size * width // 8),)
        np.testing.assert_array_equal(unpacked[width], integers[width])
        assert unpacked[width].dtype == jnp.uint32


@pytest.mark.parametrize("width", [1, 5, 8, 11, 32])
def test_packed_bits_lie_in_order_from_the_lowest(width):
    integers = np.random.default_rng(1).integers(0, 2**width, 9, dtype=np.uint32)
    stream = sum(int(x) << (i * width) for i, x in enumerate(integers))
    expected = stream.to_bytes(-(-9 * width // 8), "little")
    assert np.asarray(_packing.pack(jnp.asarray(integers), width)).tobytes() == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bits_are_those_of_the_float(dtype):
    x = jnp.asarray([0.0, -0.0, 1.0, -3.14, jnp.inf, jnp.nan, jnp.finfo(dtype).tiny], dtype)
    bits = _packing.to_bits(x)
    assert jnp.issubdtype(bits.dtype, jnp.unsignedinteger)
    assert bits.dtype.itemsize == x.dtype.itemsize
    assert np.asarray(bits).tobytes() == np.asarray(x).tobytes()
    assert np.asarray(_packing.from_bits(bits, x.dtype)).tobytes() == np.asarray(x).tobytes()


# --- Masks ---

MASKS = {
    "random": np.random.default_rng(2).uniform(size=77) < 0.4,
    "sparse": np.random.default_rng(3).uniform(size=77) < 0.03,
    "empty": np.zeros(77, bool),
    "full": np.ones(77, bool),
    "first": np.arange(77) == 0,
    "last": np.arange(77) == 76,
    "word ends": np.isin(np.arange(77), [31, 32, 63, 64]),
    "whole words": np.random.default_rng(4).uniform(size=64) < 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_ranks_and_positions_are_what_numpy_says(mask):
    size, positions = mask.size, np.flatnonzero(mask)
    packed = _packing.pack_mask(jnp.asarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask, bitorder="little"))
    np.testing.assert_array_equal(_packing.unpack_mask(packed, size), mask)
    np.testing.assert_array_equal(_packing.ranks(packed, size), np.cumsum(mask) - mask)
    found = _packing.set_positions(packed, size, positions.size)
    np.testing.assert_array_equal(found, positions)
    assert found.dtype == _packing.ranks(packed, size).dtype == jnp.int32


# --- Powers of two ---


def powers_of_two(x, noise, dtype):
    """The definition, entry by entry: x = ±mantissa · 2**exponent, mantissa in [1, 2)."""
    info = jnp.finfo(dtype)
    wide = jnp.finfo(jnp.float64 if info.bits == 64 else jnp.float32)
    exponents = []
    for entry, word in zip(np.abs(x), noise, strict=True):
        if entry < float(wide.smallest_normal):
            exponents.append(None)
            continue
        mantissa, exponent = np.frexp(entry)
        mantissa, exponent = 2 * mantissa, exponent - 1
        threshold = 0.5 if word is None else 1 - (int(word) >> 9) / 2**23
        up = mantissa - 1 >= threshold
        exponents.append(min(int(exponent) + int(up), info.maxexp - 1))
    top = max((e for e in exponents if e is not None), default=0)
    kept = [0.0 if e is None or e <= top - 127 else 2.0**e for e in exponents]
    return np.copysign(kept, x)


def edges(dtype):
    info = jnp.finfo(dtype)
    least = np.longdouble(2.0) ** (info.minexp - info.nmant)
    smallest = [float(info.smallest_normal), float(least), 0.75 * float(info.smallest_normal)]
    powers = [1.0, 2.0, 1.5, 1.5 - 2.0**-info.nmant, 1.5 + 2.0**-info.nmant, 0.75, 2.0**-10]
    largest = [float(info.max), float(info.max) / 2, 2.0 ** (info.maxexp - 1)]
    values = np.asarray([0.0, *smallest, *powers, *largest], np.float64)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_powers_of_two_are_those_of_the_definition(dtype, noisy):
    rng = np.random.default_rng(5)
    middling = rng.normal(size=40) * 2.0 ** rng.integers(-8, 8, 40)
    inputs = {
        "edges": edges(dtype),  # the largest float is among them: what is small drops out
        "small edges": edges(dtype)[np.abs(edges(dtype)) <= 2.0],
        "middling": middling,
        "wide": rng.normal(size=40) * 2.0 ** -np.linspace(0, 140, 40),
        "zeros": np.zeros(5),
        "subnormal": edges(dtype)[[2, 3, 3, 3]],
    }
    with jax.enable_x64(True):
        there = jax.jit(_packing.powers_of_two)
        back = jax.jit(_packing.from_powers_of_two, static_argnums=2)
        for name, values in inputs.items():
            x = jnp.asarray(np.asarray(values, dtype), dtype)
            exact = np.asarray(x, np.float64)
            noise = rng.integers(0, 2**32, x.size, dtype=np.uint32) if noisy else None
            codes, top = there(x, noise)
            assert (codes.dtype, top.dtype, top.shape) == (jnp.uint8, jnp.uint16, ())
            decoded = back(codes, top, x.dtype)
            assert decoded.dtype == x.dtype
            expected = powers_of_two(exact, [None] * x.size if noise is None else noise, dtype)
            np.testing.assert_array_equal(np.asarray(decoded, np.float64), expected, name)
            zero = exact == 0
            np.testing.assert_array_equal(np.asarray(codes)[zero] & 127, 0, name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=jnp.dtype)
def test_the_mean_over_the_noise_is_the_number_itself(dtype):
    # Mantissas of seven bits, and noise that takes each value of its top seven bits once: the
    # mean is then the expectation, without sampling error.
    x = (1 + np.arange(128) / 128) * np.where(np.arange(128) % 2, -1, 1) * 2.0**-3
    noise = np.arange(128, dtype=np.uint32) << 25

    @jax.jit
    @jax.vmap
    def rounded(word):
        codes, top = _packing.powers_of_two(jnp.asarray(x, dtype), jnp.broadcast_to(word, (128,)))
        return _packing.from_powers_of_two(codes, top, jnp.dtype(dtype))

    mean = np.mean(np.asarray(rounded(noise), np.float64), axis=0)
    np.testing.assert_array_equal(mean, x)


def test_nearest_is_off_by_a_third_at_most_and_attains_it():
    x = np.concatenate([np.linspace(-4, 4, 4001), [1.5]])
    codes, top = _packing.powers_of_two(jnp.asarray(x, jnp.float32), None)
    rounded = np.asarray(_packing.from_powers_of_two(codes, top, jnp.dtype(jnp.float32)), float)
    x = np.asarray(jnp.asarray(x, jnp.float32), float)
    kept = np.abs(x) > 1e-30
    error = np.abs(rounded - x)[kept] / np.abs(x)[kept]
    assert np.max(error) == pytest.approx(1 / 3, abs=1e-12)
    assert np.all(rounded[~kept] == 0)


def test_codes_that_are_all_zero_stand_for_zero():
    zero = _packing.from_powers_of_two(
        jnp.zeros(4, jnp.uint8), jnp.zeros((), jnp.uint16), jnp.dtype(jnp.float32)
    )
    assert np.asarray(zero).tobytes() == bytes(16)
