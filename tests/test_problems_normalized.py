"""Paper N's problems: every constant is right, and where it is sharp, nearly attained."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef21_jax as ef21
from experiments import descent
from experiments.problems import counterexample, logistic, polynomial


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def derivatives(problem, points):
    """Gradients (points, n, d) and Hessians (points, n, d, d) of every worker's function."""
    workers = jax.tree.map(jnp.asarray, problem.workers)

    def of_all(f):
        over_workers = jax.vmap(f, in_axes=(None, 0))
        over_points = jax.vmap(over_workers, in_axes=(0, None))
        return np.asarray(jax.jit(over_points)(jnp.asarray(points), workers))

    return of_all(jax.grad(problem.loss)), of_all(jax.hessian(problem.loss))


def spectral(hessians):
    return np.max(np.abs(np.linalg.eigvalsh(hessians)), axis=-1)


def shares(problem, points):
    """‖∇²f_i‖ / (L0 + L1 ‖∇f_i‖), at every point and worker."""
    gradients, hessians = derivatives(problem, points)
    return spectral(hessians) / (problem.L0 + problem.L1 * np.linalg.norm(gradients, axis=-1))


def far_and_near(dimension, count=200, seed=0):
    """Points of lengths from 1e-2 to 1e3, and zero."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, dimension)) * np.geomspace(1e-2, 1e3, count)[:, None]
    return np.vstack([points, np.zeros(dimension)])


def assert_symmetric(problem, seed=0):
    """Assumption 3 itself, on random pairs, with the supremum over 65 points between them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, problem.dimension)) * np.geomspace(0.1, 30, 40)[:, None]
    y = x + rng.normal(size=x.shape) * np.geomspace(10, 0.01, 40)[:, None]
    between = np.linspace(x, y, 65, axis=1)
    gradients, _ = derivatives(problem, between.reshape(-1, problem.dimension))
    gradients = gradients.reshape(40, 65, -1, problem.dimension)
    difference = np.linalg.norm(gradients[:, -1] - gradients[:, 0], axis=-1)
    largest = np.max(np.linalg.norm(gradients, axis=-1), axis=1)
    distance = np.linalg.norm(x - y, axis=-1)[:, None]
    assert np.all(difference <= (problem.L0 + problem.L1 * largest) * distance)


LOGISTIC = logistic.synthetic(3)


def numpy_loss(problem, x):
    """The mean over the workers as it is written in the module's docstring."""
    total = 0.0
    for a, b in zip(problem.features, problem.labels, strict=True):
        total += math.log(1 + math.exp(-b * float(a @ x)))
        total += problem.penalty * sum(t**2 / (1 + t**2) for t in x)
    return total / len(problem.labels)


def mean_loss(problem, x):
    over_workers = jax.vmap(problem.loss, in_axes=(None, 0))
    return float(jnp.mean(over_workers(jnp.asarray(x), jax.tree.map(jnp.asarray, problem.workers))))


def test_the_logistic_loss_is_its_formula():
    x = LOGISTIC.start(1)
    np.testing.assert_allclose(mean_loss(LOGISTIC, x), numpy_loss(LOGISTIC, x), rtol=1e-12)
    assert mean_loss(LOGISTIC, 1e3 * x) > 0 == LOGISTIC.lower_bound


def test_l_of_the_logistic_loss_is_attained_at_zero_and_nowhere_exceeded():
    points = far_and_near(10)
    _, hessians = derivatives(LOGISTIC, points)
    lengths = spectral(hessians.mean(axis=1))
    np.testing.assert_allclose(lengths[-1], LOGISTIC.L, rtol=1e-12)
    assert np.all(lengths <= LOGISTIC.L * (1 + 1e-12))


def test_l_of_every_worker_of_the_logistic_loss_is_attained_at_zero_and_nowhere_exceeded():
    points = far_and_near(10)
    _, hessians = derivatives(LOGISTIC, points)
    lengths = spectral(hessians)
    np.testing.assert_allclose(lengths[-1], LOGISTIC.L_workers, rtol=1e-12)
    assert np.all(lengths <= np.array(LOGISTIC.L_workers) * (1 + 1e-12))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_l0_and_l1_of_the_logistic_loss_hold_everywhere(scale):
    problem = logistic.Logistic(scale * LOGISTIC.features, LOGISTIC.labels)
    largest = np.max(shares(problem, far_and_near(10) / scale))
    assert largest <= 1
    if scale == 30.0:  # the penalty is nothing beside such features
        assert largest > 0.6


def test_the_logistic_loss_satisfies_the_assumption_itself():
    assert_symmetric(LOGISTIC)


def test_the_logistic_problem_is_not_convex_where_the_paper_says():
    """λ > λ_min(AᵀA) / (2n), which is so for λ = 0.1 and not for λ / n."""
    least = np.linalg.eigvalsh(LOGISTIC.features.T @ LOGISTIC.features)[0] / (2 * 20)
    assert LOGISTIC.penalty > least > LOGISTIC.penalty / 20
    _, hessians = derivatives(LOGISTIC, far_and_near(10))
    assert np.min(np.linalg.eigvalsh(hessians.mean(axis=1))) < 0


