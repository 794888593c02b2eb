import dataclasses
import itertools
import re

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometries import GEOMETRIES, Absolute, Arbitrary, Mixed, Schatten
from hypothesis import strategies
from registry import (
    COMPRESSORS,
    DRAWS,
    SHAPE,
    STEPS,
    draws,
    families,
    is_random,
    sent,
    with_spectrum,
)

import ef21_jax as ef21


KEY = jax.random.key(0)
DTYPES = (jnp.float32, jnp.bfloat16)
PROJECTIONS = (ef21.RankK, ef21.NuclearSharp, ef21.RandomSubspace)
# Nearest powers of two of both factors: their errors are not independent, so no α is proved.
UNPROVED = tuple(c for c in COMPRESSORS if c.contraction(SHAPE) is None)
PROVED = tuple(c for c in COMPRESSORS if c not in UNPROVED)


def loss(x, c):
    """‖C(x) − x‖² / ‖x‖², for every family and key."""
    square = np.sum(x**2, axis=(-2, -1))[:, None]
    lost = np.sum((c - x[:, None]) ** 2, axis=(-2, -1))
    assert np.all(lost[np.broadcast_to(square == 0, lost.shape)] == 0)
    return lost / np.where(square == 0, 1, square)


def rounding(compressor, dtype):
    """What the loss may exceed 1 − α by. Nothing that is merely chosen or put in bits is rounded.

    The factors of RankK are, to `dtype`, and so is their product: three errors of at most half an
    eps of what they are part of. In float32 the factor is orthonormal to 1e-3 only, of which the
    loss sees the square.
    """
    while isinstance(compressor, ef21.Chain):
        compressor = compressor.first
    eps = float(jnp.finfo(dtype).eps)
    if isinstance(compressor, ef21.Damping):
        return 2 * eps
    if isinstance(compressor, ef21.ColumnTopK):
        return 4 * float(jnp.finfo(jnp.float32).eps)  # columns that rounding swaps
    if not isinstance(compressor, PROJECTIONS):
        return 1e-12
    return (1.5 * eps) ** 2 + 2e-6


# --- α ---


@pytest.mark.parametrize("dtype", DTYPES, ids=jnp.dtype)
@pytest.mark.parametrize("compressor", PROVED, ids=repr)
def test_every_compressor_contracts_by_its_alpha(compressor, dtype):
    lost = loss(*draws(compressor, dtype))
    mean, deviation = lost.mean(axis=1), lost.std(axis=1, ddof=1)
    if not is_random(compressor):
        assert np.all(deviation == 0)
    bound = 1 - compressor.contraction(SHAPE) + rounding(compressor, dtype)
    excess = mean - 4 * deviation / np.sqrt(DRAWS) - bound
    assert np.all(excess <= 0), dict(zip(families(SHAPE), excess, strict=True))


@pytest.mark.parametrize(
    "compressor, shape",
    [
        # The other orientation is other code.
        (ef21.RankK(0.25), (20, 12)),
        (ef21.RankK(0.25, exact=True), (20, 12)),
        (ef21.RankK(0.25) >> ef21.Natural(), (20, 12)),
        (ef21.NuclearSharp(power_iterations=2), (20, 12)),
        (ef21.RandomSubspace(0.25), (20, 12)),
        (ef21.ColumnTopK(0.25), (20, 12)),
        (ef21.RankK(0.25), (24, 1)),
        (ef21.TopK(0.25), (24, 1)),
        (ef21.RandK(0.25) >> ef21.Natural(), (1, 24)),
    ],
    ids=repr,
)
def test_contraction_holds_for_tall_matrices_rows_and_columns(compressor, shape):
    lost = loss(*draws(compressor, jnp.float32, shape))
    mean, deviation = lost.mean(axis=1), lost.std(axis=1, ddof=1)
    bound = 1 - compressor.contraction(shape) + rounding(compressor, jnp.float32)
    assert np.all(mean - 4 * deviation / np.sqrt(DRAWS) <= bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=jnp.dtype)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_no_draw_expands_and_all_are_finite(compressor, dtype):
    x, c = draws(compressor, dtype)
    assert np.all(np.isfinite(c))
    assert np.all(loss(x, c) <= 1 + 1e-6)
    zero = list(families(SHAPE)).index("zero")
    assert np.all(c[zero] == 0)


