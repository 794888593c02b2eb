import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import (
    EXACT_NORMS,
    ITERATED_NORMS,
    NORMS,
    equations,
    families,
    needs_matrix,
    stacked_families,
    with_spectrum,
)

import ef21_jax as ef21


SHAPES = [(7, 5), (5, 9), (6,)]
SHAPED = [
    pytest.param(norm, shape, id=f"{norm!r}-{shape}")
    for norm in NORMS
    for shape in SHAPES
    if len(shape) > 1 or not needs_matrix(norm)
]
# The share of the dual norm that an oracle attains.
ATTAINED = {norm: 1 - 1e-5 for norm in EXACT_NORMS} | {norm: 0.985 for norm in ITERATED_NORMS}


def oracle(norm, x):
    """(‖x‖, ‖x‖_*) of one layer, by the definition, in float64."""
    match norm:
        case ef21.Scaled(base, scale):
            primal, dual = oracle(base, x)
            return primal / scale, dual * scale
        case ef21.Frobenius():
            return np.sqrt(np.sum(x**2)), np.sqrt(np.sum(x**2))
        case ef21.RMS():
            return np.sqrt(np.mean(x**2)), np.sqrt(np.sum(x**2) * x.size)
        case ef21.Sign():
            return np.max(np.abs(x)), np.sum(np.abs(x))
        case ef21.L1():
            return np.sum(np.abs(x)), np.max(np.abs(x))
        case ef21.Spectral():
            return oracle(ef21.SchattenP(math.inf), x)
        case ef21.Nuclear():
            return oracle(ef21.SchattenP(1), x)
        case ef21.SchattenP(p):
            sigmas = np.linalg.svd(x, compute_uv=False)
            return np.linalg.norm(sigmas, p), np.linalg.norm(sigmas, conjugate(p))
        case ef21.Shaped(base, -1, -2):
            return oracle(base, x.T)
    # The others as the paper writes them, for a matrix (fan_out, fan_in).
    paper = x.T
    match norm:
        case ef21.Mixed(p, q, axis):
            over = 0 if axis == -1 else 1
            primal = np.linalg.norm(np.linalg.norm(paper, p, axis=over), q)
            inner = np.linalg.norm(paper, conjugate(p), axis=over)
            return primal, np.linalg.norm(inner, conjugate(q))
        case ef21.ColumnNorm():
            columns = [np.linalg.norm(column) for column in paper.T]
            return max(columns), sum(columns)
        case ef21.RowNorm():
            rows = [np.linalg.norm(row) for row in paper]
            return max(rows), sum(rows)
        case ef21.MaxRowSum():
            return np.linalg.norm(paper, np.inf), sum(max(abs(row)) for row in paper)
        case ef21.MaxColumnSum():
            return np.linalg.norm(paper, 1), sum(max(abs(column)) for column in paper.T)


def conjugate(p):
    """The p* of 1/p + 1/p* = 1."""
    with np.errstate(divide="ignore"):
        return float(1 / (1 - 1 / np.float64(p)))


def inputs(shape, dtype=jnp.float32):
    """The families, whatever the shape: a vector is the first row of a matrix."""
    if len(shape) > 1:
        return stacked_families(shape, dtype)
    return stacked_families((2, *shape), dtype)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def applied(norm, g):
    """Everything a norm can do, for a stack of layers, each mapped by itself."""
    one = jax.vmap(lambda g: (norm.norm(g), norm.dual(g), norm.lmo(g), norm.sharp(g)))
    return one(g)


@functools.cache
def evaluated(norm, shape):
    """x, ‖x‖, ‖x‖_*, lmo(x) and x^♯ for all families: float64."""
    g = inputs(shape)
    return [np.asarray(a, np.float64) for a in (g, *applied(norm, g))]


def inner(x, y):
    return np.sum(x * y, axis=tuple(range(1, x.ndim)))


