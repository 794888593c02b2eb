"""Paper N's theorem and its baseline: against the printed formulas, and against runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ef21_jax as ef21
from ef21_jax import theory
from experiments import bounds, descent
from experiments.problems import counterexample, logistic


GAP, ESTIMATES = 2.0, 0.7  # f(x⁰) − f^inf, and how far the first estimates are from the gradients

# L0, L1, alpha, gamma0, delta_inf
CONSTANTS = [
    (4.0, 1.0, 0.25, 0.3, 0.0),
    (0.7, 0.2, 0.1, 0.5, 1.5),
    (3.0, 2.0, 1.0, 0.1, 0.4),
    (2.0, 0.0, 0.6, 2.0, 3.0),
    (9.0, 0.01, 0.02, 1.0, 0.2),
]


def printed_bound(L0, L1, alpha, gamma0, delta_inf, K, gap, distance):
    """Theorem 1 with b's factor exp(L1 γ0) of its proof's last line, letter by letter."""
    root = math.sqrt(1 - alpha)
    c0, c1 = ((1 / 2 + 2 * root / (1 - root)) * L for L in (L0, L1))
    gamma = gamma0 / math.sqrt(K + 1)
    V0 = gap + 2 * gamma / (1 - root) * distance
    b = 2 * c0 + 8 * L1 * c1 * delta_inf
    first = V0 * math.exp(8 * c1 * L1 * math.exp(L1 * gamma0) * gamma0**2) / gamma0
    return 1 / math.sqrt(K + 1) * (first + gamma0 * b * math.exp(L1 * gamma0))


def normalized(L0=4.0, L1=1.0, alpha=0.25, gamma0=1.0, delta_inf=0.0, gap=GAP):
    return theory.NormalizedEF21(
        L0=L0, L1=L1, alpha=alpha, gamma0=gamma0, delta_inf=delta_inf, gap=gap
    )


def plain(L=3.0, L_workers=(1.0, 7.0), alpha=0.25, gap=GAP):
    return theory.EF21(L=L, L_workers=L_workers, alpha=alpha, gap=gap)


def of_k(theorem, K, gap=GAP, estimates=ESTIMATES):
    """The bound of normalized EF21 from inexact first estimates."""
    return theorem.bound(K, theorem.lyapunov(K, gap, estimates=estimates))


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
@pytest.mark.parametrize("K", [0, 1, 400])
def test_the_bound_of_normalized_ef21_is_the_printed_one(constants, K):
    theorem = normalized(*constants)
    for estimates in (0.0, ESTIMATES):
        expected = printed_bound(*constants, K, GAP, estimates)
        np.testing.assert_allclose(of_k(theorem, K, estimates=estimates), expected, rtol=1e-12)
    assert theorem.bound(K) == of_k(theorem, K, estimates=0.0)


@pytest.mark.parametrize("alpha", [0.02, 0.25, 1.0])
@pytest.mark.parametrize("K", [0, 1, 400])
def test_the_bound_and_the_step_of_ef21_are_the_printed_ones(alpha, K):
    theorem = plain(alpha=alpha)
    theta = 1 - math.sqrt(1 - alpha)
    beta = (1 - alpha) / (1 - math.sqrt(1 - alpha))
    gamma = 1 / (3.0 + math.sqrt((1 + 49) / 2) * math.sqrt(beta / theta))
    np.testing.assert_allclose(theorem.gamma, gamma, rtol=1e-12)
    # Theorem 1 of Richtárik et al., with T = K + 1.
    T = K + 1
    squared = 2 * GAP / (gamma * T) + ESTIMATES / (theta * T)
    psi = theorem.lyapunov(GAP, estimates=ESTIMATES)
    np.testing.assert_allclose(theorem.bound(K, psi), math.sqrt(squared), rtol=1e-12)
    exact = math.sqrt(2 * GAP / (gamma * T))
    np.testing.assert_allclose(theorem.bound(K), exact, rtol=1e-12)


def test_a_small_alpha_keeps_its_digits():
    # 1 − √(1 − α) → α/2: in floats the difference itself has lost half of them here.
    np.testing.assert_allclose(normalized(1.0, 1.0, 1e-9).c0, 0.5 + 4e9 - 3, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.01, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("L1", [0.3, 8.0])
def test_with_the_moderate_gamma0_the_bound_is_below_the_papers_simpler_one(alpha, L1):
    gamma0 = theory.moderate_gamma0(L1, alpha)
    c = 0.5 + 2 * math.sqrt(1 - alpha) / (1 - math.sqrt(1 - alpha))
    np.testing.assert_allclose(gamma0, 1 / (8 * c * L1), rtol=1e-12)
    theorem = normalized(4.0, L1, alpha, gamma0, delta_inf=0.5)
    V0 = theorem.lyapunov(99, GAP, estimates=ESTIMATES)
    simpler = (32 * c * L1 * V0 + 4.0 / L1 + 2 * L1 * 0.5) / 10
    assert simpler / 4 < theorem.bound(99, V0) <= simpler


@pytest.mark.parametrize("alpha", [0.01, 0.25, 1.0])
def test_under_traditional_smoothness_both_are_order_root_of_l_over_alpha(alpha):
    """The paper's comparison, at the end of its section 3, with exact first estimates."""
    L, K = 3.0, 99
    unit = math.sqrt(L / alpha) * math.sqrt(GAP / (K + 1))
    b = normalized(L, 0.0, alpha).c0
    best = normalized(L, 0.0, alpha, gamma0=math.sqrt(GAP / (2 * b)))
    assert best.bound(K) <= 4 * math.sqrt(2) * unit * (1 + 1e-12)
    assert plain(L, (L, L), alpha).bound(K) <= 2 * unit * (1 + 1e-12)
    # γ0 is the best there is.
    for factor in (0.9, 1.1):
        other = dataclasses.replace(best, gamma0=factor * best.gamma0)
        assert other.bound(K) > best.bound(K)