@pytest.mark.parametrize(
    "compressor, worst, alpha",
    [
        (ef21.Identity(), "gaussian", 1),
        (ef21.TopK(0.25), "constant", 1 / 4),
        (ef21.TopK(0.02), "ties", 4 / 240),
        (ef21.RankK(0.25), "flat spectrum", 1 / 4),
        (ef21.RankK(0.25, exact=True), "flat spectrum", 1 / 4),
        (ef21.Natural(nearest=True), "ties", 8 / 9),  # halfway: ±1.5
        (ef21.TopK(0.02) >> ef21.Natural(nearest=True), "ties", 4 / 240 * 8 / 9),
        (ef21.Damping(1.5), "gaussian", 3 / 4),
        (ef21.ColumnTopK(0.25), "constant", 1 / 4),
        (ef21.NuclearSharp(power_iterations=2), "flat spectrum", 1 / 12),
        (ef21.L1Sharp(), "ties", 1 / 240),
    ],
    ids=repr,
)
def test_alpha_is_attained(compressor, worst, alpha):
    assert compressor.contraction(SHAPE) == pytest.approx(alpha)
    lost = loss(*draws(compressor))[list(families(SHAPE)).index(worst)]
    np.testing.assert_allclose(lost, 1 - alpha, atol=1e-6)


@pytest.mark.parametrize(
    "compressor, shape, alpha",
    [
        (ef21.RandK(0.25), SHAPE, 1 / 4),
        (ef21.RandK(1e-9), SHAPE, 1 / 240),
        (ef21.Natural(), SHAPE, 7 / 8),
        (ef21.Natural(), (), 7 / 8),
        (ef21.Identity() >> ef21.Natural(), SHAPE, 7 / 8),
        (ef21.TopK(0.25) >> ef21.Natural(), SHAPE, 7 / 32),
        (ef21.RandK(0.25) >> ef21.Natural(), SHAPE, 7 / 32),
        (ef21.TopK(0.25) >> ef21.TopK(0.1), SHAPE, 6 / 240),
        (ef21.RankK(0.25), SHAPE, 1 / 4),
        (ef21.RankK(0.25), (5, *SHAPE), 1 / 4),
        (ef21.RankK(0.25), (24,), 1),
        (ef21.RankK(0.9), SHAPE, 1),  # dense is cheaper
        (ef21.RankK(0.25) >> ef21.Natural(), SHAPE, 1 / 4 * (1 - 2 / 8 - 1 / 64)),
        (ef21.RankK(0.25) >> ef21.Natural(), (24,), 7 / 8),
        (ef21.RankK(0.25) >> ef21.Natural(nearest=True), SHAPE, None),
        (ef21.RankK(0.25) >> ef21.TopK(0.25), SHAPE, None),
        (ef21.Damping(0.5), (7,), 3 / 4),
        (ef21.Damping(1.5), (), 3 / 4),
        (ef21.Dropout(0.1), (5, *SHAPE), 0.1),
        (ef21.ColumnTopK(0.25), SHAPE, 3 / 12),
        (ef21.ColumnTopK(0.25, axis=-2), (5, *SHAPE), 5 / 20),
        # ℓ1 may misjudge ℓ2 by √12: five columns of 20 have at least 5 of 5 + 12 · 15 of it.
        (ef21.ColumnTopK(0.25, p=1.0, axis=-2), SHAPE, 5 / (5 + 12 * 15)),
        (ef21.ColumnTopK(0.25), (24,), 1),
        (ef21.NuclearSharp(), (5, *SHAPE), 1 / 12),
        (ef21.NuclearSharp(), (24, 1), 1),
        (ef21.L1Sharp(), (5, *SHAPE), 1 / 240),
        (ef21.L1Sharp(), (24,), 1 / 24),
        (ef21.MaxRowSumSharp(), SHAPE, None),
        (ef21.RandomSubspace(0.25), (5, *SHAPE), 3 / 12),
        (ef21.RandomSubspace(0.25), (24,), 1),
        # Unbiased errors are orthogonal to what is withheld; those of TopK may point along it.
        (ef21.Damping(0.5) >> ef21.Natural(), SHAPE, 1 - 1 / 4 - 1 / 32),
        (ef21.Damping(0.5) >> ef21.TopK(0.25), SHAPE, 1 - (0.5 + 0.5 * 0.75**0.5) ** 2),
        (ef21.Dropout(0.5) >> ef21.TopK(0.25), SHAPE, 1 / 8),
        (ef21.ColumnTopK(0.25) >> ef21.Natural(), SHAPE, 7 / 32),
        # Rank 1 of the three columns of 20.
        (ef21.ColumnTopK(0.25) >> ef21.RankK(0.1), SHAPE, 1 / 12),
        (ef21.L1Sharp() >> ef21.Natural(), SHAPE, 7 / 8 / 240),
        (ef21.NuclearSharp() >> ef21.Natural(), SHAPE, 1 / 12 * (1 - 2 / 8 - 1 / 64)),
        (ef21.NuclearSharp() >> ef21.Damping(0.5), SHAPE, None),
        (ef21.RandomSubspace(0.25) >> ef21.Natural(), SHAPE, 7 / 32),
        (ef21.RandomSubspace(0.25) >> ef21.TopK(0.1), SHAPE, 1 / 4 * 6 / 60),
        (ef21.MaxRowSumSharp() >> ef21.Natural(), SHAPE, None),
        # Where TopK sends the dense array, RankK acts on the matrix, not on a vector of values.
        (ef21.TopK(1.0) >> ef21.RankK(0.25), SHAPE, 1 / 4),
        (ef21.TopK(0.25), (0, 3), 1),
        (ef21.TopK(0.25), (), 1),
    ],
    ids=repr,
)
def test_alpha_is_as_counted_by_hand(compressor, shape, alpha):
    assert compressor.contraction(shape) == (alpha if alpha is None else pytest.approx(alpha))


