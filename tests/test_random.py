import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef21_jax._random import noise_bits


SIZE = 1 << 16
KEYS = jax.random.split(jax.random.key(0), 6)


@pytest.fixture(scope="module")
def noise():
    """Shape (keys, SIZE)."""
    return np.asarray(jax.jit(jax.vmap(lambda key: noise_bits(key, (SIZE,))))(KEYS))


def balanced(words):
    """Whether each of the 32 bits is set in half of the words, to five standard deviations."""
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.all(np.abs(bits.mean(axis=-2) - 0.5) <= 5 * 0.5 / np.sqrt(words.shape[-1]))


def correlation(a, b):
    return np.mean((a - 0.5) * (b - 0.5), axis=-1) * 12


def test_noise_is_the_published_hash_of_the_counter(noise):
    def mix(word):  # "lowbias32" of hash-prospector
        word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
        word = (word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B)
        return word ^ (word >> np.uint32(16))

    first, second = np.asarray(jax.random.bits(KEYS[0], (2,), jnp.uint32))
    counter = np.arange(SIZE, dtype=np.uint32)
    np.testing.assert_array_equal(noise[0], mix(mix(counter ^ first) + second))


def test_noise_is_uniform(noise):
    assert balanced(noise)
    uniform = noise / 2**32
    assert np.all(np.abs(uniform.mean(axis=1) - 0.5) <= 5 / np.sqrt(12 * SIZE))
    for byte in range(4):
        cells = (noise >> np.uint32(8 * byte)) & np.uint32(255)
        counts = np.stack([np.bincount(row, minlength=256) for row in cells])
        chi_squared = np.sum((counts - SIZE / 256) ** 2, axis=1) / (SIZE / 256)
        assert np.all(np.abs(chi_squared - 255) <= 5 * np.sqrt(2 * 255))


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 255, 256, 4096])
def test_neighbours_are_independent(noise, lag):
    # `xor` before balance: a bit that follows the same bit `lag` entries earlier would show.
    assert balanced(noise[:, lag:] ^ noise[:, :-lag])
    uniform = noise / 2**32
    serial = correlation(uniform[:, lag:], uniform[:, :-lag])
    assert np.all(np.abs(serial) <= 5 / np.sqrt(SIZE - lag))


def test_keys_are_independent(noise):
    uniform = noise / 2**32
    for i in range(len(KEYS)):
        for j in range(i):
            assert balanced(noise[i] ^ noise[j])
            assert np.abs(correlation(uniform[i], uniform[j])) <= 5 / np.sqrt(SIZE)


def test_noise_depends_on_the_key_and_the_place_alone(noise):
    again = noise_bits(KEYS[0], (4, 8))
    assert again.dtype == jnp.uint32 and again.shape == (4, 8)
    np.testing.assert_array_equal(again.ravel(), noise[0, :32])
    assert noise_bits(KEYS[0], ()) == noise[0, 0]
    assert noise_bits(KEYS[0], (0, 3)).shape == (0, 3)


def test_too_many_entries_are_refused():
    jax.eval_shape(lambda: noise_bits(KEYS[0], (2**16, 2**16 - 1)))
    with pytest.raises(ValueError, match="4294967296 entries"):
        jax.eval_shape(lambda: noise_bits(KEYS[0], (2**16, 2**16)))
