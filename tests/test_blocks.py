import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef21_jax._blocks import Runs, Skewed, largest, total
from ef21_jax._packing import pack_lanes, separate_lanes, unpack_lanes


SIZES = (1, 5, 16, 17, 240, 255, 4096)


# --- Groups ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [2, 16, 256])
def test_every_entry_is_in_one_group_and_no_group_is_larger_than_the_block(size, block):
    skewed = Skewed(size, block)
    flat = jnp.arange(1, size + 1, dtype=jnp.int32)
    split = np.asarray(jax.jit(skewed.split)(flat))
    assert split.shape == (skewed.depth, skewed.groups) and skewed.depth <= block
    # Member r of group g is entry g + r G; zeros after the end.
    row, group = np.indices(split.shape)
    position = group + row * skewed.groups
    np.testing.assert_array_equal(split, np.where(position < size, position + 1, 0))
    np.testing.assert_array_equal(jax.jit(skewed.merge)(split), flat)
    assert np.all(split[0] > 0)
    if skewed.depth <= 16:
        np.testing.assert_array_equal(jnp.stack(jax.jit(skewed.rows)(flat)), split)


@pytest.mark.parametrize("block", [2, 16, 256])
def test_groups_are_few_and_as_many_as_have_no_factor_in_common_with_the_size(block):
    for size in [*range(1, 300), 768 * 3072, 50304 * 768, 2**31, 2**40 - 1]:
        groups = Skewed(size, block).groups
        least = -(-size // block)
        assert math.gcd(groups, size) == 1
        assert all(math.gcd(count, size) > 1 for count in range(least, groups))
        assert groups <= least + 30
    assert Skewed(768 * 3072, 16).groups == 147457


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768), (64, 50), (3, 3, 64, 128), (512, 16)])
def test_the_members_of_a_group_differ_in_row_and_in_column(shape):
    skewed = Skewed(math.prod(shape), 16)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    for group in np.linspace(0, skewed.groups - 1, 20).astype(int):
        members = range(group, math.prod(shape), skewed.groups)
        assert len({m // columns for m in members}) >= min(rows, len(members) - 1)
        assert len({m % columns for m in members}) == min(columns, len(members))


# --- Runs ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [1, 2, 16, 256])
def test_runs_are_neighbours_of_nearly_equal_number(size, block):
    runs = Runs(size, block)
    flat = jnp.arange(1, size + 1, dtype=jnp.int32)
    split = np.asarray(jax.jit(runs.split)(flat))
    assert split.shape == (runs.count, runs.length) and runs.count == -(-size // block)
    assert runs.length <= block
    np.testing.assert_array_equal(split.ravel()[:size], flat)
    assert np.all(split.ravel()[size:] == 0)
    np.testing.assert_array_equal(jax.jit(runs.merge)(split), flat)
    filled = np.asarray(jax.jit(lambda: runs.filled)())
    assert filled.shape == (runs.count, 1) and filled.min() >= 1
    np.testing.assert_array_equal(filled[:, 0], np.count_nonzero(split, axis=1))


@pytest.mark.parametrize("length", [1, 7, 8, 24, 256])
def test_folding_changes_no_maximum_and_no_sum(length):
    x = jnp.asarray(np.random.default_rng(0).integers(-99, 99, (3, length)), jnp.int32)
    np.testing.assert_array_equal(largest(x), np.max(x, axis=1, keepdims=True))
    np.testing.assert_array_equal(total(x), np.sum(x, axis=1, keepdims=True))


# --- Lanes ---


@pytest.mark.parametrize("width", [0, 1, 3, 4, 7, 8])
def test_lanes_give_back_what_they_hold_in_as_many_bytes_as_it_takes(width):
    rng = np.random.default_rng(width)
    for size in (0, 3, 8, 9):
        codes = rng.integers(0, 1 << width, (2, size)).astype(np.uint8)
        packed = jax.jit(pack_lanes, static_argnums=1)(codes, width)
        parts = [part for part in (8, 4, 2, 1) if width & part]
        assert packed.dtype == jnp.uint8
        assert packed.shape == (2, sum(math.ceil(size * part / 8) for part in parts))
        unpacked = jax.jit(unpack_lanes, static_argnums=(1, 2))(packed, width, size)
        np.testing.assert_array_equal(unpacked, codes)
        if width in (1, 4, 8):
            lanes = jax.jit(separate_lanes, static_argnums=1)(packed, width)
            assert lanes.shape == (2, 8 // width, packed.shape[1])
            np.testing.assert_array_equal(lanes.reshape(2, -1)[:, :size], codes)


def test_the_entries_of_a_byte_are_a_stride_apart():
    codes = jnp.arange(1, 7, dtype=jnp.uint8)
    np.testing.assert_array_equal(pack_lanes(codes, 4), [0x41, 0x52, 0x63])
    np.testing.assert_array_equal(pack_lanes(codes & jnp.uint8(3), 2), [0x1D, 0x22])
