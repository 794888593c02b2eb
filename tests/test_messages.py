import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import COMPRESSORS, SHAPE, STEPS, draws, families, sent, stacked_families
from test_packing import powers_of_two

import ef21_jax as ef21
from ef21_jax._matrix_messages import Subspace
from ef21_jax._messages import Floats, Sparse, Stacked, expand, wire_bits
from ef21_jax._positions import EliasFano, Indices, Local, Mask, Strata, cheapest


KEY = jax.random.key(0)
ALL = COMPRESSORS + STEPS


def messages(compressor):
    """One message for each family, stacked, and what they stand for."""
    _, stacked, expanded = sent(compressor)
    return jax.tree.map(lambda leaf: leaf[:, 0], (stacked, expanded))


@jax.jit
def expand_and_add(stacked):
    return jax.vmap(ef21.dense)(stacked), stacked.total()


def message_for(compressor, shape, dtype=jnp.float32):
    """The shapes of a message."""
    return jax.eval_shape(compressor.compress, jax.ShapeDtypeStruct(shape, dtype), KEY)


# --- What travels ---


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_only_unsigned_integers_travel(compressor):
    for shape in [(), (0,), (2, *SHAPE)]:
        for dtype in [jnp.float32, jnp.bfloat16, jnp.float16]:
            message = message_for(compressor, shape, dtype)
            leaves = jax.tree.leaves(message)
            assert all(jnp.issubdtype(leaf.dtype, jnp.unsignedinteger) for leaf in leaves)
            expanded = jax.eval_shape(ef21.dense, message)
            assert (expanded.shape, expanded.dtype) == (shape, dtype)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_integers_and_floats_change_nothing_on_the_wire(compressor, dtype):
    narrow = message_for(compressor, SHAPE)
    with jax.enable_x64(True):
        message = message_for(compressor, SHAPE, jnp.dtype(dtype))
        expanded = jax.eval_shape(ef21.dense, message)
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), message)
        total = jax.eval_shape(lambda m: m.total(), stacked)
    assert expanded.dtype == total.dtype == dtype and expanded.shape == total.shape == SHAPE
    bits = {leaf.dtype for leaf in jax.tree.leaves(message)} - {jnp.dtype(jnp.uint64)}
    assert bits <= {leaf.dtype for leaf in jax.tree.leaves(narrow)}
    assert dtype == "float64" or wire_bits(message) == wire_bits(narrow)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_a_message_of_zeros_stands_for_zero(compressor):
    silenced = jax.tree.map(jnp.zeros_like, messages(compressor)[0])
    expanded, total = expand_and_add(silenced)
    assert np.all(np.asarray(expanded) == 0) and np.all(np.asarray(total) == 0)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_no_entry_exceeds_the_bound(compressor):
    stacked, expanded = messages(compressor)
    bounds = jax.jit(jax.vmap(lambda message: message.bound()))(stacked)
    most = np.max(np.abs(np.asarray(expanded)), axis=tuple(range(1, expanded.ndim)))
    assert np.all(most <= bounds)
    # Rows of factors bound their products, and may not meet; everything else is exact.
    assert np.all(bounds <= 40 * most)


def test_the_bound_of_layers_is_that_of_the_largest():
    sizes = jnp.asarray([1.0, 4.0, 2.0])
    layers = jax.vmap(lambda size: Floats.of(jnp.full(SHAPE, size)))(sizes)
    assert Stacked(layers).bound() == 4


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("spoiled", [3.4e38, np.inf, np.nan], ids=str)
def test_a_bound_is_not_finite_where_the_array_is_not(compressor, spoiled):
    x = 3.4e38 * np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
    x[3, 4] = spoiled
    message = jax.jit(compressor.compress)(x, KEY)
    if not np.all(np.isfinite(ef21.dense(message))):
        assert not np.isfinite(message.bound())