def test_steps_shrink_as_the_root_of_the_rounds():
    theorem = normalized(gamma0=3.0)
    assert [theorem.gamma(K) for K in (0, 3, 99)] == [3.0, 1.5, 0.3]
    assert [theorem.step_size(3)(k) for k in (0, 3)] == [1.5, 1.5]
    np.testing.assert_allclose(
        normalized(gamma0=0.1).bound(399) * 2, normalized(gamma0=0.1).bound(99)
    )
    assert plain().step_size()(7) == plain().gamma


@pytest.mark.parametrize("name", ["L0", "L1", "delta_inf", "gap"])
def test_a_harder_problem_has_a_larger_bound(name):
    easy = {"L0": 4.0, "L1": 1.0, "delta_inf": 0.1, "gap": GAP}
    harder = easy | {name: 1.5 * easy[name]}
    assert normalized(**harder, gamma0=0.1).bound(9) > normalized(**easy, gamma0=0.1).bound(9)


def test_a_better_compressor_has_smaller_bounds_and_a_longer_step():
    alphas = (0.05, 0.3, 1.0)
    bounds_of = [of_k(normalized(4.0, 0.1, alpha, 0.1), 9) for alpha in alphas]
    assert bounds_of == sorted(bounds_of, reverse=True)
    theorems = [plain(1.0, alpha=alpha) for alpha in alphas]
    steps = [theorem.gamma for theorem in theorems]
    assert steps == sorted(steps)
    assert steps[-1] == 1.0  # gradient descent's 1/L
    bounds_of = [theorem.bound(9) for theorem in theorems]
    assert bounds_of == sorted(bounds_of, reverse=True)