@pytest.mark.parametrize(
    "compressor", [ef21.RandK(0.25), ef21.RandomSubspace(0.25), ef21.Dropout(0.7)], ids=repr
)
def test_alpha_of_what_ignores_the_data_holds_with_equality(compressor):
    x, c = draws(compressor)
    lost = loss(x, c)[np.any(x != 0, axis=(1, 2))]
    mean, deviation = lost.mean(axis=1), lost.std(axis=1, ddof=1)
    expected = 1 - compressor.contraction(SHAPE)
    assert np.all(np.abs(mean - expected) <= 4 * deviation / np.sqrt(DRAWS))


# --- α in the norm of a layer ---


@pytest.mark.parametrize("compressor", COMPRESSORS + STEPS, ids=repr)
def test_every_alpha_holds_in_the_norm_that_it_is_claimed_for(compressor):
    x, c = draws(compressor)
    claimed = [n for n in GEOMETRIES if compressor.contraction(SHAPE, n) is not None]
    everywhere = (ef21.Identity, ef21.Damping, ef21.Dropout)
    assert isinstance(compressor, everywhere) <= (len(claimed) == len(GEOMETRIES))
    for norm in claimed:
        size = norm.norm(x)[:, None] ** 2
        lost = norm.norm(c - x[:, None]) ** 2 / np.where(size > 0, size, 1)
        mean, deviation = lost.mean(axis=1), lost.std(axis=1, ddof=1)
        # Rounding is small in ℓ2, and at most so many times as large in the norm of a matrix.
        slack = 240 * rounding(compressor, jnp.float32) + 1e-12
        excess = mean - 4 * deviation / np.sqrt(DRAWS) - (1 - compressor.contraction(SHAPE, norm))
        assert np.all(excess <= slack), (norm, dict(zip(families(SHAPE), excess, strict=True)))


INF = float("inf")
TOP_SVD = ef21.RankK(0.25, exact=True)


