"""A worker that brings NaN or infinity does no harm, to itself or to anybody else."""

import functools

import jax
import numpy as np
import optax
import pytest

import ef21_jax as ef21
from ef21_jax._messages import is_message


WORKERS = 4
TOP = ef21.TopK(0.2)
RULES = (
    ef21.Rule("vector", ef21.RMS(), ndims=(1,), compress=False),
    ef21.Rule("matrix", ef21.Frobenius()),
)
PARAMS = {"b": np.zeros(5, np.float32), "w": np.zeros((6, 4), np.float32)}

METHODS = {
    "ef21_muon": ef21.ef21_muon(
        0.1, uplink=TOP >> ef21.Natural(), downlink=TOP, rules=RULES, axis_name="workers"
    ),
    # Rounding to a power of two makes something finite of a NaN.
    "ef21_sgd": ef21.ef21_sgd(0.1, uplink=ef21.Natural(), axis_name="workers"),
    "ef14_sgd": ef21.ef14_sgd(0.1, uplink=ef21.RandK(0.5), axis_name="workers"),
    # What the others have kept is found by a seed that the spoiled message holds too.
    "shared": ef21.ef21_sgd(0.1, uplink=ef21.RandK(0.5, shared=True), axis_name="workers"),
    "gluon": ef21.gluon(0.1, rules=RULES, axis_name="workers"),
}
FAULTS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@functools.cache
def method(name):
    """A fresh state for every worker, and one round, compiled: its gradients are the batch."""
    tx = METHODS[name]

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, None

    return ef21.replicate(tx.init(PARAMS), WORKERS), jax.jit(ef21.spmd(step))


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {
        "b": rng.normal(1.0, 1.0, (WORKERS, 5)).astype(np.float32),
        "w": rng.normal(size=(WORKERS, 6, 4)).astype(np.float32),
    }


def spoiled(clean, worker, value):
    w = clean["w"].copy()
    w[worker, 2, 3] = value
    return {"b": clean["b"], "w": w}


def rounds(name, every_gradient):
    state, step = method(name)
    carry = (PARAMS, state)
    for gradient in every_gradient:
        *carry, _ = step(*carry, gradient)
    return carry


def of_worker(state, j):
    return jax.tree.map(lambda leaf: np.asarray(leaf[j]), state.worker)


def assert_bits_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_finite(tree):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [0, 2], ids="step {}".format)
@pytest.mark.parametrize("name", METHODS)
def test_a_worker_with_a_fault_keeps_its_state_and_is_counted(name, at, fault):
    before = [gradients(seed) for seed in range(at)]
    clean = gradients(at)
    params, state = rounds(name, before)
    _, healthy = rounds(name, [*before, clean])
    params, faulty = rounds(name, [*before, spoiled(clean, 1, FAULTS[fault])])

    assert_finite((params, faulty))
    assert_bits_equal(of_worker(faulty, 1), of_worker(state, 1))
    for j in (0, 2, 3):
        assert_bits_equal(of_worker(faulty, j), of_worker(healthy, j))
    np.testing.assert_array_equal(faulty.rejected, [0, 1, 0, 0])
    np.testing.assert_array_equal(healthy.rejected, [0, 0, 0, 0])
    if name.startswith("ef21"):
        assert ef21.check_invariant(faulty) < 1e-6

    # And goes on as if it had not been there for that step.
    params, later = rounds(name, [*before, spoiled(clean, 1, FAULTS[fault]), gradients(9)])
    assert_finite((params, later))
    np.testing.assert_array_equal(later.rejected, [0, 1, 0, 0])


def test_a_refused_message_counts_as_zero_in_the_mean():
    clean = gradients(0)
    _, state = rounds("gluon", [spoiled(clean, 1, np.nan)])
    others = jax.tree.map(lambda g: (g[0] + g[2] + g[3]) / WORKERS, clean)
    momentum = METHODS["gluon"].unstack(state.server[0].momentum, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), momentum, others)