def test_a_bound_past_the_floats_is_infinite_and_from_a_minimum_is_not():
    steep = normalized(1.0, 5.0, 0.1)
    assert steep.bound(100) == math.inf
    assert math.isfinite(steep.bound(100, 0.0))
    assert normalized(1.0, 5e3, 0.1).bound(100, 0.0) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: normalized(L0=0.0), "`L0` must be positive.*got 0.0"),
        (lambda: normalized(L1=-1.0), "`L1` must be.*not negative, got -1.0"),
        (lambda: normalized(alpha=0.0), r"`alpha` must be in \(0, 1\], got 0.0"),
        (lambda: normalized(gamma0=0.0), "`gamma0` must be positive.*got 0.0"),
        (lambda: normalized(delta_inf=-2.0), "`delta_inf` must be.*got -2.0"),
        (lambda: normalized(gap=-3.0), "`gap` must be.*got -3.0"),
        (lambda: normalized().bound(-1), "`iterations` must be.*not negative, got -1"),
        (lambda: normalized().bound(-1, 1.0), "`iterations` must be.*not negative, got -1"),
        (lambda: normalized().bound(1, -1.0), "`psi` must be.*got -1.0"),
        (lambda: normalized().lyapunov(1, -1.0), "`gap` must be.*got -1.0"),
        (lambda: normalized().lyapunov(1, 0.0, estimates=-4.0), "`estimates` must be.*got -4.0"),
        (lambda: theory.moderate_gamma0(0.0, 1.0), "`L1` must be positive.*got 0.0"),
        (lambda: theory.moderate_gamma0(1.0, 1.5), r"`alpha` must be in \(0, 1\], got 1.5"),
        (lambda: plain(L=-1.0), "`L` must be positive.*got -1.0"),
        (lambda: plain(L_workers=(1.0, math.nan)), r"`L_workers\[1\]` must be positive.*got nan"),
        (lambda: plain(alpha=2.0), r"`alpha` must be in \(0, 1\], got 2.0"),
        (lambda: plain(gap=math.inf), "`gap` must be.*got inf"),
        (lambda: plain().bound(-2), "`iterations` must be.*not negative, got -2"),
        (lambda: plain().bound(2, -1.0), "`psi` must be.*got -1.0"),
        (lambda: plain().lyapunov(0.0, estimates=-1.0), "`estimates` must be.*got -1.0"),
    ],
)
def test_bad_constants_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Runs, in float64.


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Slope:
    """f(x) = √(1 + x²): nearly the slope 1 far from 0, where both bounds are nearly attained."""

    L = L0 = 1.0
    L_workers = (1.0,)
    L1 = 0.0
    lower_bound = 1.0
    workers = np.zeros((1, 1))

    @staticmethod
    def loss(x, worker):
        return jnp.sqrt(1 + jnp.sum(jnp.square(x))) + 0 * jnp.sum(worker)


@pytest.fixture(scope="module")
def down_the_slope():
    """K = 2499, and by method the least ‖∇f‖ and the gap at the start."""
    K = 2499
    # Just so far that the last step ends three units before the minimum.
    steps = {
        "normalized": bounds.normalized_of(Slope, 1.0, 1.0).gamma(K),
        "plain": bounds.ef21_of(Slope, 1.0).gamma,
    }
    runs = {"normalized": (ef21.normalized_ef21, 53.0), "plain": (ef21.ef21_sgd, 2503.0)}
    found = {}
    with jax.enable_x64(True):
        for name, (method, start) in runs.items():
            path = descent.path(method, Slope, [[start]], [steps[name]], K, uplink=ef21.Identity())
            gap = float(path["loss"][0, 0]) - Slope.lower_bound
            found[name] = math.sqrt(np.min(path["squared_gradient"])), gap
    return K, found


def test_the_bound_of_normalized_ef21_is_nearly_attained_down_a_slope(down_the_slope):
    K, found = down_the_slope
    least, gap = found["normalized"]
    bound = bounds.normalized_of(Slope, 1.0, 1.0, gap).bound(K)
    assert bound / 1.15 < least <= bound


def test_the_bound_of_ef21_is_attained_but_for_its_root_of_two_down_a_slope(down_the_slope):
    K, found = down_the_slope
    least, gap = found["plain"]
    bound = bounds.ef21_of(Slope, 1.0, gap).bound(K)
    assert bound / (1.08 * math.sqrt(2)) < least <= bound


COUNTEREXAMPLE = counterexample.Counterexample()
LOGISTIC = logistic.synthetic(0)
PROBLEMS = {"quadratics": COUNTEREXAMPLE, "logistic": LOGISTIC}
SEEDS = (0, 1, 2)
ROUNDS = 300


@pytest.fixture(scope="module", params=PROBLEMS)
def runs(request):
    """Both methods with Top-1 from zero estimates: one lane a start, and all that is measured."""
    problem = PROBLEMS[request.param]
    alpha = 1 / problem.dimension
    uplink = ef21.TopK(alpha)
    starts = np.stack([problem.start(seed) for seed in SEEDS])
    gamma0 = theory.moderate_gamma0(problem.L1, alpha) if problem.L1 else 0.5
    normalized = bounds.normalized_of(problem, alpha, gamma0)
    plain = bounds.ef21_of(problem, alpha)
    with jax.enable_x64(True):
        paths = [
            descent.path(method, problem, starts, np.full(3, step), ROUNDS, uplink=uplink)
            for method, step in (
                (ef21.normalized_ef21, normalized.gamma(ROUNDS)),
                (ef21.ef21_sgd, plain.gamma),
            )
        ]
    return problem, (normalized, paths[0]), (plain, paths[1])