@pytest.mark.parametrize(
    "compressor, norm, alpha",
    [
        (ef21.Identity(), Arbitrary(), 1),
        (ef21.Damping(0.5), Arbitrary(), 3 / 4),
        (ef21.Dropout(0.3), Arbitrary(), 0.3),
        (ef21.Damping(0.5) >> ef21.Damping(0.5), Arbitrary(), 7 / 16),
        (ef21.Dropout(0.5) >> ef21.Damping(0.5), Arbitrary(), 3 / 8),
        (ef21.Natural(nearest=True), Absolute(), 8 / 9),
        (ef21.Natural(nearest=True), Mixed(INF, INF), 8 / 9),
        (ef21.Natural(nearest=True), Arbitrary(), None),
        # A ninth of the squares, and at most √12 times as much in a norm that sums 12 of them.
        (ef21.Natural(nearest=True), Schatten(4), 1 - 12**0.5 / 9),
        (ef21.Natural(nearest=True), Schatten(1), None),
        (ef21.Natural(), Mixed(1, 2), 7 / 8),
        (ef21.Natural(), Mixed(1, 3), None),
        (ef21.Natural(), Absolute(), None),
        (ef21.TopK(0.25), Schatten(2), 1 / 4),
        (ef21.TopK(0.25), Mixed(1, 1), 1 - (3 / 4) ** 2),
        (ef21.TopK(0.25), Mixed(3, 3), 1 - (3 / 4) ** (2 / 3)),
        (ef21.TopK(0.25), Mixed(INF, INF), None),
        (ef21.TopK(0.25), Mixed(2, 1), None),
        (ef21.TopK(0.25), Schatten(1), None),
        (ef21.RandK(0.25), Mixed(1, 1), 1 / 4),
        (ef21.RandK(0.25), Mixed(4, 4), 1 - (3 / 4) ** (1 / 2)),
        (ef21.RandK(0.25), Mixed(2, 1), 1 - (3 / 4) ** (1 / 2)),
        (ef21.RandK(0.25), Mixed(1, INF), None),
        (TOP_SVD, Schatten(1), 1 - (3 / 4) ** 2),
        (TOP_SVD, Schatten(2), 1 / 4),
        (TOP_SVD, Schatten(4), 1 - (3 / 4) ** (1 / 2)),
        (TOP_SVD, Schatten(INF), None),
        (TOP_SVD, Mixed(1, 1), None),
        (ef21.RankK(0.25), Schatten(1), 1 - (3 / 4) ** (1 / 2)),
        (ef21.RankK(0.25), Schatten(4), None),
        (ef21.RankK(0.9), Arbitrary(), 1),  # dense is cheaper
        (ef21.ColumnTopK(0.25), Mixed(2, 1), 1 - (3 / 4) ** 2),
        (ef21.ColumnTopK(0.25), Mixed(2, 4), 1 - (3 / 4) ** (1 / 2)),
        (ef21.ColumnTopK(0.25), Mixed(2, 1, -2), None),
        (ef21.ColumnTopK(0.25), Mixed(2, INF), None),
        (ef21.ColumnTopK(0.25, p=3.0), Mixed(3, 2), 1 / 4),
        # Columns of 20 entries: misjudged by √20.
        (ef21.ColumnTopK(0.25), Mixed(1, 1), 1 - (1 - 3 / (3 + 9 * 20**0.5)) ** 2),
        (ef21.ColumnTopK(0.25), Schatten(1), None),
        (ef21.NuclearSharp(), Schatten(1), 1 - (11 / 12) ** (1 / 2)),
        (ef21.NuclearSharp(), Schatten(INF), None),
        (ef21.RandomSubspace(0.25), Schatten(1), 1 - (3 / 4) ** (1 / 2)),
        (ef21.L1Sharp(), Mixed(1, 1), 1 - (239 / 240) ** 2),
        (ef21.L1Sharp(), Mixed(INF, INF), None),
        (ef21.MaxRowSumSharp(), Mixed(1, INF, -2), None),
        # What is kept loses a ninth of its squares: a third of ℓ1.
        (ef21.TopK(0.25) >> ef21.Natural(nearest=True), Mixed(1, 1), 1 / 4 * 2 / 3),
        (ef21.TopK(0.25) >> ef21.Natural(nearest=True), Mixed(3, 3), None),
        (ef21.RankK(0.25) >> ef21.Natural(), Schatten(2), 1 / 4 * (1 - 2 / 8 - 1 / 64)),
        (ef21.RankK(0.25) >> ef21.Natural(), Schatten(1), None),
    ],
    ids=repr,
)
def test_alpha_in_a_norm_is_as_counted_by_hand(compressor, norm, alpha):
    expected = alpha if alpha is None else pytest.approx(alpha)
    assert compressor.contraction(SHAPE, norm) == expected