def test_an_array_stands_for_itself_and_a_tree_expands_in_place():
    x = jnp.arange(6.0).reshape(2, 3)
    assert ef21.dense(x) is x
    message = ef21.Identity().compress(x, KEY)
    tree = {"a": message, "b": [x, message]}
    assert ef21.is_message(message) and not ef21.is_message(x)
    assert jax.tree.structure(tree, is_leaf=ef21.is_message).num_leaves == 3
    for leaf in jax.tree.leaves(expand(tree)):
        np.testing.assert_array_equal(leaf, x)


# --- What it stands for ---


def largest(x, count):
    """TopK by its definition: a stable sort, so that the first of equals is kept."""
    kept = np.argsort(-np.abs(x.ravel()), kind="stable")[:count]
    mask = np.zeros(x.size, bool)
    mask[kept] = True
    return np.where(mask.reshape(x.shape), x, 0.0)


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def nearest_powers(x):
    return powers_of_two(x.ravel(), [None] * x.size, jnp.float32).reshape(x.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=jnp.dtype)
@pytest.mark.parametrize("fraction, count", [(0.25, 60), (0.02, 4), (0.1, 24)])
def test_topk_keeps_the_largest_and_the_first_of_equals(fraction, count, dtype):
    for x, c in zip(*draws(ef21.TopK(fraction), dtype), strict=True):
        np.testing.assert_array_equal(c[0], largest(x, count))


@pytest.mark.parametrize("fraction, count", [(0.25, 60)])
def test_randk_keeps_k_entries_as_they_are(fraction, count):
    x, c = draws(ef21.RandK(fraction))
    assert np.all((c == 0) | (c == x[:, None]))
    full = np.all(x != 0, axis=(1, 2))
    assert np.sum(full) >= 5
    assert np.all(np.count_nonzero(c[full], axis=(2, 3)) == count)


def test_exact_rankk_is_the_truncated_singular_value_decomposition():
    x, c = draws(ef21.RankK(0.25, exact=True))
    for name, xi, ci in zip(families(SHAPE), x, c[:, 0], strict=True):
        s = np.linalg.svd(xi, compute_uv=False)
        # As good as the best: this does not depend on how near the first to be dropped is.
        lost, least = np.linalg.norm(xi - ci), np.linalg.norm(s[3:])
        np.testing.assert_allclose(lost, least, rtol=1e-5, atol=1e-5 * s[0], err_msg=name)
        if name in ("flat spectrum", "ties"):
            continue  # equal singular values: the best approximation is not unique
        drops_nothing = s[3] <= 1e-6 * s[0]
        # Rounding turns what is kept by its size over the gap to what is dropped (Wedin).
        turned = 2 if drops_nothing else s[0] / (s[2] - s[3])
        off = 2 * np.finfo(np.float32).eps * s[0] * turned
        np.testing.assert_allclose(ci, truncated(xi, 3), atol=off, err_msg=name)


def test_rankk_is_an_orthogonal_projection_of_rank_k():
    x, c = draws(ef21.RankK(0.25))
    for xi, ci in zip(x, c[:, 0], strict=True):
        scale = np.linalg.norm(xi) or 1.0
        xi, ci = xi / scale, ci / scale
        assert np.linalg.svd(ci)[1][3] <= 1e-6
        # Orthonormal columns to 5e-4, as eight steps of Newton-Schulz in float32 leave them.
        np.testing.assert_allclose(ci.T @ (xi - ci), 0, atol=1e-3)


def test_column_topk_keeps_the_longest_columns_of_the_paper_whole():
    # Its columns are our rows; along the other axis, our columns.
    for compressor, axis, p, count in [
        (ef21.ColumnTopK(0.25), 0, 2, 3),
        (ef21.ColumnTopK(0.25, p=1.0, axis=-2), 1, 1, 5),
    ]:
        for name, x, c in zip(families(SHAPE), *draws(compressor), strict=True):
            rows, got = np.moveaxis(x, axis, 0), np.moveaxis(c[0], axis, 0)
            lengths = np.sum(np.abs(rows / (np.max(np.abs(x)) or 1.0)) ** p, axis=1)
            kept = np.any(got != 0, axis=1)
            np.testing.assert_array_equal(got, rows * kept[:, None])
            assert np.sum(kept) == min(count, np.count_nonzero(lengths)), name
            # Up to rounding, by which some of equal length differ.
            assert np.min(lengths[kept], initial=np.inf) >= np.max(lengths[~kept]) - 1e-5


