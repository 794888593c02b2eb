import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import equations, with_spectrum

import ef21_jax as ef21
from ef21_jax import _polar
from ef21_jax._polar import _iterate, _iterate_gram, orthogonalize, unit_scale


SIGMAS = np.concatenate([np.logspace(-8, 0, 20_001), np.linspace(0, 1, 10_001)[1:]])


def stages(sigma, coefficients):
    """What the iterations make of singular values, one row after each step: float64."""
    rows = []
    for a, b, c in coefficients:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
        rows.append(sigma)
    return np.stack(rows)


# --- The polynomials ---


@pytest.mark.parametrize("steps", range(1, 9))
def test_no_singular_value_is_reversed_and_none_ends_above_one(steps):
    rows = stages(SIGMAS, ef21.polar_express(steps))
    assert len(rows) == steps
    assert np.all(rows > 0)
    assert np.max(rows[-1]) <= 1 + 1e-6
    assert np.max(rows[-1]) >= 1 - 1e-6


def test_more_steps_bring_smaller_singular_values_home():
    worst = []
    for steps in range(1, 9):
        last = stages(SIGMAS, ef21.polar_express(steps))[-1]
        worst.append(np.min(last[SIGMAS >= 1e-3]))
    assert np.all(np.diff(worst) > 0)
    assert worst[5] >= 0.994 and worst[7] >= 1 - 1e-6
    assert ef21.POLAR_EXPRESS == ef21.polar_express(6)


def test_the_damped_basin_is_never_left_through_rounding():
    # One per cent too large on entry, which is what the damping is for.
    for steps in range(2, 9):
        rows = stages(np.linspace(1, 1.01, 101), ef21.polar_express(steps))
        assert np.all(rows > 0) and np.max(rows[-1]) <= 1.001


@pytest.mark.parametrize("steps", [0, 9, -1])
def test_steps_out_of_range_are_named(steps):
    with pytest.raises(ValueError, match=rf"`steps` must lie in 1\.\.8, got {steps}"):
        ef21.polar_express(steps)


