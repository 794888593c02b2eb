"""The library takes the steps of the papers' boxes, and of every method that they generalise.

In float64, where rounding does not decide which entry is the largest or whether a power of two
is the nearest: one such decision would part two paths that are the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pseudocode
import pytest
from problem import SHAPES, Problem, assert_same_path, assert_same_trees, mean_loss, train

import ef21_jax as ef21


STEPS = 10
LEARNING_RATE = 0.05
NEAREST = ef21.Natural(nearest=True)

RULES = (
    ef21.Rule("vector", ef21.RMS(), ndims=(1,), scale=0.5, compress=False),
    ef21.Rule("tall", ef21.Frobenius(), "tall", scale=2.0),
    ef21.Rule("wide", ef21.Spectral(exact=True), "wide"),
)
LMO = [pseudocode.lmo_rms, pseudocode.lmo_frobenius, pseudocode.lmo_spectral]
SCALES = (0.5, 2.0, 1.0)

# The same compressor, of the library and in NumPy.
ORACLES = {
    ef21.Identity(): pseudocode.identity,
    ef21.TopK(0.2): pseudocode.top_k(0.2),
    ef21.RankK(0.5, exact=True): pseudocode.rank_k(0.5),
    NEAREST: pseudocode.natural,
    ef21.TopK(0.2) >> NEAREST: pseudocode.then(pseudocode.top_k(0.2), pseudocode.natural),
    ef21.RankK(0.5, exact=True) >> NEAREST: pseudocode.rank_k(0.5, pseudocode.natural),
}
TOP, RANK, _, TOP_NEAREST, RANK_NEAREST = list(ORACLES)[1:]

# Ties are anybody's guess, and no case may rest on one. All singular values of a spectral step
# are equal, so the wide layer has no RankK on its way down. The polar factor of few powers of two
# has equal entries, so there it has TopK only after other compressors, or after many workers.
UP_1 = {"bias": NEAREST, "tall/kernel": RANK, "wide/kernel": TOP_NEAREST}
DOWN_1 = {"bias": TOP_NEAREST, "tall/kernel": RANK_NEAREST, "wide/kernel": NEAREST}
UP_2 = {"bias": TOP, "tall/kernel": RANK_NEAREST, "wide/kernel": RANK}
DOWN_2 = {"bias": NEAREST, "tall/kernel": RANK, "wide/kernel": TOP}


# n, momentum, uplink, downlink
CASES = {
    "one worker": (1, 0.9, TOP, NEAREST),
    "few, by layer, without momentum": (3, 0.0, UP_1, DOWN_1),
    "few, by layer": (3, 0.6, UP_2, DOWN_2),
    "many": (8, 0.9, TOP_NEAREST, TOP),
}


def oracles(setting):
    """The list over layers. A single compressor leaves the vector, which is first, alone."""
    if isinstance(setting, dict):
        return [ORACLES[setting[name]] for name in SHAPES]
    return [pseudocode.identity, ORACLES[setting], ORACLES[setting]]


def falling(first, steps=STEPS):
    """A schedule that ends at zero, of a Python or of a traced count."""

    def schedule(k):
        return first * (1 - (k if isinstance(k, int) else k.astype(float)) / steps)

    return schedule


def radii(learning_rate=lambda k: LEARNING_RATE):
    return [lambda k, scale=scale: learning_rate(k) * scale for scale in SCALES]


def first_round(problem, compressors):
    """M_j^0, the first gradients, and G_j^0, what is left of them once compressed."""
    M = [problem.grad(j, 0, problem.start) for j in range(problem.n)]
    return M, [[C(layer) for C, layer in zip(compressors, m, strict=True)] for m in M]


def algorithm_3(problem, uplink, downlink, momentum, t=None, exact_start=False, **kwargs):
    M, G_j = first_round(problem, oracles(uplink))
    box = pseudocode.algorithm_3(
        problem.start,
        M,
        M if exact_start else G_j,
        problem.grad,
        t=radii() if t is None else t,
        beta=1 - momentum,
        LMO=LMO,
        C_j=oracles(uplink),
        C=oracles(downlink),
        K=problem.steps,
        **kwargs,
    )
    return zip(*box, strict=True)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Adam of optax adds Python floats to integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def problem_of(n, steps=STEPS, noise=0.3):
    return Problem(n, steps, noise=noise)


@functools.cache
def ef21_muon(case):
    """One object a case, so that it is compiled once."""
    _, momentum, uplink, downlink = CASES[case]
    return ef21.ef21_muon(
        LEARNING_RATE,
        momentum=momentum,
        uplink=uplink,
        downlink=downlink,
        rules=RULES,
        axis_name="workers",
    )


@pytest.mark.parametrize("case", CASES)
def test_ef21_muon_is_algorithm_3_of_paper_m(case):
    n, momentum, uplink, downlink = CASES[case]
    problem = problem_of(n)
    tx = ef21_muon(case)
    W, X, state = train(tx, problem)
    paper_X, paper_W, paper_G = algorithm_3(problem, uplink, downlink, momentum)
    assert_same_path(W, paper_W)
    assert_same_path(X, paper_X)
    # The box ends on one gradient more than the library has seen.
    G = tx.unstack(state.server[0].estimate, problem.params())
    assert_same_trees(list(G.values()), paper_G[-2])
    assert ef21.check_invariant(state) < 1e-12
    np.testing.assert_array_equal(state.rejected, np.zeros(n))


def test_in_float32_it_takes_the_same_steps():
    problem = Problem(3, 4)
    tx = ef21.ef21_muon(
        LEARNING_RATE, uplink=TOP, downlink=DOWN_2, rules=RULES, axis_name="workers"
    )
    with jax.enable_x64(False):
        W, X, state = train(tx, problem)
        assert W["bias"].dtype == jnp.float32
        assert ef21.check_invariant(state) < 1e-6
    paper_X, paper_W, _ = algorithm_3(problem, TOP, DOWN_2, 0.9)
    assert_same_path(W, paper_W, 1e-5)
    assert_same_path(X, paper_X, 1e-5)


def started_exactly(case, problem):
    tx = ef21_muon(case)
    state = ef21.replicate(tx.init(problem.params()), problem.n)
    state = ef21.warm_start(tx, state, problem.gradients(problem.start))
    assert ef21.check_invariant(state) == 0
    return train(tx, problem, state=state)


def test_started_exactly_and_without_noise_it_is_algorithm_2_of_paper_m():
    case = "few, by layer, without momentum"
    problem, (_, _, uplink, downlink) = problem_of(3, noise=0.0), CASES[case]
    W, X, _ = started_exactly(case, problem)
    box = pseudocode.algorithm_2(
        problem.start,
        [problem.grad(j, 0, problem.start) for j in range(problem.n)],
        problem.grad,
        t=radii(),
        LMO=LMO,
        C_j=oracles(uplink),
        C=oracles(downlink),
        K=STEPS,
    )
    paper_X, paper_W, _ = zip(*box, strict=True)
    assert_same_path(W, paper_W)
    assert_same_path(X, paper_X)


def test_started_exactly_it_is_algorithm_3_with_the_first_gradients_as_estimates():
    case = "few, by layer"
    problem, (_, momentum, uplink, downlink) = problem_of(3), CASES[case]
    W, X, _ = started_exactly(case, problem)
    paper_X, paper_W, _ = algorithm_3(problem, uplink, downlink, momentum, exact_start=True)
    assert_same_path(W, paper_W)
    assert_same_path(X, paper_X)


def test_on_one_layer_it_is_algorithm_1_of_paper_m():
    problem = Problem(3, STEPS, names=("wide/kernel",))
    tx = ef21.ef21_muon(
        LEARNING_RATE,
        momentum=0.7,
        uplink=RANK,
        downlink=TOP,
        rules=RULES,
        axis_name="workers",
    )
    W, X, _ = train(tx, problem)
    (start,) = problem.start
    M = [problem.grad(j, 0, [start])[0] for j in range(problem.n)]
    box = pseudocode.algorithm_1(
        start,
        M,
        [ORACLES[RANK](m) for m in M],
        lambda j, k, W: problem.grad(j, k, [W])[0],
        t=lambda k: LEARNING_RATE,
        beta=0.3,
        LMO=pseudocode.lmo_spectral,
        C_j=ORACLES[RANK],
        C=ORACLES[TOP],
        K=STEPS,
    )
    paper_X, paper_W, _ = zip(*box, strict=True)
    assert_same_path(W, [[w] for w in paper_W])
    assert_same_path(X, [[x] for x in paper_X])


def test_a_schedule_sets_the_radius_of_each_step_and_weight_decay_acts_on_the_servers_model():
    problem, weight_decay = problem_of(3), 2.0
    tx = ef21.ef21_muon(
        falling(0.1),
        momentum=0.8,
        uplink=TOP,
        downlink=TOP,
        rules=RULES,
        weight_decay=weight_decay,
        axis_name="workers",
    )
    W, X, _ = train(tx, problem)
    paper_X, paper_W, _ = algorithm_3(
        problem,
        TOP,
        TOP,
        0.8,
        t=radii(falling(0.1)),
        shrink=lambda k: falling(0.1)(k) * weight_decay,
    )
    assert_same_path(W, paper_W)
    assert_same_path(X, paper_X)


@pytest.mark.parametrize("topology", [ef21.Gather(), ef21.Sharded(3)], ids=repr)
def test_an_extrapolated_step_is_taken_from_the_last_change_ahead_of_the_estimate(topology):
    problem = problem_of(3)
    tx = ef21.ef21_muon(
        LEARNING_RATE,
        momentum=0.6,
        uplink=UP_2,
        downlink=DOWN_2,
        extrapolation=1.5,
        rules=RULES,
        axis_name="workers",
        topology=topology,
    )
    W, X, state = train(tx, problem)
    paper_X, paper_W, _ = algorithm_3(problem, UP_2, DOWN_2, 0.6, kappa=1.5)
    assert_same_path(W, paper_W)
    assert_same_path(X, paper_X)
    assert ef21.check_invariant(state) < 1e-12, "what is kept is the estimate itself"


# Without compression. ----------------------------------------------------------------------------


def test_without_compression_it_is_gluon_on_the_mean_gradient_for_any_number_of_workers():
    problem = problem_of(3, 6)
    kwargs = dict(momentum=0.9, rules=RULES)
    paper_X, _, _ = algorithm_3(problem, ef21.Identity(), ef21.Identity(), 0.9)
    identity = ef21.ef21_muon(LEARNING_RATE, uplink=ef21.Identity(), axis_name="workers", **kwargs)
    many, _, _ = train(identity, problem)
    plain, _, _ = train(ef21.gluon(LEARNING_RATE, axis_name="workers", **kwargs), problem)
    alone, _, _ = train(ef21.gluon(LEARNING_RATE, **kwargs), problem, axis_name=None)
    for W in (many, plain, alone):
        assert_same_path(W, paper_X)


def test_extrapolation_undoes_what_every_message_withholds():
    """C(x) = x / 4 leaves out three times what it sends, and that is added to the estimate."""
    problem = problem_of(3, 6)
    kwargs = dict(momentum=0.9, rules=RULES, axis_name="workers")
    quarter = dict.fromkeys(SHAPES, ef21.Damping(0.25))
    ahead = ef21.ef21_muon(LEARNING_RATE, uplink=quarter, extrapolation=3.0, **kwargs)
    W, _, _ = train(ahead, problem)
    plain, _, _ = train(ef21.gluon(LEARNING_RATE, **kwargs), problem)
    assert_same_trees(W, plain)


def test_a_momentum_that_is_extrapolated_by_its_decay_is_nesterovs():
    problem = problem_of(3, 6)
    tx = ef21.ef21_muon(
        LEARNING_RATE,
        momentum=0.8,
        uplink=ef21.Identity(),
        extrapolation=0.8,
        rules=RULES,
        axis_name="workers",
    )
    W, _, _ = train(tx, problem)
    box = pseudocode.nesterov(
        problem.start, problem.grad, n=3, t=radii(), decay=0.8, LMO=LMO, K=problem.steps
    )
    assert_same_path(W, list(box))


def test_the_default_recipe_is_a_compressor_and_its_extrapolation():
    params = {"kernel": jnp.zeros((12, 20))}
    gradients = jax.random.normal(jax.random.key(0), (3, 12, 20))

    def path(**kwargs):
        tx = ef21.ef21_muon(LEARNING_RATE, rules=(ef21.Rule("all", ef21.Frobenius()),), **kwargs)

        def one(state, g):
            step, state = tx.update({"kernel": g}, state, params)
            return state, step["kernel"]

        return jax.lax.scan(one, tx.init(params), gradients)[1]

    up, ahead = ef21.DEFAULT_UPLINK, ef21.DEFAULT_EXTRAPOLATION
    default = path()
    np.testing.assert_allclose(default, path(uplink=up, extrapolation=ahead))
    of_the_paper = path(uplink=up)
    np.testing.assert_allclose(of_the_paper, path(extrapolation=0.0))
    assert np.abs(default - of_the_paper).max() > 0.001
    sent = ef21.ledger.bytes_per_step(ef21.ef21_muon(LEARNING_RATE), params).up
    assert sum(route.bytes_up for route in ef21.routes(params)) == sent < 12 * 20


def test_an_extrapolation_past_the_largest_float_is_still_a_direction():
    server = ef21.ef21(ef21.Identity(), extrapolation=2.0).server
    g = jnp.asarray([3e38, -3e38, 1.0], jnp.float32)
    ahead, state = server.update(g, server.init(g))
    largest = jnp.finfo(jnp.float32).max
    np.testing.assert_array_equal(ahead, [largest, -largest, 3.0])
    np.testing.assert_array_equal(state.estimate, g)


@pytest.mark.parametrize("bad", [-0.5, float("inf"), float("nan")])
def test_an_extrapolation_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=f"`extrapolation` must lie in .* got {bad}"):
        ef21.ef21_muon(LEARNING_RATE, extrapolation=bad)


def test_constrained_scion_at_rate_one_ends_each_step_on_the_ball_of_its_rules():
    problem = problem_of(3, 6)
    W, _, _ = train(ef21.scion(1.0, constrained=True, axis_name="workers"), problem)
    for route in ef21.routes(problem.params(), ef21.SCION_RULES):
        # Polynomial iterations stand in for the exact oracle.
        np.testing.assert_allclose(jax.vmap(route.norm.norm)(W[route.path]), 1.0, rtol=0.02)


def test_muon_without_nesterov_is_that_of_optax(standard_promotion):
    names = {"block/kernel": (5, 8), "block/up/kernel": (9, 4), "bias": (6,), "embed": (12, 5)}
    rng = np.random.default_rng(0)
    params, gradients = (
        {k: jnp.asarray(rng.normal(size=(*leading, *s)), float) for k, s in names.items()}
        for leading in ((), (8,))
    )
    # Optax adds 1e-8 to the norm that it divides by.
    gradients = optax.tree.scale(1e4, gradients)
    rates = dict(weight_decay=0.1, adam_learning_rate=0.003)
    jordan = ef21.Rule("hidden", ef21.Spectral(ef21.JORDAN), "kernel", policy=ef21.muon_scale)
    ours = ef21.muon(0.02, momentum=0.9, nesterov=False, rules=(jordan, *ef21.MUON_RULES), **rates)
    matrix = optax.contrib.MuonDimensionNumbers()
    theirs = optax.contrib.muon(
        0.02,
        ns_coeffs=(3.4445, -4.7750, 2.0315),
        ns_steps=5,
        beta=0.9,
        nesterov=False,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers={k: matrix if "kernel" in k else None for k in names},
        **rates,
    )

    def run(tx):
        def one(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        start = (params, tx.init(params))
        return jax.jit(lambda start: jax.lax.scan(one, start, gradients))(start)[1]

    assert_same_trees(run(ours), run(theirs))


# Euclidean methods. ------------------------------------------------------------------------------

UP = {"bias": NEAREST, "tall/kernel": RANK, "wide/kernel": TOP}
DOWN = {"bias": TOP, "tall/kernel": NEAREST, "wide/kernel": RANK}


def test_ef21_sgd_is_ef21():
    problem = problem_of(3)
    W, _, _ = train(ef21.ef21_sgd(0.1, uplink=UP, axis_name="workers"), problem)
    _, g_i = first_round(problem, oracles(UP))
    box = pseudocode.ef21(problem.start, g_i, problem.grad, gamma=0.1, C=oracles(UP), K=STEPS)
    assert_same_path(W, [x for x, _ in box])


def test_ef21_sgd_with_a_downlink_alone_is_ef21_p():
    problem = problem_of(3)
    tx = ef21.ef21_sgd(0.1, uplink=ef21.Identity(), downlink=DOWN, axis_name="workers")
    W, X, _ = train(tx, problem)
    box = pseudocode.ef21_p(problem.start, problem.grad, n=3, gamma=0.1, C=oracles(DOWN), K=STEPS)
    paper_X, paper_W = zip(*box, strict=True)
    assert_same_path(X, paper_X)
    assert_same_path(W, paper_W)


def test_ef21_sgd_with_both_links_is_ef21_p_with_ef21():
    problem = problem_of(8)
    W, X, _ = train(ef21.ef21_sgd(0.1, uplink=UP, downlink=DOWN, axis_name="workers"), problem)
    _, g_i = first_round(problem, oracles(UP))
    box = pseudocode.ef21_p_with_ef21(
        problem.start,
        g_i,
        problem.grad,
        gamma=0.1,
        C_w=oracles(UP),
        C_s=oracles(DOWN),
        K=STEPS,
    )
    paper_X, paper_W = zip(*box, strict=True)
    assert_same_path(X, paper_X)
    assert_same_path(W, paper_W)


def test_ef21_sgdm_is_ef21_sgdm():
    problem = problem_of(3)
    W, _, _ = train(ef21.ef21_sgdm(0.1, momentum=0.7, uplink=UP, axis_name="workers"), problem)
    v_i, g_i = first_round(problem, oracles(UP))
    box = pseudocode.ef21_sgdm(
        problem.start,
        v_i,
        g_i,
        problem.grad,
        gamma=0.1,
        eta=0.3,
        C=oracles(UP),
        K=STEPS,
    )
    assert_same_path(W, [x for x, _ in box])


def test_normalized_ef21_is_algorithm_1_of_paper_n():
    problem = problem_of(3)
    tx = ef21.normalized_ef21(falling(0.5), uplink=UP, axis_name="workers")
    W, _, state = train(tx, problem)
    box = pseudocode.normalized_ef21(
        problem.start,
        [[np.zeros_like(layer) for layer in problem.start] for _ in range(3)],
        problem.grad,
        gamma=falling(0.5),
        C=oracles(UP),
        K=STEPS - 1,
    )
    x, v = zip(*box, strict=True)
    assert_same_path(W, x)
    G = tx.unstack(state.server[0].estimate, problem.params())
    assert_same_trees(list(G.values()), v[-1])


def test_ef14_sgd_is_ef14_with_the_step_size_inside_the_compressor():
    problem = problem_of(3)
    W, _, _ = train(ef21.ef14_sgd(falling(0.2), uplink=UP, axis_name="workers"), problem)
    box = pseudocode.ef14(
        problem.start,
        problem.grad,
        n=3,
        gamma=falling(0.2),
        C=oracles(UP),
        K=STEPS,
    )
    assert_same_path(W, list(box))


def test_compressed_sgd_is_compressed_descent():
    problem = problem_of(3)
    W, _, _ = train(ef21.compressed_sgd(0.1, uplink=UP, axis_name="workers"), problem)
    box = pseudocode.compressed_descent(
        problem.start, problem.grad, n=3, gamma=0.1, C=oracles(UP), K=STEPS
    )
    assert_same_path(W, list(box))


def test_on_example_1_of_beznosikov_et_al_feedback_converges_and_its_absence_diverges():
    # f_i(x) = ⟨a_i, x⟩² + ‖x‖²/4, from (1, 1, 1): the largest entry of every gradient points the
    # wrong way, so that one step of compressed descent multiplies x by 1 + 11 γ / 6.
    a = jnp.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
    top_1 = ef21.TopK(1 / 3)

    def run(tx, steps):
        def step(x, state, a):
            gradient = jax.grad(lambda x: jnp.vdot(a, x) ** 2 + jnp.vdot(x, x) / 4)(x)
            updates, state = tx.update(gradient, state, x)
            return optax.apply_updates(x, updates), state, None

        def one(carry, _):
            return ef21.spmd(step)(*carry, a)[:2], None

        x = jnp.ones((3,))
        start = (x, ef21.replicate(tx.init(x), 3))
        return jax.jit(lambda start: jax.lax.scan(one, start, length=steps))(start)[0][0]

    gamma = 1 / 171  # 1 / (L + L̃ √(β/θ)) of EF21, Theorem 1
    diverged = run(ef21.compressed_sgd(gamma, uplink=top_1, axis_name="workers"), 1000)
    np.testing.assert_allclose(diverged, np.full(3, (1 + 11 * gamma / 6) ** 1000), rtol=1e-3)
    converged = run(ef21.ef21_sgd(gamma, uplink=top_1, axis_name="workers"), 4000)
    np.testing.assert_allclose(converged, np.zeros(3), atol=1e-6)


# Any optax transform as the server. --------------------------------------------------------------


def with_adamw(compressor, learning_rate, **kwargs):
    feedback = ef21.ef21(compressor)
    server = optax.chain(feedback.server, optax.adamw(learning_rate, **kwargs))
    return ef21.distribute(feedback.worker, server, axis_name="workers")


def test_an_adamw_server_without_compression_is_adamw_on_the_mean_gradient(standard_promotion):
    problem = problem_of(3)
    W, _, _ = train(with_adamw(ef21.Identity(), 0.1), problem)
    tx = optax.adamw(0.1)

    def one(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (problem.params(), tx.init(problem.params()))
    expected = jax.jit(lambda start: jax.lax.scan(one, start, problem.batches()))(start)[1]
    assert_same_trees(W, expected)


def test_an_adamw_server_reaches_the_optimum_through_compressed_messages(standard_promotion):
    problem = problem_of(8, 600, noise=0.0)
    tx = with_adamw(UP, falling(0.1, problem.steps), weight_decay=0.0)
    W, _, state = train(tx, problem)
    batch = jax.tree.map(lambda leaf: leaf[0], problem.batches())
    slopes = jax.jit(jax.vmap(jax.grad(mean_loss), in_axes=(0, None)))(W, batch)
    sizes = jax.vmap(optax.tree.norm)(slopes)
    assert sizes[-1] < 1e-4 * sizes[0]
    assert ef21.check_invariant(state) < 1e-12