def test_damping_scales_and_dropout_sends_all_or_nothing():
    x, c = draws(ef21.Damping(1.5))
    np.testing.assert_array_equal(c[:, 0], (1.5 * x).astype(np.float32))
    x, c = draws(ef21.Dropout(0.7))
    nothing, everything = np.all(c == 0, axis=(2, 3)), np.all(c == x[:, None], axis=(2, 3))
    assert np.all(nothing | everything)
    full = np.any(x != 0, axis=(1, 2))
    assert 0.62 <= np.mean(everything[full]) <= 0.78


def test_a_random_subspace_holds_an_orthogonal_projection_of_the_shorter_side():
    x, stacked, _ = sent(ef21.RandomSubspace(0.25))
    _, c = draws(ef21.RandomSubspace(0.25))
    bases = jax.jit(jax.vmap(lambda where: Subspace.basis(where, jnp.float32)))
    first = jax.tree.map(lambda leaf: leaf[:, 0], stacked.frequencies)
    for basis, xi, ci in zip(np.asarray(bases(first), float), x, c[:, 0], strict=True):
        assert basis.shape == (12, 3)
        np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=2e-6)
        scale = np.max(np.abs(xi)) or 1.0
        np.testing.assert_allclose(ci / scale, basis @ (basis.T @ (xi / scale)), atol=1e-5)


@pytest.mark.parametrize("size, count", [(1, 1), (7, 7), (46340, 3)])
def test_cosines_are_orthonormal_on_sides_of_any_length(size, count):
    make = jax.jit(
        lambda key: Subspace.basis(Strata.of(key, size, count, shared=False), jnp.float32)
    )
    basis = np.asarray(make(KEY), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(count), atol=1e-5)


def test_the_sharp_operators_are_those_of_their_norms():
    x = {name: a for name, a in families(SHAPE).items() if name in ("gaussian", "sparse", "zero")}
    x["power law"] = families(SHAPE)["power law"]
    stacked = jnp.asarray(np.stack(list(x.values())), jnp.float32)
    pairs = [
        (ef21.L1Sharp(), ef21.L1(), 0.0),
        (ef21.MaxRowSumSharp(), ef21.MaxRowSum(), 1e-6),
        (ef21.NuclearSharp(power_iterations=60), ef21.Nuclear(exact=True), 2e-3),
    ]

    @jax.jit
    def both(x):
        return [(c.compress(x, KEY).dense(), n.sharp(x)) for c, n, _ in pairs]

    for (got, expected), (_, _, tolerance) in zip(both(stacked), pairs, strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance * np.max(np.abs(expected)))


def test_the_sharp_operators_by_their_definitions():
    names = list(families(SHAPE))
    x, c = draws(ef21.L1Sharp())
    for xi, ci in zip(x, c[:, 0], strict=True):
        np.testing.assert_array_equal(ci, largest(xi, 1))
    x, c = draws(ef21.MaxRowSumSharp())
    for name, xi, ci in zip(names, x, c[:, 0], strict=True):
        top = np.argmax(np.abs(xi), axis=0)
        expected = np.zeros(SHAPE)
        expected[top, np.arange(20)] = np.sign(xi[top, np.arange(20)])
        total = np.sum(np.max(np.abs(xi), axis=0))
        np.testing.assert_allclose(ci, total * expected, rtol=1e-6, err_msg=name)
        assert len(np.unique(np.abs(ci))) <= 2


@pytest.mark.parametrize("compressor", [ef21.L1Sharp(), *STEPS], ids=repr)
def test_a_vector_is_one_column_to_a_sharp_operator(compressor):
    x = jnp.asarray([0.5, -3.0, 3.0, 0.0])
    np.testing.assert_array_equal(compressor.compress(x, KEY).dense(), [0, -3, 0, 0])