TABLES = {
    "JORDAN": (ef21.JORDAN, 3e-3, 0.68, 1.21),
    "YOU": (ef21.YOU, 0.01, 0.97, 1.04),
    "CUBIC": (ef21.CUBIC, 0.01, 0.77, 1.30),
    "POLAR_EXPRESS": (ef21.POLAR_EXPRESS, 1e-3, 0.994, 1.0 + 1e-6),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_table_ends_where_it_is_known_to_and_reverses_nothing(name):
    coefficients, least, low, high = TABLES[name]
    last = stages(SIGMAS[SIGMAS >= least], coefficients)[-1]
    assert low <= np.min(last) <= low + 0.01 and high - 0.01 <= np.max(last) <= high
    assert np.all(stages(SIGMAS, coefficients) > 0)
    # Rounding may bring σ = 1, the one of a matrix of rank one, a little above.
    assert np.all(stages(np.linspace(1, 1.003, 11), coefficients) > 0)


# --- The iterations ---


def spectra(r):
    i = np.arange(1, r + 1)
    gaussian = np.random.default_rng(0).normal(size=(r, 5 * r // 2))
    return {
        "gaussian": np.linalg.svd(gaussian, compute_uv=False),
        "power law": 1.0 / i,
        "flat": np.ones(r),
        "steep power law": 1.0 / i**2,
        "rank one": (i == 1) * 1.0,
        "low rank and noise": np.where(i <= 3, 1.0, 1e-4),
        "near singular": np.where(i == r, 1e-6, 1.0),
    }


# Rows of one shape, so that all of them go through one program.
SHAPES = [(16, 18), (18, 16), (16, 40), (40, 16)]  # plain and Gram, wide and tall


def inputs(shape):
    found = spectra(min(shape)).values()
    matrices = [with_spectrum(shape, spectrum, seed=1) for spectrum in found]
    rng = np.random.default_rng(1)
    sparse = np.where(rng.uniform(size=shape) < 0.03, rng.normal(size=shape), 0.0)
    return np.stack([*matrices, sparse])


def exact(x, coefficients):
    """U p(Σ) Vᵀ, what the iterations are in exact arithmetic."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2, axis=-1, keepdims=True))
    return np.einsum("...mr,...r,...rn->...mn", u, stages(s, coefficients)[-1], vt)


WELL_CONDITIONED = 3  # the first three
# A Gram matrix holds squares, hence σ down to the root of an eps only; what is below comes out of
# its rounding, multiplied by some 2000. Of no weight in ⟨G, O⟩, as the test of η below shows.
ERRORS = {"plain": (1e-5, 2e-4), "gram": (3e-5, 5e-3)}


def check(o, expected, form):
    errors = np.linalg.norm(o - expected, 2, axis=(1, 2))
    well, ill = ERRORS[form]
    assert np.all(errors[:WELL_CONDITIONED] <= well) and np.all(errors <= ill), errors


@pytest.mark.parametrize("coefficients", [ef21.POLAR_EXPRESS, ef21.JORDAN], ids=["PE", "JORDAN"])
@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_iterations_apply_the_polynomials_to_the_singular_values(shape, coefficients):
    x = jnp.asarray(inputs(shape), jnp.float32)
    o = np.asarray(_orthogonalize(x, coefficients), np.float64)
    expected = exact(np.asarray(x, np.float64), coefficients)
    check(o, expected, "gram" if max(shape) >= 1.5 * min(shape) else "plain")


_orthogonalize = jax.jit(orthogonalize, static_argnums=1)


@pytest.mark.parametrize("shape", [(16, 18), (40, 16)], ids=repr)
def test_plain_and_gram_form_agree(shape):
    wide = shape[0] < shape[1]

    @jax.jit
    def both(x):
        x = unit_scale(x, (-2, -1))
        return [form(x, ef21.POLAR_EXPRESS, wide, x.dtype) for form in (_iterate, _iterate_gram)]

    plain, gram = both(jnp.asarray(inputs(shape), jnp.float32))
    check(np.asarray(plain, np.float64), np.asarray(gram, np.float64), "gram")


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_the_step_is_nearly_the_best_in_the_ball(shape, blocks, monkeypatch):
    # η = ⟨G, O⟩ / (‖G‖_* ‖O‖₂), the share of the best linear decrease that the step attains.
    monkeypatch.setattr(_polar, "_WORTH_BLOCKS", 1 if blocks else 256)
    x = inputs(shape)
    o = jax.jit(lambda x: orthogonalize(x))(jnp.asarray(x, jnp.float32))
    o = np.asarray(o, np.float64)
    length = np.linalg.norm(o, 2, axis=(1, 2))
    attained = np.sum(x * o, axis=(1, 2)) / (np.linalg.norm(x, "nuc", axis=(1, 2)) * length)
    assert np.all(attained >= 0.985) and np.all(attained <= 1 + 1e-6)
    assert np.all(length <= 1 + 1e-5)


@pytest.mark.parametrize("shape", [(16, 18), (40, 16)], ids=repr)
def test_the_polar_factor_does_not_know_the_scale(shape):
    x = np.random.default_rng(2).normal(size=shape)
    scales = np.asarray([1.0, 1e-30, 1e-20, 1e20, 1e30])[:, None, None]
    o = np.asarray(_orthogonalize(jnp.asarray(scales * x, jnp.float32), ef21.POLAR_EXPRESS))
    np.testing.assert_allclose(o, np.broadcast_to(o[0], o.shape), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=jnp.dtype)
def test_zero_has_no_direction_and_the_dtype_is_kept(dtype):
    x = jnp.asarray(np.stack([np.zeros((4, 6)), np.eye(4, 6)]), dtype)
    o = _orthogonalize(x, ef21.POLAR_EXPRESS)
    assert (o.shape, o.dtype) == (x.shape, dtype)
    assert np.all(np.asarray(o[0]) == 0)
    np.testing.assert_allclose(np.asarray(o[1], float), np.eye(4, 6), atol=0.01)
    for shape in [(0, 3), (3, 0), (2, 0, 3), (0, 2, 2)]:
        empty = jax.eval_shape(orthogonalize, jax.ShapeDtypeStruct(shape, dtype))
        assert (empty.shape, empty.dtype) == (shape, dtype)


def test_unit_scale_has_length_one_whatever_the_size():
    x = np.random.default_rng(3).normal(size=(5, 3, 4))
    scaled = jnp.asarray(x * np.asarray([1e-30, 1e-10, 1, 1e30, 0])[:, None, None], jnp.float32)
    lengths = np.linalg.norm(np.asarray(unit_scale(scaled, (-2, -1)), float), axis=(1, 2))
    np.testing.assert_allclose(lengths, [1, 1, 1, 1, 0], rtol=1e-6)
    whole = np.asarray(unit_scale(jnp.asarray(x, jnp.float32), (0, 1, 2)), float)
    assert np.linalg.norm(whole) == pytest.approx(1, rel=1e-6)


# With products of bfloat16: the least alignment, of a matrix of rank one, and the largest σ.
IN_BFLOAT16 = {"POLAR_EXPRESS": (0.9, 1.02), "YOU": (0.85, 1.16), "JORDAN": (0.62, 1.21)}


@pytest.mark.parametrize("shape", [(16, 18), (18, 16), (96, 384), (384, 96)], ids=repr)
@pytest.mark.parametrize("table", IN_BFLOAT16)
def test_products_of_bfloat16_cost_little_alignment(table, shape):
    least, largest = IN_BFLOAT16[table]
    x = inputs(shape)
    norm = ef21.Spectral(getattr(ef21, table), dtype=jnp.bfloat16)
    o = jax.jit(norm.lmo)(jnp.asarray(x, jnp.float32))
    assert o.dtype == jnp.float32
    o = -np.asarray(o, np.float64)
    length = np.linalg.norm(o, 2, axis=(1, 2))
    attained = np.sum(x * o, axis=(1, 2)) / (np.linalg.norm(x, "nuc", axis=(1, 2)) * length)
    assert np.all(attained >= least) and np.all(length <= largest)


@pytest.mark.parametrize("shape", [(6, 7), (7, 6), (5, 16), (16, 5)], ids=repr)
def test_products_of_bfloat16_may_be_transposed(shape, optimized):
    def polar(x):
        return orthogonalize(x, dtype=jnp.bfloat16)

    x = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)
    expected = jax.jit(polar)(x)
    np.testing.assert_allclose(jax.jit(lambda x: polar(x).T)(x), expected.T, atol=0.02)
    np.testing.assert_allclose(jax.jit(lambda x: polar(x.T).T)(x), expected, atol=0.02)


def test_only_what_is_multiplied_is_in_bfloat16():
    norm = ef21.Spectral(dtype=jnp.bfloat16)
    program = jax.make_jaxpr(norm.lmo)(jax.ShapeDtypeStruct((8, 16), jnp.float32))
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert {operand.aval.dtype for operand in product.invars} == {jnp.dtype(jnp.bfloat16)}
        assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("shape", [(17, 40), (19, 17)], ids=repr)
def test_blocks_of_unequal_size_make_the_same_products(shape, monkeypatch):
    x = jnp.asarray(np.random.default_rng(4).normal(size=shape), jnp.float32)
    whole = jax.jit(lambda x: orthogonalize(x))(x)
    monkeypatch.setattr(_polar, "_WORTH_BLOCKS", 1)
    np.testing.assert_allclose(jax.jit(lambda x: orthogonalize(x))(x), whole, atol=2e-5)


def test_eight_steps_in_gram_form_end_below_one_thanks_to_a_restart():
    # A spectrum so steep that the Gram matrix holds rounding where the small singular values are.
    x = with_spectrum((16, 40), np.arange(1.0, 17) ** -3, seed=1)[None]
    o = jax.jit(lambda x: orthogonalize(x, ef21.polar_express(8)))(jnp.asarray(x, jnp.float32))
    assert np.linalg.norm(np.asarray(o[0], float), 2) <= 1.001