def test_alpha_in_a_norm_of_each_matrix_of_a_stack_needs_a_share_of_each():
    one, several, frobenius = (1, *SHAPE), (5, *SHAPE), Schatten(2)
    for compressor in (ef21.TopK(0.25), ef21.TopK(0.25) >> ef21.Natural()):
        assert compressor.contraction(one, frobenius) == compressor.contraction(several)
        assert compressor.contraction(several, frobenius) is None
    each = (ef21.RandK(0.25), ef21.RankK(0.25), ef21.ColumnTopK(0.25), ef21.L1Sharp())
    for compressor in (*each, ef21.RandomSubspace(0.25), ef21.Natural(), ef21.Dropout(0.5)):
        assert compressor.contraction(several, frobenius) == compressor.contraction(SHAPE)


@pytest.mark.parametrize(
    "compressor, family, norms",
    [
        (ef21.TopK(0.25), "constant", [Mixed(p, p) for p in (1, 1.5, 2, 3)]),
        (ef21.L1Sharp(), "ties", [Mixed(p, p) for p in (1, 1.5, 2, 3)]),
        (TOP_SVD, "flat spectrum", [Schatten(p) for p in (1, 1.5, 2, 4)]),
        (ef21.ColumnTopK(0.25), "constant", [Mixed(2, q) for q in (1, 1.5, 2, 4)]),
        (ef21.Damping(1.5), "gaussian", list(GEOMETRIES)),
    ],
    ids=repr,
)
def test_alpha_in_a_norm_is_attained(compressor, family, norms):
    i = list(families(SHAPE)).index(family)
    x, c = (array[i] for array in draws(compressor))
    for norm in norms:
        lost = (norm.norm(c - x) / norm.norm(x)) ** 2
        np.testing.assert_allclose(lost, 1 - compressor.contraction(SHAPE, norm), atol=1e-5)


@pytest.mark.parametrize(
    "compressor, norm, alpha",
    [
        # B with the norm of a layer, B_* with the dual of it, B_2 with none.
        (TOP_SVD, ef21.Spectral(), None),
        (TOP_SVD, ef21.Nuclear(), 1 - (3 / 4) ** 2),
        (TOP_SVD, ef21.Scaled(ef21.Nuclear(), 3.0), 1 - (3 / 4) ** 2),
        (TOP_SVD, ef21.SchattenP(4), 1 - (3 / 4) ** (1 / 2)),
        (TOP_SVD, ef21.Frobenius(), 1 / 4),
        (ef21.TopK(0.25), ef21.RMS(), 1 / 4),
        (ef21.Natural(nearest=True), ef21.Sign(), 8 / 9),
        (ef21.Natural(nearest=True), ef21.MaxRowSum(), 8 / 9),
        (ef21.Natural(nearest=True), ef21.Spectral(), None),
    ],
    ids=repr,
)
def test_the_librarys_norms_say_what_a_compressor_needs_to_know(compressor, norm, alpha):
    expected = alpha if alpha is None else pytest.approx(alpha)
    assert compressor.contraction(SHAPE, norm) == expected


def test_only_what_sends_each_entry_alone_may_follow_a_factorisation():
    unbiased = ef21.Identity() >> ef21.Natural()
    assert unbiased.unbiased and unbiased.entrywise
    chain = ef21.RankK(0.25) >> unbiased
    assert chain.contraction(SHAPE) == (ef21.RankK(0.25) >> ef21.Natural()).contraction(SHAPE)

    class Quantizer(ef21.Identity):  # unbiased, with errors as large as the largest entry's
        entrywise = False

    assert (ef21.RankK(0.25) >> Quantizer()).contraction(SHAPE) is None


def test_only_the_chains_of_dependent_errors_have_no_alpha():
    for compressor in UNPROVED:
        while isinstance(compressor.first, ef21.Chain):
            compressor = compressor.first
        assert isinstance(compressor.first, ef21.RankK) and not compressor.then.unbiased


# --- Bias ---


def test_what_says_that_it_is_unbiased_is_tested_for_it_or_sends_the_array():
    claim = [c for c in COMPRESSORS + STEPS if c.unbiased]
    assert claim == [ef21.Identity(), ef21.Natural()]