@pytest.mark.parametrize("compressor", [ef21.Damping(1.75), ef21.MaxRowSumSharp()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=jnp.dtype)
def test_what_overflows_becomes_the_largest_float_and_infinity_stays(compressor, dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([[largest, -largest], [0, 1]], dtype)
    expanded = np.asarray(compressor.compress(x, KEY).dense(), np.float64)
    np.testing.assert_array_equal(expanded[0], [largest, -largest])
    expanded = np.asarray(compressor.compress(x * 2, KEY).dense(), np.float64)
    assert not np.any(np.isfinite(expanded[0]))


@pytest.mark.parametrize("fraction, count", [(0.02, 4)])
def test_topk_then_natural_rounds_what_topk_keeps(fraction, count):
    x, c = draws(ef21.TopK(fraction) >> ef21.Natural(nearest=True))
    for xi, ci in zip(x, c[:, 0], strict=True):
        kept = largest(xi, count)
        np.testing.assert_array_equal(ci, nearest_powers(kept))


def test_rankk_then_natural_rounds_both_factors():
    plain = ef21.RankK(0.25, exact=True)
    factors, _ = messages(plain)
    _, expanded = messages(plain >> ef21.Natural(nearest=True))
    for i, got in enumerate(np.asarray(expanded, np.float64)):
        left, right = (
            nearest_powers(np.asarray(factor.bits[i].view(np.float32), np.float64))
            for factor in (factors.left, factors.right)
        )
        scale = np.max(np.abs(left) @ np.abs(right.T))
        np.testing.assert_allclose(got, left @ right.T, atol=1e-6 * scale)


def test_stacked_matrices_are_compressed_one_by_one():
    x = stacked_families(SHAPE, jnp.float32)
    for compressor in (ef21.RankK(0.25, exact=True), ef21.RankK(0.25)):
        whole = jax.jit(compressor.compress)(x, KEY)
        assert whole.left.dense().shape == (len(x), 12, 3)
        kept = np.linalg.norm(np.asarray(whole.dense(), float), axis=(1, 2))
        alone = np.linalg.norm(draws(compressor)[1][:, 0], axis=(1, 2))
        np.testing.assert_allclose(kept, alone, rtol=1e-5 if compressor.exact else 0.3)


def test_stacks_of_columns_and_of_largest_entries_are_compressed_one_by_one():
    columns = ef21.ColumnTopK(0.25), ef21.ColumnTopK(0.25, p=1.0, axis=-2)
    # All but the last family, a flat spectrum, whose rows are equally long but for rounding.
    x = stacked_families(SHAPE, jnp.float32)[:-1]
    for compressor in (*columns, ef21.L1Sharp(), *STEPS):
        whole = jax.jit(lambda x, c=compressor: c.compress(x, KEY).dense())(x)
        np.testing.assert_allclose(whole, sent(compressor)[2][:-1, 0], rtol=1e-6)


# --- Positions ---


@pytest.mark.parametrize("size, count", [(10, 3), (7, 7), (20, 1), (13, 5)])
def test_strata_are_distinct_and_fair(size, count):
    trials = 4000
    keys = jax.random.split(jax.random.key(1), trials)
    positions = jax.jit(
        jax.vmap(lambda key: Strata.of(key, size, count, shared=False).positions())
    )(keys)
    positions = np.asarray(positions)
    assert positions.min() >= 0 and positions.max() < size
    assert all(len(set(row)) == count for row in positions)
    counts = np.bincount(positions.ravel(), minlength=size)
    deviation = math.sqrt(trials * count / size * (1 - count / size))
    assert np.max(np.abs(counts - trials * count / size)) <= 4.5 * deviation


@pytest.mark.parametrize("size", [2**31 - 1, 3 * 2**29])
def test_strata_hold_in_leaves_where_sums_of_positions_overflow(size):
    keys = jax.random.split(jax.random.key(2), 200)
    draw = jax.jit(jax.vmap(lambda key: Strata.of(key, size, 7, shared=False).positions()))
    positions = np.sort(np.asarray(draw(keys), np.int64), axis=1)
    assert positions.min() >= 0 and positions.max() < size
    assert positions.min() < size / 100 and positions.max() > 0.99 * size
    # One in each stratum: neighbours, around the circle, are no further apart than two of them.
    gaps = np.diff(positions, axis=1, append=positions[:, :1] + size)
    assert np.all(gaps > 0) and np.all(gaps <= 2 * size / 7 + 2)


@pytest.mark.parametrize("size, width", [(1, 0), (2, 1), (3, 2), (256, 8), (257, 9), (2**31, 31)])
def test_indices_take_as_few_bits_as_can_tell_them_apart(size, width):
    assert Indices.width(size) == width
    positions = np.unique(np.asarray([0, size // 3, size - 1])) % 2**31
    indices = Indices.of(jnp.asarray(positions, jnp.int32), size)
    np.testing.assert_array_equal(indices.positions(), positions)
    assert indices.packed.size == -(-len(positions) * width // 8)


SETS = [
    (size, np.sort(np.random.default_rng(size + count).permutation(size)[:count]))
    for size, count in [(1, 1), (9, 1), (240, 24), (513, 512)]
] + [(1000, np.arange(950, 1000)), (1000, np.arange(50))]


@pytest.mark.parametrize("kind", [Indices, Mask, EliasFano], ids=lambda kind: kind.__name__)
def test_every_code_of_positions_gives_them_back_and_weighs_what_it_says(kind):
    @jax.jit
    def there_and_back(sets):
        found = []
        for size, positions in sets:
            mask = jnp.zeros(size, bool).at[positions].set(True)
            mask = jnp.packbits(mask, bitorder="little")
            code = Mask(mask, size, positions.size)
            code = code if kind is Mask else kind.of(positions, size)
            values = jnp.arange(1.0, positions.size + 1)
            rows = jnp.stack([values, -values], axis=1)
            found.append((code, code.positions(), code.place(values), code.place(rows)))
        return found

    static = [size for size, _ in SETS]
    sets = [jnp.asarray(positions, jnp.int32) for _, positions in SETS]
    found = jax.jit(lambda sets: there_and_back.__wrapped__(list(zip(static, sets, strict=True))))(
        sets
    )
    for (size, positions), (code, back, placed, rows) in zip(SETS, found, strict=True):
        np.testing.assert_array_equal(back, positions)
        expected = np.zeros(size)
        expected[positions] = np.arange(1, positions.size + 1)
        np.testing.assert_array_equal(placed, expected)
        np.testing.assert_array_equal(rows, np.stack([expected, -expected], axis=1))
        assert wire_bits(code) == 8 * kind.bytes(size, positions.size)
        assert wire_bits(code) >= code.information


@pytest.mark.parametrize("size", [1, 7, 240, 3000])
def test_the_code_of_a_leaf_is_the_cheapest_there_is(size):
    for count in sorted({1, 2, size // 100, size // 30, size // 10, size // 5, size // 2, size}):
        if not 0 < count <= size:
            continue
        mask = jax.ShapeDtypeStruct((-(-size // 8),), jnp.uint8)
        _, code = jax.eval_shape(lambda m, count=count: cheapest(m, size, count), mask)
        plain = -(-count * (size - 1).bit_length() // 8)
        splits = [
            -(-count * low // 8) - (-(count + ((size - 1) >> low) + 1) // 8) for low in range(32)
        ]
        assert wire_bits(code) == 8 * min(plain, -(-size // 8), *splits)


def test_elias_fano_takes_two_bits_more_than_the_logarithm_of_the_spacing():
    for size, count in [(10**6, 10**3), (10**6, 10**5), (2**31 - 1, 2**20)]:
        bits = 8 * EliasFano.bytes(size, count)
        assert bits <= count * (2 + math.log2(size / count)) + 16
        assert bits <= 1.25 * ef21.ledger.log2_binomial(size, count)


def test_elias_fano_holds_the_last_position_of_the_largest_leaf():
    size = 2**31 - 1
    positions = jnp.asarray([0, 1, 2**30, size - 1], jnp.int32)
    code = EliasFano.of(positions, size)
    assert wire_bits(code) <= 4 * 31 + 16
    np.testing.assert_array_equal(code.positions(), positions)


@pytest.mark.parametrize("length", [1, 2, 5, 256])
def test_local_positions_are_counted_within_their_runs(length):
    within = np.random.default_rng(0).integers(0, length, 11)
    code = Local.of(jnp.asarray(within, jnp.int32), length)
    assert wire_bits(code) == 8 * -(-11 * (length - 1).bit_length() // 8)
    np.testing.assert_array_equal(code.positions(), within + length * np.arange(11))
    assert code.place(jnp.ones(11)).shape == (11 * length,)


# --- Messages that the network sums ---

SUMMABLE = (
    ef21.Identity(),
    ef21.Damping(0.5),
    ef21.Dropout(0.5),
    ef21.RandK(0.25, shared=True),
    ef21.RandomSubspace(0.25, shared=True),
    ef21.RandomSubspace(0.25, shared=True) >> ef21.RandK(0.25, shared=True),
)


@pytest.mark.parametrize("compressor", SUMMABLE, ids=repr)
def test_messages_of_one_key_can_be_averaged_before_they_are_expanded(compressor):
    gradients = jax.random.normal(KEY, (4, *SHAPE))

    def worker(gradient, key):
        message = compressor.compress(gradient, key)
        mean = message.with_addend(jax.lax.pmean(message.addend(), "workers"))
        again = message.with_addend(message.addend())
        return message, again, mean.dense(), jax.lax.pmean(message.dense(), "workers")

    keys = [jax.random.key(i) for i in range(3)]  # one at least does not drop all
    both = jax.jit(jax.vmap(worker, axis_name="workers", in_axes=(0, None)))
    for key in keys:
        message, again, network, expected = both(gradients, key)
        assert message.summable
        jax.tree.map(np.testing.assert_array_equal, message, again)
        np.testing.assert_allclose(network, expected, atol=1e-5)
        # What a wire that sums has to carry: the floats alone.
        one = jax.tree.map(lambda leaf: leaf[0], message)
        assert wire_bits(one.addend()) == wire_bits(one)


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_a_message_says_whether_it_can_be_summed(compressor):
    message = message_for(compressor, SHAPE)
    of_floats = (ef21.Identity, ef21.Damping, ef21.Dropout)
    assert message.summable == isinstance(compressor, of_floats)
    if not message.summable:
        for call in (message.addend, lambda: message.with_addend(None)):
            with pytest.raises(ValueError, match=f"^{type(message).__name__}: such messages do"):
                call()


def test_positions_of_the_data_or_random_rounding_cannot_be_summed():
    for compressor in (ef21.TopK(0.1), ef21.RandK(0.25) >> ef21.Natural(), ef21.RankK(0.25)):
        assert not message_for(compressor, SHAPE).summable
    values = Floats.of(jnp.ones(2))
    assert not Sparse(values, Indices.of(jnp.arange(2), 8), (8,)).summable
    for shared in (False, True):
        assert Sparse(values, Strata.of(KEY, 8, 2, shared=shared), (8,)).summable == shared


@pytest.mark.parametrize("then", [ef21.Natural(), ef21.RandK(0.5)], ids=repr)
def test_to_share_what_does_not_add_up_is_an_error_that_says_what_to_do(then):
    with pytest.raises(ValueError, match="Leave out `shared`"):
        ef21.RandK(0.25, shared=True) >> then


# --- Sums of messages ---


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_the_total_of_messages_is_the_sum_of_what_they_stand_for(compressor):
    # Weighed so that neither the huge family drowns the others, nor the tiny one is nothing.
    stacked, _ = messages(compressor)
    huge = list(families(SHAPE)).index("huge")
    stacked = jax.tree.map(lambda leaf: np.delete(leaf, huge, axis=0), stacked)
    expanded, total = expand_and_add(stacked)
    assert (total.shape, total.dtype) == (SHAPE, jnp.float32)
    np.testing.assert_allclose(total, np.sum(expanded, axis=0, dtype=float), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "compressor",
    [
        ef21.Identity(),
        ef21.TopK(0.25),
        ef21.TopK(0.02),
        ef21.TopK(0.1) >> ef21.Natural(),
        ef21.RandK(0.25),
        ef21.RankK(0.1) >> ef21.Natural(),
        ef21.ColumnTopK(0.1),
        ef21.RandomSubspace(0.1),
        ef21.MaxRowSumSharp(),
        ef21.Natural(),
        ef21.BlockTopK(16, 256),
        ef21.BlockTopK() >> ef21.BlockNatural(),
        ef21.BlockNatural(),
        ef21.ScaledSign(),
    ],
    ids=repr,
)
def test_the_memory_of_a_total_does_not_grow_with_the_number_of_workers(compressor):
    message = message_for(compressor, (24, 40))

    def bytes_of_total(n):
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), message)
        memory = jax.jit(type(message).total).lower(stacked).compile().memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    assert bytes_of_total(64) <= 2.5 * bytes_of_total(1)


# --- Bits ---

M, N = 30, 40


@pytest.mark.parametrize(
    "compressor, shape, dtype, bits",
    [
        (ef21.Identity(), (M, N), "float32", 1200 * 32),
        (ef21.Identity(), (M, N), "bfloat16", 1200 * 16),
        # 300 positions of 11 bits would take 3300: a mask it is.
        (ef21.TopK(0.25), (M, N), "float32", 300 * 32 + 1200),
        (ef21.TopK(0.25), (M, N), "bfloat16", 300 * 16 + 1200),
        # Elias-Fano: 5 low bits each, 120, and 24 + 1199 // 32 + 1 = 62 for the others, in bytes.
        (ef21.TopK(0.02), (M, N), "float32", 24 * 32 + 120 + 64),
        # 4 positions of 11 bits: 44, in whole bytes.
        (ef21.TopK(0.004), (1100,), "float32", 4 * 32 + 48),
        # A mask of 1203 entries, in whole bytes.
        (ef21.TopK(0.25), (1203,), "float32", 300 * 32 + 1208),
        (ef21.TopK(1e-9), (M, N), "float32", 32 + 16),
        # The seed is two words.
        (ef21.RandK(0.25), (M, N), "float32", 300 * 32 + 64),
        (ef21.RankK(0.1), (M, N), "float32", 3 * (M + N) * 32),
        (ef21.RankK(0.1, exact=True), (N, M), "bfloat16", 3 * (M + N) * 16),
        (ef21.RankK(0.1), (5, M, N), "float32", 5 * 3 * (M + N) * 32),
        (ef21.RankK(0.1), (N,), "float32", N * 32),
        # A byte each, and the exponent of the largest.
        (ef21.Natural(), (M, N), "float32", 1200 * 8 + 16),
        (ef21.Natural(nearest=True), (M, N), "float16", 1200 * 8 + 16),
        (ef21.TopK(0.25) >> ef21.Natural(), (M, N), "float32", 300 * 8 + 16 + 1200),
        (ef21.TopK(0.02) >> ef21.Natural(), (M, N), "float32", 24 * 8 + 16 + 120 + 64),
        (ef21.RandK(0.25) >> ef21.Natural(), (M, N), "float32", 300 * 8 + 16 + 64),
        (ef21.RankK(0.1) >> ef21.Natural(), (M, N), "float32", 3 * (M + N) * 8 + 2 * 16),
        # 7 of 30 rows of 40 entries, 10 of 40 columns of 30: as masks.
        (ef21.ColumnTopK(0.25), (M, N), "float32", 7 * 40 * 32 + 32),
        (ef21.ColumnTopK(0.25, axis=-2), (M, N), "bfloat16", 10 * 30 * 16 + 40),
        (ef21.ColumnTopK(0.25), (N,), "float32", N * 32),
        (ef21.Damping(0.5), (M, N), "float32", 1200 * 32),
        (ef21.Dropout(0.1), (M, N), "float32", 1200 * 32),
        (ef21.NuclearSharp(), (M, N), "float32", (M + N) * 32),
        (ef21.NuclearSharp() >> ef21.Natural(), (M, N), "float32", (M + N) * 8 + 2 * 16),
        # Positions among 1200 take 11 bits: three matrices, 33 bits.
        (ef21.L1Sharp(), (3, M, N), "float32", 3 * 32 + 40),
        # None, or one of 30 with a sign: 61 codes, 6 bits for each of 40 columns.
        (ef21.MaxRowSumSharp(), (M, N), "float32", 32 + 240),
        (ef21.RandomSubspace(0.1), (M, N), "float32", 3 * N * 32 + 64),
        (ef21.RandomSubspace(0.1), (5, N, M), "float32", 5 * 3 * N * 32 + 64),
        (ef21.RandomSubspace(0.1) >> ef21.Natural(), (M, N), "float32", 3 * N * 8 + 16 + 64),
        # 0.25 of each factor's 3 * 30 and 3 * 40 entries, with a mask or seven bits each.
        (
            ef21.RankK(0.1) >> ef21.TopK(0.25),
            (M, N),
            "float32",
            (22 * 32 + 96) + (30 * 32 + 120),
        ),
    ],
    ids=repr,
)
def test_bits_are_those_counted_by_hand(compressor, shape, dtype, bits):
    assert wire_bits(message_for(compressor, shape, dtype)) == bits


def test_bits_of_a_tree_add_up():
    x = jnp.ones((M, N))
    tree = {"a": ef21.Identity().compress(x, KEY), "b": (ef21.Natural().compress(x, KEY),)}
    bits = wire_bits(tree)
    assert bits == 1200 * 32 + 1200 * 8 + 16 and isinstance(bits, int)


@pytest.mark.parametrize("compressor", ALL + (ef21.TopK(0.97), ef21.RandK(1.0)), ids=repr)
def test_no_message_outweighs_the_dense_array(compressor):
    for shape in [(), (0,), (2,), (1, 9), (4, 0), (6, 7), (2, 3, 4)]:
        for dtype in [jnp.float32, jnp.bfloat16]:
            x = jax.ShapeDtypeStruct(shape, dtype)
            assert wire_bits(message_for(compressor, shape, dtype)) <= wire_bits(x), (shape, dtype)


@pytest.mark.parametrize(
    "compressor",
    [
        ef21.TopK(0.99),
        ef21.RandK(1.0),
        ef21.RankK(0.9),
        ef21.RankK(0.9, exact=True),
        ef21.ColumnTopK(1.0),
        ef21.RandomSubspace(1.0),
    ],
    ids=repr,
)
def test_where_dense_is_cheaper_dense_is_sent(compressor):
    x = stacked_families(SHAPE, jnp.float32)[0]
    message = compressor.compress(x, KEY)
    assert wire_bits(message) == wire_bits(x)
    np.testing.assert_array_equal(message.dense(), x)


# --- How many are kept ---


def kept_by_topk(fraction, size):
    return message_for(ef21.TopK(fraction), (size,)).where.count


@pytest.mark.parametrize(
    "fraction, size, count",
    [
        (0.15, 20, 3),  # 3.0 or 2.9999999999999996
        (0.29, 100, 29),  # 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (0.07, 100, 7),  # 7.000000000000001
        (1 / 3, 9, 3),
        (0.1, 39, 3),
        (0.1, 5, 1),  # at least one
        (1e-6, 1000, 1),
    ],
)
def test_k_is_the_floor_of_the_share_but_for_rounding(fraction, size, count):
    assert kept_by_topk(fraction, size) == count
    assert message_for(ef21.RankK(fraction), (size, 10**6)).left.bits.shape == (size, count)


@pytest.mark.parametrize("size", [20, 96, 1000, 12345, 10**6])
def test_k_is_the_floor_in_exact_arithmetic_for_every_percentage(size):
    for percent in range(1, 101):
        count = max(1, math.floor(Fraction(percent, 100) * size))
        for compressor in (ef21.TopK(percent / 100), ef21.RandK(percent / 100)):
            assert compressor.contraction((size,)) == count / size