# --- Definitions ---


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_norms_and_duals_are_those_of_the_definition(norm, shape):
    g, primal, dual, *_ = evaluated(norm, shape)
    expected = np.asarray([oracle(norm, x) for x in g])
    np.testing.assert_allclose(primal, expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(dual, expected[:, 1], rtol=1e-5)


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_the_oracle_attains_the_dual_norm_from_within_the_ball(norm, shape):
    g, _, _, z, _ = evaluated(norm, shape)
    lengths = np.asarray([oracle(norm, x)[0] for x in z])
    duals = np.asarray([oracle(norm, x)[1] for x in g])
    assert np.all(lengths <= 1 + 1e-5)
    attained = -inner(g, z)
    assert np.all(attained >= ATTAINED[norm] * duals)
    assert np.all(attained <= (1 + 1e-5) * duals)


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_no_feasible_point_does_better_than_the_dual_norm(norm, shape):
    g, _, dual, _, _ = evaluated(norm, shape)
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(size=shape)
        z /= oracle(norm, z)[0]
        assert np.all(np.abs(inner(g, z)) <= (1 + 1e-5) * dual)


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_sharp_has_the_length_of_the_dual_norm(norm, shape):
    # Paper M, equations 33 and 34: ⟨x, x^♯⟩ = ‖x^♯‖² and ‖x‖_* = ‖x^♯‖.
    g, _, _, _, sharp = evaluated(norm, shape)
    lengths = np.asarray([oracle(norm, x)[0] for x in sharp])
    duals = np.asarray([oracle(norm, x)[1] for x in g])
    share = ATTAINED[norm]
    assert np.all(share * duals <= lengths) and np.all(lengths <= (1 + 2e-5) * duals)
    product = inner(g, sharp)
    assert np.all(share * lengths**2 <= product * (1 + 3e-5))
    assert np.all(product <= (1 + 3e-5) * duals**2)


# Where the quotients of an absolute norm and of a Schatten norm by ‖·‖_2 are largest and smallest.
def extremes(shape):
    if len(shape) == 1:
        return [np.ones(shape), np.eye(shape[0])[0]]
    entry, row, column = (np.zeros(shape) for _ in range(3))
    entry[-1, 0], row[1], column[:, 1] = 3.0, 0.1, -2.0
    return [np.ones(shape), entry, row, column, with_spectrum(shape, np.ones(min(shape)))]


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_the_equivalence_constants_hold_and_are_attained(norm, shape):
    lower, upper = norm.equivalence((4, 3, *shape) if len(shape) > 1 else shape)
    assert isinstance(lower, float) and isinstance(upper, float)
    rng = np.random.default_rng(0)
    xs = [*extremes(shape), *(rng.normal(size=shape) for _ in range(100))]
    for power in (3, 9):  # further from flat
        xs += [x**power for x in xs[-100:]]
    quotients = [np.sqrt(np.sum(x**2)) / oracle(norm, x)[0] for x in xs]
    np.testing.assert_allclose([min(quotients), max(quotients)], [lower, upper], rtol=1e-9)


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_absolute_norms_see_magnitudes_alone(norm):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 7, 5))
    sizes = np.asarray([oracle(norm, a)[0] for a in x])
    flipped = np.asarray([oracle(norm, abs(a))[0] for a in x])
    shrunk = np.asarray([oracle(norm, a * rng.uniform(size=a.shape))[0] for a in abs(x)])
    sees_magnitudes_alone = np.allclose(sizes, flipped) and np.all(shrunk <= flipped)
    assert norm.absolute == sees_magnitudes_alone


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_a_norm_knows_the_families_it_belongs_to(norm):
    xs = [*np.random.default_rng(0).normal(size=(5, 7, 5)), *extremes((7, 5))]

    def is_multiple(other):
        quotients = [oracle(norm, x)[0] / oracle(other, x)[0] for x in xs]
        return np.allclose(quotients, quotients[0])

    powers = (1, 1.5, 2, 4, math.inf)
    schatten = [p for p in powers if is_multiple(ef21.SchattenP(p))]
    assert schatten == ([] if norm.schatten is None else [norm.schatten])
    mixed = [
        (p, q, axis)
        for p, q, axis in itertools.product(powers, powers, (-1, -2))
        if is_multiple(ef21.Mixed(p, q, axis))
    ]
    if isinstance(norm, ef21.Shaped):
        assert norm.mixed is None  # Its rows are not those of the leaf.
    else:
        assert mixed[:1] == ([] if norm.mixed is None else [norm.mixed])