def test_no_bound_is_violated(runs):
    problem, (theorem, path), (_, path_of_ef21) = runs
    for loss, distance, squared in zip(
        path["loss"], path["distance"], path["squared_gradient"], strict=True
    ):
        bound = of_k(theorem, ROUNDS, loss[0], distance[0])
        assert math.sqrt(squared.min()) <= bound
    record = bounds.of_ef21(problem, 1 / problem.dimension, path_of_ef21)
    assert record["violations"] == 0
    assert 0.2 < record["largest_share"] <= 1


def test_the_lyapunov_value_of_normalized_ef21_falls_as_lemma_7_says(runs):
    """In the form of the lemma's proof, with exp(L1 γ)."""
    problem, (theorem, path), _ = runs
    gamma = theorem.gamma(ROUNDS)
    V = np.array(
        [
            [theorem.lyapunov(ROUNDS, gap, estimates=d) for gap, d in zip(*lane, strict=True)]
            for lane in zip(path["loss"], path["distance"], strict=True)
        ]
    )
    gradient = np.sqrt(path["squared_gradient"])
    extra = theorem.c0 + theorem.c1 * path["worker_gradient"]
    allowed = -gamma * gradient + math.exp(problem.L1 * gamma) * gamma**2 * extra
    rise = V[:, 1:] - V[:, :-1]
    assert np.all(rise <= allowed[:, :-1] + 1e-12)
    # The lemma is about every step, and not by far: it has no more than a few γ‖∇f‖ to spare.
    spare = (allowed[:, :-1] - rise) / (gamma * gradient[:, :-1])
    assert np.min(spare[:, :20]) < 1.5


def test_the_lyapunov_value_of_ef21_falls_by_half_a_step_times_the_squared_gradient(runs):
    _, _, (theorem, path) = runs
    psi = np.array(
        [
            [theorem.lyapunov(gap, estimates=d) for gap, d in zip(*lane, strict=True)]
            for lane in zip(path["loss"], path["squared_distance"], strict=True)
        ]
    )
    allowed = -theorem.gamma / 2 * path["squared_gradient"]
    assert np.all(psi[:, 1:] - psi[:, :-1] <= allowed[:, :-1] + 1e-12)


def test_every_k_of_the_grid_is_held_against_its_own_bound(monkeypatch):
    starts = np.stack([LOGISTIC.start(seed) for seed in SEEDS[:2]])
    uplink = ef21.TopK(0.1)
    record = bounds.of_normalized(LOGISTIC, 0.1, starts, 30, uplink=uplink)
    assert record["k"][0] == 1 and record["k"][-1] == 30
    assert record["violations"] == 0
    assert all(m <= p for m, p in zip(record["measured"], record["promised"], strict=True))
    # A ten-thousandth of the bound is no bound, at any K and from any start.
    true_bound = theory.NormalizedEF21.bound
    monkeypatch.setattr(
        theory.NormalizedEF21, "bound", lambda *args, **kwargs: 1e-4 * true_bound(*args, **kwargs)
    )
    false = bounds.of_normalized(LOGISTIC, 0.1, starts, 30, uplink=uplink)
    assert false["violations"] == 2 * len(record["k"])
    with pytest.raises(ValueError, match="normalized EF21: a bound overflows"):
        bounds.of_normalized(LOGISTIC, 0.1, starts, 30, uplink=uplink, gamma0=10.0)


def test_the_least_gradient_is_that_up_to_k(monkeypatch):
    def path(method, problem, starts, step_sizes, iterations, **kwargs):
        lanes = len(step_sizes)
        squared = np.broadcast_to(1 / np.arange(1, iterations + 2), (lanes, iterations + 1))
        return {"squared_gradient": squared, "loss": squared, "distance": squared}

    monkeypatch.setattr(descent, "path", path)
    record = bounds.of_normalized(LOGISTIC, 0.1, np.zeros((2, 10)), 99, uplink=ef21.TopK(0.1))
    expected = [1 / math.sqrt(k + 1) for k in record["k"]]
    np.testing.assert_allclose(record["measured"], expected, rtol=1e-5)
    assert len(record["k"]) == 7