@pytest.mark.parametrize(
    "compressor, mean",
    [
        (ef21.Natural(), ef21.Identity()),
        # Were both factors rounded by the same noise, the product would be biased.
        (ef21.RankK(0.25, exact=True) >> ef21.Natural(), ef21.RankK(0.25, exact=True)),
    ],
    ids=repr,
)
def test_natural_adds_no_bias_to_what_it_rounds(compressor, mean):
    trials = 1024
    # Small integers and shared signs: many equal entries, so that equal noise would show.
    x = jnp.asarray(np.random.default_rng(3).choice([1.3, 0.7, 2.9], size=SHAPE), jnp.float32)

    @jax.jit
    def rounded(x, keys):
        return jax.vmap(lambda key: ef21.dense(compressor.compress(x, key)))(keys)

    got = np.asarray(rounded(x, jax.random.split(KEY, trials)), float)
    expected = np.asarray(jax.jit(lambda x: ef21.dense(mean.compress(x, KEY)))(x), float)
    deviation = got.std(axis=0, ddof=1) / np.sqrt(trials)
    assert np.any(deviation > 0)
    # The largest of 240 is beyond 4.5 deviations once in 600 tests; this one is not random.
    assert np.all(np.abs(got.mean(axis=0) - expected) <= 4.5 * deviation + 1e-5)


# --- Low rank ---


@pytest.mark.parametrize(
    "matrix, share", [("gaussian", 0.75), ("power law", 0.97)], ids=["gaussian", "power law"]
)
def test_one_power_iteration_captures_most_of_what_the_best_would(matrix, share):
    shape = (48, 96)
    x = {
        "gaussian": np.random.default_rng(0).normal(size=shape),
        "power law": with_spectrum(shape, 1.0 / np.arange(1, 49)),
    }[matrix]
    keys = jax.random.split(KEY, 8)
    compressed = np.asarray(_captures(jnp.asarray(x, jnp.float32), keys), float)
    captured = 1 - np.sum((compressed - x) ** 2, axis=(1, 2)) / np.sum(x**2)
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    assert np.mean(captured) >= share * np.sum(squares[:4]) / np.sum(squares)


@jax.jit
def _captures(x, keys):
    return jax.vmap(lambda key: ef21.dense(ef21.RankK(0.1).compress(x, key)))(keys)


# --- Values ---


@pytest.mark.parametrize("compressor", COMPRESSORS + STEPS, ids=repr)
def test_compressors_are_values(compressor):
    again = eval(repr(compressor), vars(ef21))
    assert again == compressor and hash(again) == hash(compressor) and again is not compressor
    assert repr(again) == repr(compressor)
    assert [c for c in COMPRESSORS + STEPS if c == compressor] == [compressor]
    assert not callable(compressor)
    assert jax.tree.leaves(compressor) == [compressor]  # a leaf, not a tree
    for field in dataclasses.fields(compressor):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(compressor, field.name, None)


def test_a_representation_shows_how_a_chain_is_nested():
    first, second, third = ef21.RankK(0.25, exact=True), ef21.TopK(0.25), ef21.Natural()
    for chain in ((first >> second) >> third, first >> (second >> third)):
        assert eval(repr(chain), vars(ef21)) == chain
    assert repr(ef21.RankK(0.25, power_iterations=0)) == "RankK(0.25, power_iterations=0)"
    assert repr(first >> third) == "RankK(0.25, exact=True) >> Natural()"


BAD_FRACTIONS = (0.0, -0.1, 1.01, 15.0, float("nan"), float("inf"))


@pytest.mark.parametrize(
    "kind", [ef21.TopK, ef21.RandK, ef21.RankK, ef21.ColumnTopK, ef21.RandomSubspace]
)
@pytest.mark.parametrize("fraction", BAD_FRACTIONS)
def test_bad_fractions_are_named(kind, fraction):
    with pytest.raises(ValueError, match=rf"`fraction` of {kind.__name__}.*got {fraction}\."):
        kind(fraction)


def test_bad_power_iterations_are_named():
    with pytest.raises(ValueError, match="`power_iterations`.*got -1"):
        ef21.RankK(0.1, power_iterations=-1)
    with pytest.raises(ValueError, match="`power_iterations`.*got -2"):
        ef21.NuclearSharp(power_iterations=-2)


