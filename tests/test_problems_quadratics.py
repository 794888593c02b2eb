"""Rippled quadratics: each constant that they claim is never exceeded, and nearly attained."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef21_jax as ef21
from experiments.problems import quadratics


SHAPE, N = (3, 4), 3
NORMS = (
    ef21.Frobenius(),
    ef21.Spectral(exact=True),
    ef21.Nuclear(exact=True),
    ef21.Sign(),
    ef21.L1(),
)
PROBLEMS = {
    "same": quadratics.same(N, SHAPE),
    "different": quadratics.different(N, SHAPE),
    "waves": quadratics.waves(N, SHAPE),
    "chirps": quadratics.chirps(N, SHAPE),
}
SMOOTH = ("same", "different", "waves")


def gradients(problem, points):
    """∇f_j, (points, n, m, k), in closed form and float64."""
    d = points[:, None] - problem.centre
    wave, chirp = (part[:, None, None] for part in (problem.wave, problem.chirp))
    return problem.left @ d @ problem.right + wave * np.sin(d) + chirp * np.sin(np.pi * d**2 / 2)


def dual(norm, x):
    """In float64: float32 could not tell a quotient from its bound."""
    return _length(norm, x, {"Spectral": "nuc", "Nuclear": 2, "Sign": "sum", "L1": "max"})


def length(norm, x):
    return _length(norm, x, {"Spectral": 2, "Nuclear": "nuc", "Sign": "max", "L1": "sum"})


def _length(norm, x, kinds):
    kind = kinds.get(type(norm).__name__, "fro")
    if kind in ("sum", "max"):
        return getattr(np.abs(x), kind)(axis=(-2, -1))
    return np.linalg.norm(x, kind, axis=(-2, -1))


def pairs(problem, norm, count=4000):
    """Points X, and steps from them: random ones, isometries, signs, entries, and extreme ones."""
    rng = np.random.default_rng(1)
    spread = rng.choice([1e-3, 0.1, 1.0, 10.0], (count, 1, 1))
    points = problem.centre[rng.integers(N, size=count)] + spread * rng.normal(size=(count, *SHAPE))
    steps = rng.normal(size=(count, *SHAPE))
    left, _, right = np.linalg.svd(steps[: count // 4], full_matrices=False)
    steps[: count // 4] = left @ right
    steps[count // 4 : count // 2] = np.sign(steps[count // 4 : count // 2])
    steps[count // 2] = 1.0
    corners = np.eye(math.prod(SHAPE)).reshape(-1, *SHAPE)
    steps[-len(corners) :] = corners
    for kernels in range(N):  # the top eigenvectors, and the isometry that lines them up
        _, P = np.linalg.eigh(problem.left[kernels])
        _, Q = np.linalg.eigh(problem.right[kernels])
        short = min(SHAPE)
        steps[2 * kernels + 10] = np.outer(P[:, -1], Q[:, -1])
        steps[2 * kernels + 11] = P[:, ::-1][:, :short] @ Q[:, ::-1][:, :short].T
        points[2 * kernels + 10 : 2 * kernels + 12] = problem.centre[kernels]
    points[count // 2] = problem.centre[0]
    steps = steps / length(norm, steps)[:, None, None]
    return points, steps * rng.choice([1e-4, 1e-2, 1.0, 5.0], (count, 1, 1))


@pytest.mark.parametrize("norm", NORMS, ids=repr)
@pytest.mark.parametrize("name", SMOOTH)
def test_smoothness_is_never_exceeded_and_attained(name, norm):
    problem = PROBLEMS[name]
    points, steps = pairs(problem, norm)
    steps[: len(steps) // 2] *= 1e-4 / length(norm, steps[: len(steps) // 2])[:, None, None]
    change = gradients(problem, points + steps) - gradients(problem, points)
    longest = length(norm, steps)[:, None]
    L, L_workers = problem.smoothness(norm)
    quotients = np.max(dual(norm, change) / longest, axis=0)
    assert np.all(quotients <= np.multiply(L_workers, 1 + 1e-6))
    of_mean = np.max(dual(norm, change.mean(axis=1)) / longest[:, 0])
    assert of_mean <= L * (1 + 1e-6)
    if name == "different":  # each has kernels of its own: only its own extreme step attains L_j
        assert np.all(quotients >= np.multiply(L_workers, 0.97))
        assert of_mean >= 0.9 * L
    else:
        np.testing.assert_allclose(quotients, L_workers, rtol=2e-3)
        assert of_mean == pytest.approx(L, rel=2e-3)


@pytest.mark.parametrize("norm", NORMS[:2] + NORMS[3:4], ids=repr)
def test_generalized_smoothness_of_a_chirp_is_never_exceeded(norm):
    problem = PROBLEMS["chirps"]
    # A louder one, far out too, so that L1 has something to do.
    problem = dataclasses.replace(problem, chirp=problem.chirp * 16)
    L0, L1, L0_workers, L1_workers = problem.generalized(norm)
    points, steps = pairs(problem, norm)
    far = np.random.default_rng(2).choice([1.0, 30.0], (len(points), 1, 1))
    points = problem.centre[0] + far * (points - problem.centre[0])
    before, after = gradients(problem, points), gradients(problem, points + steps)
    change, size = dual(norm, after - before), dual(norm, before)
    longest = length(norm, steps)[:, None]
    assert np.all(change <= (np.array(L0_workers) + L1_workers * size) * longest * (1 + 1e-9))
    change, size = dual(norm, (after - before).mean(axis=1)), dual(norm, before.mean(axis=1))
    quotients = change / longest[:, 0]
    assert np.all(quotients <= (L0 + L1 * size) * (1 + 1e-9))
    assert np.max(quotients) > 3 * L0  # no L0 alone would do


def test_a_chirps_constants_are_attained_by_a_single_entry():
    # At x = √(2k): φ'' = 1 + π a x, |φ'| = x.
    a, x = 0.5, math.sqrt(4 * 10_000.0)
    problem = quadratics.Quadratics(
        left=np.ones((1, 1, 1)),
        right=np.ones((1, 1, 1)),
        centre=np.zeros((1, 1, 1)),
        wave=np.zeros(1),
        chirp=np.full(1, a),
    )
    L0, L1, *_ = problem.generalized(ef21.Frobenius())
    slope = np.diff(gradients(problem, np.array([x, x + 1e-7]).reshape(2, 1, 1)).ravel())[0] / 1e-7
    assert 0.98 <= slope / (L0 + L1 * x) <= 1


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_the_loss(name):
    problem = PROBLEMS[name]
    x = problem.start(seed=3, distance=1.5)
    workers = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.workers)
    found = jax.vmap(jax.grad(problem.loss), in_axes=(None, 0))(jnp.asarray(x, float), workers)
    np.testing.assert_allclose(found, gradients(problem, x[None])[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_lower_bounds_are_where_they_should_be(name):
    problem = PROBLEMS[name]
    workers = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.workers)
    losses = jax.jit(jax.vmap(jax.vmap(problem.loss, in_axes=(None, 0)), in_axes=(0, None)))
    rng = np.random.default_rng(0)
    spread = rng.choice([0.0, 0.01, 0.3, 3.0], (2000, 1, 1))
    points = problem.minimizer + spread * rng.normal(size=(2000, *SHAPE))
    values = np.asarray(losses(jnp.asarray(points, float), workers))
    assert np.all(values >= -1e-4)
    assert np.min(values.mean(axis=1)) == pytest.approx(problem.lower, rel=1e-5, abs=1e-5)
    at_centres = np.asarray(losses(jnp.asarray(problem.centre, float), workers))
    np.testing.assert_allclose(np.diag(at_centres), problem.worker_lowers, atol=1e-6)
    assert (problem.lower > 0.1) == (name == "different")
    stationary = gradients(problem, problem.minimizer[None])[0].mean(axis=0)
    np.testing.assert_allclose(stationary, 0, atol=1e-9)


def test_waves_are_not_convex_and_a_start_is_as_far_as_asked():
    problem = PROBLEMS["waves"]
    d = np.full(SHAPE, math.pi)
    curvature = gradients(problem, problem.centre[0] + np.stack([d, d + 1e-6])).mean(axis=1)
    assert np.all(np.diff(curvature, axis=0) < 0)
    start = problem.start(seed=5, distance=0.25)
    np.testing.assert_allclose(np.abs(start - problem.minimizer), 0.25)
    assert not np.array_equal(start, problem.start(seed=6, distance=0.25))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"left": -np.stack([np.eye(3)] * N)}, "`left` must be symmetric"),
        ({"right": np.triu(np.ones((N, 4, 4)))}, "`right` must be symmetric"),
        ({"left": np.stack([np.ones((3, 3)) - 0.9 * np.eye(3)] * N)}, "eigenvalues"),
        ({"wave": np.full(N, -1.0)}, "`wave` must not be negative"),
        ({"chirp": np.ones(N)}, "`chirp` needs scalar kernels"),
    ],
)
def test_problems_whose_constants_would_be_wrong_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROBLEMS["different"], **change)


def test_constants_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="Constants are known in Frobenius"):
        PROBLEMS["same"].smoothness(ef21.ColumnNorm())
    with pytest.raises(ValueError, match="not smooth"):
        PROBLEMS["chirps"].smoothness(ef21.Sign())
    with pytest.raises(ValueError, match="Constants are known in Frobenius, Sign, Spectral"):
        PROBLEMS["chirps"].generalized(ef21.L1())
    loud = dataclasses.replace(PROBLEMS["chirps"], wave=np.ones(N))
    with pytest.raises(ValueError, match="leave one out"):
        loud.generalized(ef21.Sign())