@pytest.mark.parametrize(
    "norm, inputs_in, outputs_in",
    [
        (ef21.Sign(), 1, np.inf),
        (ef21.ColumnNorm(), 1, 2),
        (ef21.MaxColumnSum(), 1, 1),
        (ef21.MaxRowSum(), np.inf, np.inf),
        (ef21.RowNorm(), 2, np.inf),
        (ef21.Spectral(), 2, 2),
    ],
    ids=repr,
)
def test_operator_norms_are_the_greatest_gain_from_input_to_output(norm, inputs_in, outputs_in):
    # y = x W, with W (fan_in, fan_out): a convex function of x, greatest in a corner of the ball.
    w = np.random.default_rng(0).normal(size=(7, 5))
    if inputs_in == 1:
        corners = np.eye(7)
    elif inputs_in == np.inf:
        corners = np.array(list(itertools.product([-1.0, 1.0], repeat=7)))
    else:  # The ball is round: many points, the best for each output, and ascent from these.
        corners = np.concatenate([np.random.default_rng(1).normal(size=(1000, 7)), w.T])
        corners = np.concatenate([corners, corners @ np.linalg.matrix_power(w @ w.T, 100)])
        corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    gains = np.linalg.norm(corners @ w, outputs_in, axis=1)
    got = float(norm.norm(jnp.asarray(w, jnp.float32)))
    assert np.max(gains) <= got * (1 + 1e-6)
    np.testing.assert_allclose(got, np.max(gains), rtol=1e-6)


# --- Scale, zero, precision ---