@pytest.mark.parametrize("value", [0.0, 2.0, -1.0, float("nan"), float("inf")])
def test_bad_factors_and_probabilities_are_named(value):
    with pytest.raises(ValueError, match=rf"`factor` of Damping.*got {value}\."):
        ef21.Damping(value)
    with pytest.raises(ValueError, match=rf"`probability` of Dropout.*got {value}\."):
        ef21.Dropout(value)


def test_bad_columns_are_named():
    with pytest.raises(ValueError, match="`p` must be at least 1, got 0.5"):
        ef21.ColumnTopK(0.1, p=0.5)
    with pytest.raises(ValueError, match="`axis` must be -1 or -2, got 0"):
        ef21.ColumnTopK(0.1, axis=0)


@pytest.mark.parametrize("first", [ef21.Natural(), ef21.TopK(0.25) >> ef21.Natural()], ids=repr)
def test_nothing_can_follow_natural(first):
    with pytest.raises(ValueError, match="leaves no floats") as error:
        first >> ef21.TopK(0.1)
    assert repr(first) in str(error.value) and "TopK(0.1)" in str(error.value)


def test_only_compressors_chain():
    with pytest.raises(ValueError, match="0.1"):
        ef21.TopK(0.1) >> 0.1


@pytest.mark.parametrize("compressor", [ef21.TopK(0.01), ef21.RandK(0.01)], ids=repr)
def test_positions_that_no_int32_can_hold_are_refused(compressor):
    fits = jax.ShapeDtypeStruct((2**31 - 1,), jnp.float32)
    assert jax.eval_shape(compressor.compress, fits, KEY).where.count == (2**31 - 1) // 100
    with pytest.raises(ValueError, match=r"\(65536, 32768\)") as error:
        jax.eval_shape(compressor.compress, jax.ShapeDtypeStruct((65536, 32768), jnp.float32), KEY)
    assert repr(compressor) in str(error.value)