@pytest.mark.parametrize("name", METHODS)
def test_when_all_workers_fail_at_once_every_estimate_stays(name):
    broken = jax.tree.map(lambda g: np.full_like(g, np.nan), gradients(0))
    _, before = rounds(name, [gradients(0)])
    params, after = rounds(name, [gradients(0), broken])
    assert_finite((params, after))
    assert_bits_equal(after.worker, before.worker)
    np.testing.assert_array_equal(after.rejected, np.ones(WORKERS))
    if name.startswith("ef21"):
        assert_bits_equal(after.server[0].estimate, before.server[0].estimate)
    # At the very start too.
    params, after = rounds(name, [broken, gradients(1)])
    assert_finite((params, after))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1e37, 1e38, 3.4e38])
def test_gradients_that_overflow_on_the_way_do_no_harm(name, size):
    # Of one worker, and of all, so that each is finite and their sum is not.
    huge = jax.tree.map(lambda g: np.sign(g) * np.float32(size), gradients(0))
    for first in (spoiled(gradients(0), 1, size), huge):
        params, state = rounds(name, [first, gradients(1)])
        assert_finite((params, state))
        assert np.any(state.rejected) == (size > 1e37)
        if name.startswith("ef21") and size > 1e37:
            assert ef21.check_invariant(state) < 1e-6


def test_with_a_tenth_of_all_messages_lost_the_optimum_is_the_same():
    centres = np.random.default_rng(0).normal(0, 3, (WORKERS, 12)).astype(np.float32)
    tx = ef21.ef21_sgd(0.2, uplink=TOP, axis_name="workers")

    def step(x, state, batch):
        centre, fault = batch
        updates, state = tx.update(x - centre + fault, state, x)
        return optax.apply_updates(x, updates), state, None

    @jax.jit
    def run(carry, faults):
        one = lambda carry, fault: (ef21.spmd(step)(*carry, (centres, fault))[:2], None)  # noqa: E731
        return jax.lax.scan(one, carry, faults)[0]

    x = np.zeros(12, np.float32)
    start = (x, ef21.replicate(tx.init(x), WORKERS))
    hits = np.random.default_rng(0).uniform(size=(200, WORKERS, 1)) < 0.1
    entry = np.arange(12) == 7
    faults = np.where(hits & entry, np.float32(np.nan), np.float32(0))
    clean, _ = run(start, np.zeros_like(faults))
    faulty, state = run(start, faults)
    np.testing.assert_allclose(clean, np.mean(centres, axis=0), atol=1e-5)
    np.testing.assert_allclose(faulty, np.mean(centres, axis=0), atol=1e-5)
    np.testing.assert_array_equal(state.rejected, hits.sum(axis=(0, 2)))
    assert ef21.check_invariant(state) < 1e-5


@pytest.mark.parametrize("mechanism", [ef21.ef21, ef21.ef14, ef21.no_feedback])
@pytest.mark.parametrize("compressor", [TOP, ef21.Natural(), ef21.RandK(0.5)], ids=repr)
def test_what_is_looked_at_bounds_what_will_be_kept(mechanism, compressor):
    """A state is not made to be looked at: `Repeatable` says what takes its place."""
    worker = mechanism(compressor).worker
    state = jax.tree.map(lambda x: x + 3, worker.init(PARAMS))
    gradients = jax.tree.map(np.ones_like, PARAMS)
    update = functools.partial(worker.update, gradients, state, key=jax.random.key(0))
    messages, looked_at = update(provisional=True)
    _, kept = update(sent=jax.tree.map(ef21.dense, messages, is_leaf=is_message))
    sizes = [m.bound() for m in jax.tree.leaves(messages, is_leaf=is_message)]
    most = max(sizes) + max((np.max(np.abs(x)) for x in jax.tree.leaves(looked_at)), default=0)
    assert all(np.max(np.abs(x)) <= most for x in jax.tree.leaves(kept))
