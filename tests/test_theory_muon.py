"""Paper M's theorems: against plain transcriptions, by what units demand, and against runs."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef21_jax as ef21
from ef21_jax import theory
from experiments.problems import quadratics


def draw(seed, layers=2, workers=3):
    """Constants of all theorems, one a layer, at random."""
    rng = random.Random(seed)

    def numbers(low, high, *shape):
        if not shape:
            return rng.uniform(low, high)
        return [numbers(low, high, *shape[1:]) for _ in range(shape[0])]

    low = numbers(0.5, 1.0, layers)
    return {
        "L": numbers(1.0, 3.0, layers),
        "L_workers": numbers(1.0, 4.0, layers, workers),
        "L0": numbers(1.0, 3.0, layers),
        "L1": numbers(0.1, 0.5, layers),
        "L0_workers": numbers(1.0, 4.0, layers, workers),
        "L1_workers": numbers(0.1, 0.5, layers, workers),
        "gap": numbers(1.0, 9.0),
        "worker_gaps": numbers(0.1, 2.0, workers),
        "sigma": numbers(0.5, 3.0, layers),
        "rho": [(a, a * rng.uniform(1.0, 3.0)) for a in low],
        "alpha_D": numbers(0.1, 0.9),
        "alpha_P": numbers(0.1, 0.9),
        "beta": numbers(0.05, 1.0, layers),
        "eta": numbers(0.02, 0.1, layers),
        "start_gradients": numbers(0.5, 3.0, layers),
    }


def make(theorem, constants, **changes):
    """The theorem, of the constants that it has; the first of each that is one a layer."""
    constants = constants | changes
    names = [field.name for field in dataclasses.fields(theorem)]
    if "L_workers" in names or "L0_workers" in names:
        key = "L" if "L" in names else "L0"
        if theorem not in LAYERED:
            layered = set(constants) - {"gap", "worker_gaps", "alpha_D", "alpha_P", "scale"}
            constants = {k: v[0] if k in layered else v for k, v in constants.items()}
            constants["start_gradient"] = constants["start_gradients"]
        assert key in constants
    return theorem(**{name: constants[name] for name in names if name in constants})


LAYERED = (
    theory.Theorem14,
    theory.Theorem17,
    theory.Theorem19,
    theory.Theorem24,
    theory.Corollary1,
    theory.Corollary3,
)
SMOOTH = (theory.Theorem3, theory.Theorem14, theory.Theorem5, theory.Corollary1, theory.Corollary2)
GENERALIZED = (theory.Theorem4, theory.Theorem17, theory.Theorem6, theory.Corollary3)
SEEDS = range(4)
K = 1000


def name(value):
    return getattr(value, "__name__", None)


# Transcriptions, as one reads them off the page.


def theorem14_gamma(c, i):
    Lt = math.sqrt(sum(x**2 for x in c["L_workers"][i]) / len(c["L_workers"][i]))
    return 1 / (2 * c["L"][i] + (4 / c["alpha_D"]) * math.sqrt(12 + 66 / c["alpha_P"] ** 2) * Lt)


def theorem19_gamma(c, i, beta):
    a, p = c["alpha_D"], c["alpha_P"]
    L2 = c["L"][i] ** 2
    Lt2 = sum(x**2 for x in c["L_workers"][i]) / len(c["L_workers"][i])
    zeta = (c["rho"][i][1] ** 2 / c["rho"][i][0] ** 2) * (
        12 / beta**2 * L2
        + 24 * (beta + 2) / p**2 * L2
        + 36 * (beta**2 + 4) / a**2 * Lt2
        + 144 * beta**2 * (2 * beta + 5) / (p**2 * a**2) * Lt2
    )
    return 1 / (2 * math.sqrt(zeta) + 2 * c["L"][i])


def corollary1_bound(c, layers):
    a, n = c["alpha_D"], len(c["worker_gaps"])
    gammas = [theorem19_gamma(c, i, c["beta"][i]) for i in layers]
    mean = sum(gammas) / len(gammas)
    total = 4 * c["gap"] / (K * mean)
    for i, gamma in zip(layers, gammas, strict=True):
        beta, sigma, high = c["beta"][i], c["sigma"][i], c["rho"][i][1]
        total += 24 / K * (1 / (n * beta) + 12 * beta / a**2) * sigma**2 * high**2 * gamma / mean
        total += (
            24
            * (1 / n + (1 - a) * beta / a + 12 * beta**2 / a**2)
            * (sigma**2 * high**2 * beta * gamma / mean)
        )
    return total


def theorem17_bound(c, layers):
    root = math.sqrt(1 - c["alpha_D"])
    etas = [c["eta"][i] for i in layers]
    mean = sum(etas) / len(etas)
    n = len(c["worker_gaps"])
    C, D = {}, {}
    for i in layers:
        C[i] = c["L1"][i] / 2 + 2 * root * max(c["L1_workers"][i]) / (1 - root)
        D[i] = c["L0"][i] / 2 + 2 * root * sum(c["L0_workers"][i]) / n / (1 - root)
    worst = max(c["eta"][i] ** 2 * C[i] * c["L1_workers"][i][j] for i in layers for j in range(n))
    total = math.exp(4 * worst) * c["gap"]
    total += sum(4 * worst * gap for gap in c["worker_gaps"]) / n
    for i in layers:
        eta2 = c["eta"][i] ** 2
        total += (
            sum(eta2 * C[i] * c["L0_workers"][i][j] / c["L1_workers"][i][j] for j in range(n)) / n
        )
        total += eta2 * D[i]
    return total / (math.sqrt(K + 1) * mean)


def corollary3_bound(c, layers):
    """Printed, with max_j for the L1_j, plus what the start lacks."""
    root, n = math.sqrt(1 - c["alpha_D"]), len(c["worker_gaps"])
    etas = [c["eta"][i] for i in layers]
    mean = sum(etas) / len(etas)
    total = 3 / ((K + 1) ** (1 / 4) * mean) * c["gap"]
    spread = max(
        c["eta"][i] ** 2 * c["rho"][i][1] / c["rho"][i][0] * c["L1_workers"][i][j] ** 2
        for i in layers
        for j in range(n)
    )
    total += (
        (8 / (K + 1) ** (1 / 4) + 8 * root / ((K + 1) ** (3 / 4) * (1 - root)))
        * (spread / mean)
        * (sum(c["worker_gaps"]) / n)
    )
    for i in layers:
        eta, sigma, (low, high) = c["eta"][i], c["sigma"][i], c["rho"][i]
        bar = sum(c["L0_workers"][i]) / n
        start = (
            4 * root * eta * high * sigma + 2 * root * eta * high * c["start_gradients"][i]
        ) / ((K + 1) ** (3 / 4) * (1 - root))
        total += 3 / ((K + 1) ** (1 / 4) * mean) * start
        total += 6 / (K + 1) ** (1 / 2) * high * eta * sigma / (math.sqrt(n) * mean)
        total += (eta**2 / mean) * (
            c["L0"][i] / (K + 1) ** (3 / 4)
            + 4 * high * bar / (low * (K + 1) ** (1 / 4))
            + 4 * high * root * bar / (low * (K + 1) ** (3 / 4) * (1 - root))
        )
        total += (eta * high * sigma / mean) * (
            4 * root / ((K + 1) ** (1 / 2) * (1 - root)) + 2 / (math.sqrt(n) * (K + 1) ** (1 / 4))
        )
    return total


def theorem6_bound(c):
    root, n = math.sqrt(1 - c["alpha_D"]), len(c["worker_gaps"])
    eta, sigma, (low, high) = c["eta"][0], c["sigma"][0], c["rho"][0]
    quarter, half, three = ((K + 1) ** e for e in (1 / 4, 1 / 2, 3 / 4))
    L1max2 = max(c["L1_workers"][0]) ** 2
    return (
        3 * c["gap"] / (eta * quarter)
        + eta * c["L0"][0] / three
        + 16 * root * high * sigma / ((1 - root) * half)
        + 8 * high * sigma / (math.sqrt(n) * quarter)
        + eta
        * high
        / low
        * (8 / quarter + 8 * root / ((1 - root) * three))
        * (L1max2 * sum(c["worker_gaps"]) / n + sum(c["L0_workers"][0]) / n)
        + 6 * root * high * c["start_gradients"][0] / ((1 - root) * (K + 1))
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "theorem, expected",
    [
        (theory.Theorem3, lambda c: 4 * c["gap"] / (K * theorem14_gamma(c, 0))),
        (
            theory.Theorem14,
            lambda c: 4 * c["gap"] / (K * (theorem14_gamma(c, 0) + theorem14_gamma(c, 1)) / 2),
        ),
        (theory.Theorem4, lambda c: theorem17_bound(c, (0,))),
        (theory.Theorem17, lambda c: theorem17_bound(c, (0, 1))),
        (theory.Theorem5, lambda c: corollary1_bound(c, (0,))),
        (theory.Corollary1, lambda c: corollary1_bound(c, (0, 1))),
        (theory.Theorem6, theorem6_bound),
        (theory.Corollary3, lambda c: corollary3_bound(c, (0, 1))),
    ],
    ids=name,
)
def test_bounds_are_those_of_the_paper(theorem, expected, seed):
    constants = draw(seed)
    assert make(theorem, constants).bound(K) == pytest.approx(expected(constants), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_step_sizes_and_radii_are_those_of_the_paper(seed):
    c = draw(seed)

    def values(schedules):
        return [schedule(7) for schedule in schedules]

    assert make(theory.Theorem3, c).step_size()(7) == pytest.approx(theorem14_gamma(c, 0))
    assert values(make(theory.Theorem14, c).step_size()) == pytest.approx(
        [theorem14_gamma(c, i) for i in range(2)]
    )
    assert make(theory.Theorem5, c).step_size()(7) == pytest.approx(
        theorem19_gamma(c, 0, c["beta"][0])
    )
    assert values(make(theory.Theorem19, c).step_size()) == pytest.approx(
        [theorem19_gamma(c, i, c["beta"][i]) for i in range(2)]
    )
    assert make(theory.Theorem4, c).radius(K)(7) == pytest.approx(c["eta"][0] / (K + 1) ** 0.5)
    assert values(make(theory.Theorem17, c).radius(K)) == pytest.approx(
        [eta / (K + 1) ** 0.5 for eta in c["eta"]]
    )
    assert make(theory.Theorem6, c).radius(K)(7) == pytest.approx(c["eta"][0] / (K + 1) ** 0.75)
    assert values(make(theory.Theorem24, c).radius(K)) == pytest.approx(
        [eta / (K + 1) ** 0.75 for eta in c["eta"]]
    )
    assert make(theory.Theorem5, c).momentum == pytest.approx(1 - c["beta"][0])
    assert make(theory.Theorem19, c).momentum == pytest.approx([1 - b for b in c["beta"]])
    assert make(theory.Theorem6, c).momentum(K) == pytest.approx(1 - (K + 1) ** -0.5)


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("theorem", [theory.Theorem3, theory.Theorem5], ids=name)
def test_a_smaller_step_size_is_a_share_of_the_largest(theorem, scale):
    c = draw(0)
    shorter, longest = make(theorem, c, scale=scale), make(theorem, c)
    assert shorter.gamma == pytest.approx(scale * longest.gamma)
    quiet = make(theorem, c, scale=scale, sigma=[0.0, 0.0]), make(theorem, c, sigma=[0.0, 0.0])
    assert quiet[0].bound(K) == pytest.approx(quiet[1].bound(K) / scale)


@pytest.mark.parametrize("seed", SEEDS)
def test_lyapunov_values_weigh_the_errors_as_the_paper_does(seed):
    c = draw(seed)
    a, p = c["alpha_D"], c["alpha_P"]
    root = math.sqrt(1 - a)
    mean_squares = [sum(x**2 for x in row) / len(row) for row in c["L_workers"]]
    high2 = [high**2 for _, high in c["rho"]]
    ratio2 = [(high / low) ** 2 for low, high in c["rho"]]
    g14 = [theorem14_gamma(c, i) for i in range(2)]
    g19 = [theorem19_gamma(c, i, beta) for i, beta in enumerate(c["beta"])]
    t17 = [eta / math.sqrt(K + 1) for eta in c["eta"]]
    t24 = [eta / (K + 1) ** 0.75 * high for eta, (_, high) in zip(c["eta"], c["rho"], strict=True)]
    expected = {
        ("14", "estimates"): [6 * g / a for g in g14],
        ("14", "models"): [
            66 * g / a**2 * (2 / p - 1) * m for g, m in zip(g14, mean_squares, strict=True)
        ],
        ("19", "momenta"): [6 * h / b * g for h, b, g in zip(high2, c["beta"], g19, strict=True)],
        ("19", "worker_momenta"): [
            72 * h * b / a**2 * g for h, b, g in zip(high2, c["beta"], g19, strict=True)
        ],
        ("19", "estimates"): [6 * h / a * g for h, g in zip(high2, g19, strict=True)],
        ("19", "models"): [
            6 * r * ((b + 2) * L**2 + 6 * b**2 * (2 * b + 5) / a**2 * m) * (2 / p - 1) * g
            for r, b, L, m, g in zip(ratio2, c["beta"], c["L"], mean_squares, g19, strict=True)
        ],
        ("17", "estimates"): [2 * t / (1 - root) for t in t17],
        ("24", "estimates"): [2 * t / (1 - root) for t in t24],
        ("24", "worker_momenta"): [2 * t * root / (1 - root) for t in t24],
    }
    for (number, errors), weights in expected.items():
        theorem = make(getattr(theory, f"Theorem{number}"), c)
        at = (K, 5.0) if number in ("17", "24") else (5.0,)
        assert theorem.lyapunov(*at) == 5.0
        for i, weight in enumerate(weights):
            one = [float(i == j) for j in range(2)]
            assert theorem.lyapunov(*at, **{errors: one}) - 5.0 == pytest.approx(weight)


# What units demand. A lost root, or σ for σ², breaks them.


@pytest.mark.parametrize("theorem", SMOOTH + GENERALIZED, ids=name)
def test_bounds_scale_with_the_units_of_the_function(theorem):
    c, unit = draw(1), 7.0
    factors = {"gap", "L", "L_workers", "L0", "L0_workers", "sigma", "worker_gaps"}
    scaled = c | {k: np.multiply(c[k], unit).tolist() for k in factors | {"start_gradients"}}
    power = 2 if theorem in SMOOTH else 1
    before, after = make(theorem, c), make(theorem, scaled)
    assert after.bound(K) == pytest.approx(before.bound(K) * unit**power)


@pytest.mark.parametrize("theorem", SMOOTH + GENERALIZED, ids=name)
def test_bounds_scale_with_the_units_of_the_norm(theorem):
    # ‖·‖ becomes half of it: dual norms double, ρ doubles, radii halve.
    c = draw(2)
    powers = {"L": 2, "L_workers": 2, "L0": 2, "L0_workers": 2, "L1": 1, "L1_workers": 1}
    powers |= {"rho": 1, "eta": -1}
    scaled = c | {k: np.multiply(c[k], 2.0**p).tolist() for k, p in powers.items()}
    power = 2 if theorem in SMOOTH else 1
    before, after = make(theorem, c), make(theorem, scaled)
    assert after.bound(K) == pytest.approx(before.bound(K) * 2.0**power)


@pytest.mark.parametrize("theorem", SMOOTH + GENERALIZED, ids=name)
def test_more_compression_costs_and_more_iterations_pay(theorem):
    c = draw(3)
    bound = make(theorem, c).bound(K)
    assert make(theorem, c, alpha_D=c["alpha_D"] / 2).bound(K) > bound
    assert make(theorem, c).bound(4 * K) < bound
    if theorem in SMOOTH:  # α_P acts through γ alone; with noise, γ is a weight of it too
        quiet = c | {"sigma": [0.0, 0.0]}
        more = make(theorem, quiet, alpha_P=c["alpha_P"] / 2)
        assert more.bound(K) > make(theorem, quiet).bound(K)


@pytest.mark.parametrize(
    "theorem", [theory.Theorem5, theory.Corollary1, theory.Theorem6, theory.Corollary3], ids=name
)
def test_noise_costs_and_workers_average_it(theorem):
    c = draw(4)

    def of(copies, sigma):
        repeated = {
            key: [list(part) * copies for part in c[key]]
            for key in ("L_workers", "L0_workers", "L1_workers")
        }
        repeated["worker_gaps"] = c["worker_gaps"] * copies
        return make(theorem, c, **repeated, sigma=[sigma, sigma]).bound(K)

    assert of(1, 2.0) > of(1, 1.0) > of(1, 0.0)
    assert of(4, 2.0) < of(1, 2.0)
    assert of(4, 0.0) == pytest.approx(of(1, 0.0))


def test_without_compression_only_what_gluon_pays_is_left():
    c = draw(5) | {"alpha_D": 1.0}
    theorem = make(theory.Theorem4, c, worker_gaps=[0.0] * 3)
    eta, L0, L1 = c["eta"][0], c["L0"][0], c["L1"][0]
    ratio = sum(a / b for a, b in zip(c["L0_workers"][0], c["L1_workers"][0], strict=True)) / 3
    growth = math.exp(4 * eta**2 * L1 / 2 * max(c["L1_workers"][0]))
    expected = growth * c["gap"] / eta + eta * (L1 / 2 * ratio + L0 / 2)
    assert theorem.bound(K) == pytest.approx(expected / math.sqrt(K + 1))
    starts = [make(theory.Theorem6, c, start_gradients=[g, g]).bound(K) for g in (0.0, 5.0)]
    assert starts[0] == starts[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_theorem_6_merges_the_terms_of_corollary_3_upwards(seed):
    c = draw(seed)
    one = {key: [value[0]] for key, value in c.items() if isinstance(value, list)}
    one["worker_gaps"] = c["worker_gaps"]
    exact = make(theory.Corollary3, c | one).bound(K)
    merged = make(theory.Theorem6, c).bound(K)
    assert exact <= merged <= 4 * exact


@pytest.mark.parametrize("seed", SEEDS)
def test_corollary_1_is_theorem_19_from_its_start(seed):
    c = draw(seed)
    theorem = make(theory.Theorem19, c)
    psi = theorem.lyapunov(
        c["gap"],
        momenta=[sigma**2 / 3 for sigma in c["sigma"]],
        worker_momenta=[sigma**2 for sigma in c["sigma"]],
    )
    assert make(theory.Corollary1, c).bound(K) == pytest.approx(theorem.bound(K, psi))
    assert theorem.bound(K, 2 * psi) - theorem.bound(K, psi) == pytest.approx(
        4 * psi / (K * sum(theorem.gamma) / 2)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_corollary_3_is_theorem_24_from_its_start(seed):
    c = draw(seed)
    theorem, root = make(theory.Theorem24, c), math.sqrt(1 - c["alpha_D"])
    starts = zip(c["sigma"], c["start_gradients"], strict=True)
    psi = theorem.lyapunov(
        K,
        c["gap"],
        estimates=[root * (sigma + gradient) for sigma, gradient in starts],
        worker_momenta=c["sigma"],
    )
    bound = theorem.bound(K, psi, [sigma / math.sqrt(3) for sigma in c["sigma"]])
    assert make(theory.Corollary3, c).bound(K) == pytest.approx(bound)


@pytest.mark.parametrize("seed", SEEDS)
def test_corollary_2_balances_noise_against_progress(seed):
    c = draw(seed)
    corollary = make(theory.Corollary2, c)
    L, (low, high), sigma, a, n = c["L"][0], c["rho"][0], c["sigma"][0], c["alpha_D"], 3
    for iterations in (1, 100, 10**6):
        beta = corollary.beta(iterations)
        progress = c["gap"] * high**2 * L / (low**2 * beta * iterations)
        noise = [high**2 * sigma**2 * term for term in (beta / n, beta**2 / a, beta**3 / a**2)]
        assert beta == 1 or max(noise) == pytest.approx(progress)
        assert beta < 1 or max(noise) <= progress
        assert corollary.momentum(iterations) == 1 - beta
        assert corollary.step_size(iterations)(0) == pytest.approx(theorem19_gamma(c, 0, beta))
    # O(K^(-1/2)), with the constant of the O between two numbers.
    orders = [10.0**e for e in range(10, 21, 2)]
    ratios = [corollary.bound(int(k)) / corollary.order(int(k)) for k in orders]
    assert max(ratios) < 120 and min(ratios) > 20
    assert ratios[-1] == pytest.approx(ratios[-2], rel=0.1)
    assert corollary.bound(10**22) == pytest.approx(corollary.bound(10**20) / 10, rel=0.05)


def test_without_noise_corollary_2_takes_no_momentum():
    assert make(theory.Corollary2, draw(0), sigma=[0.0, 0.0]).beta(K) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_largest_eta_is_what_the_proof_of_theorem_24_needs(seed):
    c = draw(seed) | {"eta": None}
    for scale in (0.1, 1.0, 30.0):
        L1 = np.multiply(c["L1"], scale).tolist()
        L1_workers = np.multiply(c["L1_workers"], scale).tolist()
        theorem = make(theory.Theorem24, c, L1=L1, L1_workers=L1_workers)
        for i, eta in enumerate(theorem.largest_eta(K)):
            root, (low, high) = math.sqrt(1 - c["alpha_D"]), c["rho"][i]
            t, largest = eta / (K + 1) ** 0.75, max(L1_workers[i])
            growth = 8 * t**2 * high / low * largest**2
            needs = [
                2 * (K + 1) * t**2 * L1[i] ** 2,
                (K + 1) * root / (1 - root) * growth,
                (K + 1) / theorem.beta(K) * growth,
            ]
            assert max(needs) <= 1 / 3 * (1 + 1e-12) and eta <= 1
            assert eta == 1 or max(needs) == pytest.approx(1 / 3)


@pytest.mark.parametrize("theorem", [theory.Theorem6, theory.Corollary3], ids=name)
def test_with_compression_the_noisy_bound_still_falls_as_the_fourth_root(theorem):
    c = draw(0) | {"eta": None, "L1": [3.0, 3.0], "L1_workers": [[3.0] * 3] * 2}
    if theorem is theory.Theorem6:
        c["eta"] = [None]
    bounds = [make(theorem, c).bound(k) for k in (10**14, 16 * 10**14)]
    assert bounds[1] == pytest.approx(bounds[0] / 2, rel=0.01)


def test_an_eta_that_is_too_large_is_refused_with_the_largest():
    c = draw(0) | {"eta": [2.0, 0.01]}
    with pytest.raises(ValueError, match=r"`eta\[0\]` must be at most .* for 1000 iterations"):
        make(theory.Corollary3, c).bound(K)


@pytest.mark.parametrize(
    "theorem, change, message",
    [
        (theory.Theorem3, {"L": [0.0]}, "`L` must be positive and finite, got 0.0"),
        (theory.Theorem14, {"L": [1.0, -1.0]}, r"`L\[1\]` must be positive"),
        (theory.Theorem14, {"L_workers": [[1.0, math.nan, 1.0]] * 2}, r"`L_workers\[0\]\[1\]`"),
        (theory.Theorem14, {"L": [1.0]}, "one entry a layer"),
        (theory.Theorem14, {"L_workers": [[1.0], [1.0, 2.0]]}, "one entry a worker"),
        (theory.Theorem3, {"alpha_D": 0.0}, r"`alpha_D` must be in \(0, 1\]"),
        (theory.Theorem3, {"alpha_P": 1.5}, r"`alpha_P` must be in \(0, 1\]"),
        (theory.Theorem3, {"scale": 2.0}, r"`scale` must be in \(0, 1\]"),
        (theory.Theorem3, {"gap": -1.0}, "`gap` must be finite and not negative"),
        (theory.Theorem5, {"sigma": [-1.0]}, "`sigma`"),
        (theory.Theorem5, {"beta": [0.0]}, "`beta`"),
        (theory.Theorem5, {"rho": [(2.0, 1.0)]}, r"`rho` must be a pair \(lower, upper\)"),
        (theory.Corollary1, {"rho": [(1.0, 1.0), (0.0, 1.0)]}, r"`rho\[1\]`"),
        (theory.Corollary1, {"beta": [1.0]}, "`beta` has 1"),
        (theory.Corollary2, {"gap": 0.0}, "`gap` must be positive"),
        (theory.Theorem4, {"L1": [0.0]}, "`L1` must be positive"),
        (theory.Theorem4, {"eta": [0.0]}, "`eta`"),
        (theory.Theorem17, {"worker_gaps": [-1.0, 0.5, 0.0]}, "must not be negative on average"),
        (theory.Theorem17, {"worker_gaps": [1.0]}, "`worker_gaps` has 1"),
        (theory.Theorem24, {"L1_workers": [[1.0], []]}, r"`L1_workers\[1\]` must not be empty"),
        (theory.Theorem6, {"start_gradients": [-1.0]}, "`start_gradient`"),
        (theory.Corollary3, {"start_gradients": [1.0]}, "`start_gradients` has 1"),
    ],
)
def test_bad_constants_are_named(theorem, change, message):
    with pytest.raises(ValueError, match=message):
        make(theorem, draw(0), **change)


@pytest.mark.parametrize("theorem", SMOOTH + GENERALIZED, ids=name)
def test_no_bound_is_given_for_no_iterations(theorem):
    with pytest.raises(ValueError, match="`iterations` must be positive"):
        make(theorem, draw(0)).bound(0)


# Against runs.


@pytest.mark.parametrize(
    "norm", [ef21.Sign(), ef21.Frobenius(), ef21.Spectral(exact=True), ef21.L1()], ids=repr
)
def test_sharp_steps_are_lmo_steps_as_long_as_the_dual_norm(norm):
    g = {"w": jax.random.normal(jax.random.key(0), (4, 6)), "zero": jnp.zeros((2, 3))}
    tx = ef21.sharp_step(norm, 0.1)
    step, _ = tx.update(g, tx.init(g))
    expected = 0.1 * norm.dual(g["w"]) * norm.lmo(g["w"])
    np.testing.assert_allclose(step["w"], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(step["zero"])


def test_sharp_steps_in_the_euclidean_norm_are_gradient_descent():
    g = jnp.arange(6.0).reshape(2, 3)
    schedule = optax.linear_schedule(1.0, 0.0, 2)
    tx = ef21.sharp_step(ef21.Frobenius(), schedule)
    state = tx.init(g)
    for rate in (1.0, 0.5, 0.0):
        step, state = tx.update(g, state)
        np.testing.assert_allclose(step, -rate * g, rtol=1e-6)


def test_sharp_steps_need_a_norm():
    with pytest.raises(ValueError, match="expected a Norm"):
        ef21.sharp_step("sign", 0.1).init({"w": jnp.zeros((2, 2))})


@pytest.fixture(scope="module")
def descent():
    """A run of Algorithm 2 at Theorem 14's step sizes: all that Ψ^k is made of, and ‖∇_i f‖_*².

    It starts at G_j^0 = C(∇f_j(X^0)), so that there are errors to lose.
    """
    shape, n, length = (3, 4), 3, 400
    norms = ef21.Sign(), ef21.Frobenius()
    uplink, downlink = ef21.TopK(0.25), ef21.Natural(nearest=True)
    problems = [quadratics.different(n, shape, seed=i) for i in range(2)]
    smooth = [p.smoothness(norm) for p, norm in zip(problems, norms, strict=True)]
    starts = tuple(jnp.asarray(p.start(), float) for p in problems)
    workers = tuple(jax.tree.map(lambda x: jnp.asarray(x, float), p.workers) for p in problems)

    def loss(params, worker):
        return sum(map(quadratics.Quadratics.loss, params, worker))

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    values = jax.vmap(loss, in_axes=(None, 0))
    lower = sum(p.lower for p in problems)
    theorem = theory.Theorem14(
        L=[L for L, _ in smooth],
        L_workers=[each for _, each in smooth],
        gap=float(jnp.mean(values(starts, workers))) - lower,
        alpha_D=min(uplink.contraction(shape, d) for d in (ef21.L1(), ef21.Frobenius())),
        alpha_P=min(downlink.contraction(shape, norm) for norm in norms),
    )
    feedback = ef21.ef21(uplink)
    gammas = theorem.gamma
    tx = ef21.distribute(
        worker=feedback.worker,
        server=optax.chain(
            feedback.server,
            ef21.sharp_step(norms, 1.0),
            optax.stateless(
                lambda steps, _: tuple(g * s for g, s in zip(gammas, steps, strict=True))
            ),
        ),
        downlink=ef21.ef21_p(downlink),
        axis_name="workers",
    )

    def one_worker(params, state, worker):
        updates, state = tx.update(jax.grad(loss)(params, worker), state, params)
        return optax.apply_updates(params, updates), state, None

    def one_round(carry, _):
        params, state = carry
        model = ef21.server_params(tx, params, state)
        exact = gradients(model, workers)
        residual = optax.tree.get(state.downlink, "residual")  # X^k − W^k
        *carry, _ = ef21.spmd(one_worker)(params, state, workers)
        estimate = optax.tree.get(carry[1].worker, "estimate")  # G_j^k, of the gradient at W^k
        errors = jax.tree.map(jnp.subtract, exact, estimate)
        measured = (
            jnp.mean(values(model, workers)) - lower,
            [jnp.mean(norm.dual(e) ** 2) for norm, e in zip(norms, errors, strict=True)],
            [norm.norm(r) ** 2 for norm, r in zip(norms, residual, strict=True)],
            [norm.dual(jnp.mean(g, axis=0)) ** 2 for norm, g in zip(norms, exact, strict=True)],
        )
        return tuple(carry), measured

    state = ef21.replicate(tx.init(starts), n)
    scan = jax.jit(lambda carry: jax.lax.scan(one_round, carry, length=length)[1])
    gap, estimates, models, squares = jax.tree.map(
        lambda x: np.asarray(x, np.float64), scan((starts, state))
    )
    return theorem, gap, estimates, models, squares


def test_the_lyapunov_value_falls_as_the_proof_of_theorem_14_says(descent):
    theorem, gap, estimates, models, squares = descent
    psi = theorem.lyapunov(gap, estimates=estimates, models=models)
    fall = sum(g * s for g, s in zip(theorem.gamma, squares, strict=True)) / 4
    assert np.all(psi[1:] <= psi[:-1] - fall[:-1] + 1e-6)
    # Estimates and models are behind, or nothing were tested.
    assert psi[0] > 1.02 * gap[0] and np.all(models[0][1:50] > 0)


def test_the_bound_of_theorem_14_holds_and_is_tight_to_a_factor_of_five(descent):
    theorem, gap, estimates, _, squares = descent
    psi = theorem.lyapunov(gap[0], estimates=[e[0] for e in estimates])
    left = sum(w * s for w, s in zip(theorem.weights, squares, strict=True))
    left = np.cumsum(left) / np.arange(1, len(left) + 1)
    bounds = np.array([theorem.bound(k, psi) for k in range(1, len(left) + 1)])
    assert np.all(left <= bounds)
    assert left[-1] > bounds[-1] / 5