@pytest.mark.parametrize("norm, shape", SHAPED)
def test_the_oracle_does_not_know_the_scale(norm, shape):
    g = np.random.default_rng(1).normal(size=shape)
    g /= np.max(np.abs(g))
    # As many as families: the same program. The first two are subnormal, the last near the end.
    scales = np.array(
        [1e-45, 1e-39, 1e-37, 1e-30, 1e-20, 1e-10, 1, 1e3, 1e10, 1e20, 1e30, 1e37, 3e38]
    )
    stack = jnp.asarray(scales.reshape(-1, *[1] * len(shape)) * g, jnp.float32)
    primal, dual, z, _ = (np.asarray(a, np.float64) for a in applied(norm, stack))
    assert np.all(np.isfinite(z))
    known = np.broadcast_to(z[6], z[3:].shape)
    np.testing.assert_allclose(z[3:], known, rtol=1e-4, atol=1e-5)
    for value in (primal, dual):
        np.testing.assert_allclose(value[3:11], value[6] * scales[3:11], rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_zero_gives_zero_in_every_dtype(norm):
    zeros = [jnp.zeros((3, 4), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
    if not needs_matrix(norm):
        zeros += [jnp.zeros(5), jnp.zeros(()), jnp.zeros((0, 3))]
    for zero, (primal, dual, z, sharp) in zip(zeros, _all_of_all(norm, zeros), strict=True):
        assert primal == 0 and dual == 0 and primal.dtype == dual.dtype == jnp.float32
        assert z.dtype == sharp.dtype == zero.dtype and z.shape == sharp.shape == zero.shape
        assert np.all(np.asarray(z) == 0) and np.all(np.asarray(sharp) == 0)


@functools.partial(jax.jit, static_argnums=0)
def _all_of_all(norm, arrays):
    return [(norm.norm(g), norm.dual(g), norm.lmo(g), norm.sharp(g)) for g in arrays]


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_narrow_floats_are_computed_in_wide_ones(norm):
    g = inputs((7, 5), jnp.bfloat16)
    primal, dual, z, sharp = (np.asarray(a, np.float64) for a in applied(norm, g))
    wide = [np.asarray(a, np.float64) for a in applied(norm, g.astype(jnp.float32))]
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for got, expected in zip((primal, dual), wide[:2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=eps)
    # Scaling rounds a step once more.
    for got, expected, roundings in zip((z, sharp), wide[2:], (2, 1), strict=True):
        size = np.max(np.abs(expected), axis=(1, 2), keepdims=True)
        assert np.all(np.abs(got - expected) <= roundings * (eps / 2) * 1.01 * size)


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_float64_is_kept(norm):
    with jax.enable_x64(True):
        for dtype in ("float32", "float64"):
            g = jax.ShapeDtypeStruct((2, 3, 4), jnp.dtype(dtype))
            (shapes,) = jax.eval_shape(functools.partial(_all_of_all, norm), [g])
            assert {a.dtype for a in shapes} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_layers_past_the_largest_index_are_no_special_case(norm):
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = jax.ShapeDtypeStruct((2**16, 2**16 + 1), dtype)
        assert jax.eval_shape(norm.lmo, layer) == layer


# --- Ties ---


@pytest.mark.parametrize(
    "norm, where",
    [
        (ef21.L1(), [(0, 0)]),
        (ef21.Mixed(1, 1), [(0, 0)]),
        (ef21.MaxColumnSum(), [(0, 0), (1, 0), (2, 0)]),
        (ef21.MaxRowSum(), [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (ef21.Mixed(2, 1), [(0, 0), (0, 1), (0, 2), (0, 3)]),
        (ef21.Mixed(2, 1, axis=-2), [(0, 0), (1, 0), (2, 0)]),
    ],
    ids=repr,
)
def test_ties_go_to_the_lowest_index(norm, where):
    signs = np.array([[1, -1, 1, 1], [-1, 1, 1, -1], [1, 1, -1, 1]])
    z = np.asarray(norm.lmo(jnp.asarray(0.3 * signs, jnp.float32)))
    expected = np.zeros((3, 4))
    expected[tuple(zip(*where, strict=True))] = -1
    expected *= signs / np.sqrt(max(1, len(where) if isinstance(norm, ef21.Mixed) else 1))
    np.testing.assert_allclose(z, expected, rtol=1e-6)


def test_of_equal_entries_the_first_is_the_lowest_in_fan_in_then_in_fan_out():
    g = jnp.array([[1.0, 2.0, 0.0, 1.0], [0.5, 0.0, 3.0, -3.0], [-3.0, 1.0, 1.0, 0.0]])
    z = np.asarray(ef21.L1().lmo(g))
    assert z[1, 2] == -1 and np.sum(np.abs(z)) == 1


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_of_equal_singular_values_the_nuclear_oracle_starts_from_the_lowest_index(shape):
    z = np.asarray(ef21.Nuclear().lmo(jnp.eye(*shape)))
    expected = np.zeros(shape)
    expected[0, 0] = -1
    np.testing.assert_allclose(z, expected, atol=1e-6)


@pytest.mark.parametrize(
    "norm", [n for n in EXACT_NORMS if n.schatten not in (None, 1, 2)], ids=repr
)
def test_directions_of_no_weight_are_left_out_not_guessed(norm):
    rank = 2  # of the family "low rank"
    shape = (7, 5)
    low = list(families(shape)).index("low rank")
    z = evaluated(norm, shape)[3][low]
    sigmas = np.linalg.svd(z, compute_uv=False)
    assert np.all(sigmas[rank:] <= 1e-6 * sigmas[0])


# --- The nuclear oracle ---


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_the_nuclear_oracle_attains_what_it_promises_whatever_the_spectrum(shape):
    spectra = {
        "flat": np.ones(48),
        "nearly flat": np.linspace(1.0, 0.99, 48),
        "two": np.array([1.0, 1.0 - 1e-5, *np.full(46, 0.5)]),
        "arithmetic": np.linspace(1.0, 0.0, 48),
        "geometric": 0.97 ** np.arange(48),
        "power law": np.arange(1, 49) ** -1.0,
        "one": np.eye(48)[0],
    }
    g = np.stack([with_spectrum(shape, s, seed) for seed, s in enumerate(spectra.values())])
    # The longest row and column are of no use here: they are orthogonal to the top pair.
    hidden = np.full(shape, 0.0)
    hidden[0, 0], hidden[1:, 1:] = 1.0, 0.9 / np.sqrt(47)
    g = np.concatenate([g, hidden[None]])
    for squarings in (3, 10):
        z = np.asarray(ef21.Nuclear(squarings).lmo(jnp.asarray(g, jnp.float32)), float)
        lengths = np.sum(np.linalg.svd(z, compute_uv=False), axis=1)
        attained = -inner(g, z) / np.linalg.norm(g, 2, axis=(1, 2))
        assert np.all(lengths <= 1 + 1e-5)
        assert np.all(attained >= 48 ** -(0.5 ** (squarings + 1)) - 1e-5)
        assert np.all(attained <= 1 + 1e-5)


FACTORISATIONS = ("svd", "eigh", "qr", "householder", "cholesky", "lu", "triangular_solve", "sort")


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_steps_are_matrix_products_unless_they_say_otherwise(norm):
    base = getattr(norm, "base", norm)
    says_otherwise = getattr(base, "exact", False) or isinstance(base, ef21.SchattenP)
    for method in (norm.lmo, norm.sharp):
        program = jax.make_jaxpr(method)(jnp.ones((6, 4)))
        names = {equation.primitive.name for equation in equations(program.jaxpr)}
        assert bool(names & set(FACTORISATIONS)) == says_otherwise


# --- Axes ---


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_leading_axes_are_layers_of_their_own(norm):
    g = inputs((7, 5))
    (batched,) = _all_of_all(norm, [g])
    for got, looped in zip(batched, applied(norm, g), strict=True):
        assert (got.shape, got.dtype) == (looped.shape, looped.dtype)
        got, looped = (np.asarray(a, float).reshape(len(g), -1) for a in (got, looped))
        size = np.max(np.abs(looped), axis=1, keepdims=True)
        assert np.all(np.abs(got - looped) <= 1e-5 * size)
    shapes = jax.eval_shape(
        functools.partial(_all_of_all, norm), [jax.ShapeDtypeStruct((2, 3, 7, 5), jnp.float32)]
    )
    assert [a.shape for a in shapes[0]] == [(2, 3), (2, 3), (2, 3, 7, 5), (2, 3, 7, 5)]


@pytest.mark.parametrize("norm", [n for n in NORMS if needs_matrix(n)], ids=repr)
def test_norms_of_matrices_refuse_vectors(norm):
    for method in (norm.norm, norm.dual, norm.lmo, norm.sharp):
        with pytest.raises(ValueError, match=r"needs a matrix, got shape|among the 1 of \(4,\)"):
            method(jnp.ones(4))


# --- Values ---


@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_norms_are_values(norm):
    again = eval(repr(norm), {**vars(ef21), "inf": math.inf})
    assert again == norm and hash(again) == hash(norm) and repr(again) == repr(norm)
    assert not callable(norm)
    assert jax.tree.leaves(norm) == [norm]


def test_scaling_scales_the_ball():
    g = inputs((7, 5))
    primal, dual, z, sharp = applied(ef21.Frobenius(), g)
    scaled = applied(ef21.Scaled(ef21.Frobenius(), 4.0), g)
    for got, expected in zip(scaled, (primal / 4, dual * 4, z * 4, sharp * 16), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ef21.SchattenP(0.5), "`p` must be at least 1, got 0.5"),
        (lambda: ef21.SchattenP(math.nan), "`p` must be at least 1, got nan"),
        (lambda: ef21.Mixed(-1, 2), "`p` must be at least 1, got -1"),
        (lambda: ef21.Mixed(1, 0), "`q` must be at least 1, got 0"),
        (lambda: ef21.Mixed(1, 2, axis=0), "`axis` must be -1 or -2, got 0"),
        (lambda: ef21.Nuclear(-1), "`squarings` must not be negative, got -1"),
        (lambda: ef21.Shaped(ef21.Sign(), 0, 1, splits=0), "`splits` must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scales_are_named(scale):
    with pytest.raises(ValueError, match=rf"`scale`.*got {scale}\."):
        ef21.Scaled(ef21.Sign(), scale)


def test_other_coefficients_show_and_tell():
    norm = ef21.Spectral(ef21.JORDAN)
    assert eval(repr(norm), vars(ef21)) == norm != ef21.Spectral()
    g = inputs((7, 5))
    z = np.asarray(applied(norm, g)[2], np.float64)
    assert np.all(np.linalg.norm(z, 2, axis=(1, 2)) <= 1.21)
    assert np.max(np.abs(z - np.asarray(applied(ef21.Spectral(), g)[2]))) > 0.05