def test_the_papers_synthetic_data():
    assert LOGISTIC.features.shape == (20, 10)
    assert set(LOGISTIC.labels) == {-1, 1}
    large = logistic.synthetic(0, n=4000, d=3)
    np.testing.assert_allclose(np.std(large.features), 1, rtol=0.05)
    assert abs(np.mean(large.labels)) < 0.05
    assert not np.array_equal(logistic.synthetic(0).features, logistic.synthetic(1).features)
    starts = np.stack([large.start(seed) for seed in range(2000)])
    np.testing.assert_allclose(np.std(starts), 1, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: logistic.Logistic(np.ones((2, 3)), np.array([1, 2])), r"1 or -1, got \[1 2\]"),
        (lambda: logistic.Logistic(np.ones((2, 3)), np.ones(3)), r"\(2, 3\) need one label a row"),
        (lambda: logistic.synthetic(0, penalty=0.0), "`penalty` must be positive, got 0.0"),
        (lambda: polynomial.Polynomial(L1=-1.0), "`L1` must be positive, got -1.0"),
        (lambda: polynomial.Polynomial(dimension=0), "`dimension` must be positive, got 0"),
    ],
)
def test_bad_problems_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The λ that makes L0 = 4 at d = 4, by hand: 4 / (72 / L1² + 2).
PENALTIES = {1.0: 4 / 74, 4.0: 4 / 6.5, 8.0: 4 / 3.125}


@pytest.mark.parametrize("L1", PENALTIES)
def test_the_polynomial_is_its_formula(L1):
    problem = polynomial.Polynomial(4.0, L1)
    x = problem.start(0)
    quartic = sum(t**4 for t in x) / 24
    expected = PENALTIES[L1] * (quartic + sum(t**2 / (1 + t**2) for t in x))
    np.testing.assert_allclose(mean_loss(problem, x), expected, rtol=1e-12)
    assert mean_loss(problem, np.zeros(4)) == problem.lower_bound == 0


@pytest.mark.parametrize("L1", PENALTIES)
def test_l0_and_l1_of_the_polynomial_hold_everywhere(L1):
    problem = polynomial.Polynomial(4.0, L1)
    cubes = np.repeat(np.geomspace(1e-2, 1e3, 200)[:, None], 4, axis=1)
    largest = np.max(shares(problem, np.vstack([far_and_near(4), cubes])))
    # The paper's estimate is generous: of d = 4 entries' sum it needs the largest.
    assert 0.1 < largest <= 1
    if L1 == 8.0:
        np.testing.assert_allclose(largest, 2 * problem.penalty / 4.0, rtol=1e-12)  # at zero
    assert_symmetric(problem)


@pytest.mark.parametrize("dimension", [1, 4])
def test_l_of_the_polynomial_holds_within_reach_and_not_beyond(dimension):
    problem = polynomial.Polynomial(4.0, 1.0, dimension)
    rng = np.random.default_rng(0)
    within = np.vstack([rng.uniform(-20, 20, (200, dimension)), np.full(dimension, 20.0)])
    lengths = spectral(derivatives(problem, within)[1][:, 0])
    assert np.all(lengths <= problem.L(20.0))
    # √d is what the paper loses by the Frobenius norm of a diagonal.
    assert np.max(lengths) > 0.98 * problem.L(20.0) / math.sqrt(dimension)
    beyond = np.full((1, dimension), 20.5 * dimension**0.25)
    assert spectral(derivatives(problem, beyond)[1][:, 0]) > problem.L(20.0)


def test_the_polynomial_is_not_convex_and_at_one_just_flat():
    """At |x_i| = 1, where the paper looks, the second derivatives are zero; nearer, negative."""
    problem = polynomial.Polynomial()
    _, hessians = derivatives(problem, np.array([np.ones(4), np.full(4, 0.9)]))
    np.testing.assert_allclose(hessians[0, 0], 0, atol=1e-15)
    assert np.all(np.linalg.eigvalsh(hessians[1, 0]) < 0)


COUNTEREXAMPLE = counterexample.Counterexample()


def test_the_constants_of_the_counterexample_are_eigenvalues():
    _, hessians = derivatives(COUNTEREXAMPLE, np.zeros((1, 3)))
    eigenvalues = np.linalg.eigvalsh(hessians[0].mean(axis=0))
    np.testing.assert_allclose(eigenvalues, [COUNTEREXAMPLE.mu] + 2 * [COUNTEREXAMPLE.L])
    np.testing.assert_allclose(spectral(hessians[0]), COUNTEREXAMPLE.L_workers)
    assert COUNTEREXAMPLE.L0 == max(COUNTEREXAMPLE.L_workers)


def test_gradients_of_the_counterexample_are_those_of_its_docstring():
    gradients, _ = derivatives(COUNTEREXAMPLE, np.full((1, 3), 2.0))
    np.testing.assert_allclose(gradients[0], [[-11, 9, 9], [9, -11, 9], [9, 9, -11]])


@pytest.mark.parametrize("start", ["own", "random"])
def test_without_feedback_the_counterexample_grows_as_predicted(start):
    x = COUNTEREXAMPLE.start(0 if start == "own" else 1)
    steps = np.array([1e-3, 5e-3, 2e-2])
    path = descent.path(
        ef21.compressed_sgd,
        COUNTEREXAMPLE,
        np.stack([x] * 3),
        steps,
        1500,
        uplink=ef21.TopK(1 / 3),
        measure=descent.squared_gradient,
    )["squared_gradient"]
    growth = np.sqrt(path[:, 1:] / path[:, :-1])
    expected = np.array([COUNTEREXAMPLE.growth(step) for step in steps])
    late = growth if start == "own" else growth[:, 1200:]
    np.testing.assert_allclose(late, np.broadcast_to(expected[:, None], late.shape), rtol=1e-9)