def indexed(jaxpr):
    """Every (length, dtype) that an integer counts along, in a program and those within it."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        operands = [v.aval for v in equation.invars if hasattr(v.aval, "shape")]
        if name == "iota":
            yield parameters["shape"][parameters["dimension"]], parameters["dtype"]
        elif name in ("argmax", "argmin"):
            (axis,) = parameters["axes"]
            yield operands[0].shape[axis], parameters["index_dtype"]
        elif name in ("gather", "scatter", "scatter-add"):
            dimensions = parameters["dimension_numbers"]
            axes = getattr(dimensions, "start_index_map", None)
            axes = dimensions.scatter_dims_to_operand_dims if axes is None else axes
            yield from ((operands[0].shape[axis], operands[1].dtype) for axis in axes)
        elif name == "cumsum" and jnp.issubdtype(operands[0].dtype, jnp.integer):
            yield operands[0].shape[parameters["axis"]], operands[0].dtype
        for parameter in parameters.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from indexed(inner)


BEYOND = (
    (2**31,),
    (2**31 + 8, 1),
    (2**16, 2**15),
    (2**17, 2**17),
    (2, 2**32),
    (2**20, 2**6, 2**6),
    (2**33,),
)


@pytest.mark.parametrize("compressor", COMPRESSORS + STEPS, ids=repr)
def test_beyond_2_31_entries_no_index_wraps(compressor):
    refused = 0
    for shape in BEYOND:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        def there_and_back(x, key):
            message = compressor.compress(x, key)
            return message, ef21.dense(message)

        try:
            program = jax.make_jaxpr(there_and_back)(x, KEY)
        except ValueError as error:
            assert re.search(r"\d{4,}", str(error)) and "plit the leaf" in str(error)
            refused += 1
            continue
        assert program.out_avals[-1].shape == shape
        for size, dtype in indexed(program.jaxpr):
            assert size <= jnp.iinfo(dtype).max + 1, shape
    whole = (ef21.Identity, ef21.Damping, ef21.Dropout)
    assert not (refused and isinstance(compressor, whole))


# --- Under JAX ---


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_vmap_equals_the_loop_and_no_gradient_passes(compressor):
    x, messages, expanded = sent(compressor)
    keys = jax.random.split(jax.random.key(0), (len(x), DRAWS))

    @jax.jit
    def one(x, key):
        def expand(x):
            message = compressor.compress(x, key)
            return ef21.dense(message), message

        expanded, pullback, message = jax.vjp(expand, x, has_aux=True)
        return message, expanded, pullback(jnp.ones_like(expanded))[0]

    names = list(families(SHAPE))
    for name, draw in [("gaussian", 0), ("power law", 5)]:
        i = names.index(name)
        message, alone, gradient = one(jnp.asarray(x[i]), keys[i, draw])
        assert np.all(np.asarray(gradient) == 0)
        if any(isinstance(part, PROJECTIONS) for part in parts(compressor)):
            np.testing.assert_allclose(alone, expanded[i, draw], atol=1e-5)
            continue
        row = jax.tree.map(lambda leaf, i=i, draw=draw: leaf[i, draw], messages)
        assert jax.tree.structure(message) == jax.tree.structure(row)
        jax.tree.map(np.testing.assert_array_equal, message, row)


def parts(compressor):
    if isinstance(compressor, ef21.Chain):
        return parts(compressor.first) + parts(compressor.then)
    return [compressor]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_the_random_use_their_key_and_the_others_do_not(compressor):
    _, c = draws(compressor)
    gaussian = c[list(families(SHAPE)).index("gaussian")]
    different = {draw.tobytes() for draw in gaussian}
    all_or_nothing = any(isinstance(part, ef21.Dropout) for part in parts(compressor))
    several = 2 if all_or_nothing else DRAWS
    assert len(different) == (several if is_random(compressor) else 1)


def test_chaining_is_associative_and_identity_is_neutral():
    rank, top = ef21.RankK(0.25, exact=True), ef21.TopK(0.25)
    nearest, identity = ef21.Natural(nearest=True), ef21.Identity()
    x = jnp.asarray(families(SHAPE)["gaussian"], jnp.float32)

    @jax.jit
    def all_of_them(x):
        return [
            c.compress(x, KEY)
            for c in [
                (rank >> top) >> nearest,
                rank >> (top >> nearest),
                identity >> (rank >> top >> nearest),
                (rank >> identity) >> top >> nearest,
                (rank >> top >> nearest),
            ]
        ]

    first, *others = all_of_them(x)
    for other in others:
        assert jax.tree.structure(first) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, first, other)


# --- Any finite array of any shape ---

SHAPES = ((), (0,), (5,), (4, 6), (3, 0), (2, 6, 5), (2, 1, 3, 4))
NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)
# Every compressor in two of the shapes and two of the dtypes: a program each.
CASES = [
    (compressor, SHAPES[(i + step) % len(SHAPES)], NARROW[(i + step) % len(NARROW)])
    for step, (i, compressor) in itertools.product((0, 4), enumerate(COMPRESSORS))
]


_expanded = jax.jit(lambda c, x, key: ef21.dense(c.compress(x, key)), static_argnums=0)


@pytest.mark.parametrize("compressor, shape, dtype", CASES)
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=strategies.data())
def test_what_is_finite_stays_finite_and_does_not_grow(compressor, shape, dtype, data):
    info = jnp.finfo(dtype)
    has_factors = any(isinstance(part, PROJECTIONS) for part in parts(compressor))
    size, largest = max(1, int(np.prod(shape))), float(info.max)
    width = 16 if dtype == jnp.float16 else 32
    elements = strategies.floats(-largest, largest, width=width)
    x = data.draw(hypothesis.extra.numpy.arrays(f"float{width}", shape, elements=elements))
    x = jnp.asarray(x, dtype)
    c = _expanded(compressor, x, jax.random.key(data.draw(strategies.integers(0, 2**31 - 1))))
    assert (c.shape, c.dtype) == (x.shape, x.dtype)
    x, c = np.asarray(x, np.float64), np.asarray(c, np.float64)
    assert np.all(np.isfinite(c))
    if has_factors and ef21.Natural() in parts(compressor):
        return  # contracts in expectation only
    if compressor.contraction(shape) is None:
        return
    # What is rounded among subnormals is rounded by their spacing, not by its own size.
    spacing = float(info.smallest_subnormal) * np.sqrt(size) if has_factors else 0.0
    assert np.linalg.norm(c - x) <= np.linalg.norm(x) * (1 + 1e-6) + 4 * spacing
