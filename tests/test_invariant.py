"""G is the mean of the G_j, for every compressor, at every step; and what breaks that is found."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import BLOCK_COMPRESSORS, COMPRESSORS, SHAPE

import ef21_jax as ef21


WORKERS = 3


def kinds(compressor):
    """The names of the classes that its messages are made of."""
    x, key = np.zeros(SHAPE, np.float32), jax.random.key(0)
    return set(re.findall(r"\b([A-Z]\w+)\(", repr(jax.eval_shape(compressor.compress, x, key))))


def one_of_each_kind():
    seen, chosen = set(), []
    # What is made of two goes first: it has the kinds of both.
    for compressor in sorted(COMPRESSORS + BLOCK_COMPRESSORS, key=lambda c: -repr(c).count(">>")):
        if not kinds(compressor) <= seen:
            seen |= kinds(compressor)
            chosen.append(compressor)
    return chosen


# Every kind of message, a leaf for each, so that one program has them all.
UPLINK = {repr(c): c for c in one_of_each_kind()}
PARAMS = {name: np.zeros(SHAPE, np.float32) for name in UPLINK}


TX = ef21.ef21_sgdm(1e-3, momentum=0.5, uplink=UPLINK, axis_name="workers")


@functools.cache
def trained():
    """The state after many steps of noise, and whether the messages were ever refused."""

    def step(params, state, gradients):
        updates, state = TX.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, None

    def one(carry, noise):
        batch = {name: noise for name in PARAMS}
        return ef21.spmd(step)(*carry, batch)[:2], None

    carry = (PARAMS, ef21.replicate(TX.init(PARAMS), WORKERS))
    noise = np.random.default_rng(0).normal(size=(100, WORKERS, *SHAPE)).astype(np.float32)
    return jax.jit(lambda carry: jax.lax.scan(one, carry, noise)[0])(carry)[1]


def estimates(state):
    """G_j, with a leading axis of workers, and G."""
    unstack = lambda estimate: TX.unstack(estimate, PARAMS)  # noqa: E731
    return jax.vmap(unstack)(state.worker[1].estimate), unstack(state.server[0].estimate)


def with_estimates(state, mine, theirs):
    mine, theirs = jax.vmap(TX.stack)(mine), TX.stack(theirs)
    return state._replace(
        worker=(state.worker[0], ef21.EF21State(mine)),
        server=(ef21.EF21State(theirs), *state.server[1:]),
    )


@pytest.mark.parametrize("name", UPLINK)
def test_the_servers_estimate_is_the_mean_of_the_workers(name):
    mine, theirs = estimates(trained())
    np.testing.assert_allclose(theirs[name], np.mean(mine[name], axis=0), atol=1e-5)
    assert np.any(theirs[name] != 0)


def test_check_invariant_returns_the_largest_gap():
    state = trained()
    assert ef21.check_invariant(state) < 1e-5
    mine, theirs = estimates(state)
    name = next(iter(PARAMS))
    size = np.max(np.abs(mine[name]))
    off = {**theirs, name: theirs[name].at[0, 0].add(3e-5 * size)}
    gap = ef21.check_invariant(with_estimates(state, mine, off))
    np.testing.assert_allclose(gap, 3e-5, rtol=0.2)
    np.testing.assert_array_equal(state.rejected, np.zeros(WORKERS))


@pytest.mark.parametrize("name", list(UPLINK)[:3])
@pytest.mark.parametrize(
    "damage",
    [
        lambda mine, theirs: (mine.at[1].set(0), theirs),
        lambda mine, theirs: (jnp.broadcast_to(mine[0], mine.shape), theirs),
        lambda mine, theirs: (jnp.zeros_like(mine), theirs),
        lambda mine, theirs: (mine, jnp.zeros_like(theirs)),
        lambda mine, theirs: (mine.at[2, 0, 0].set(jnp.nan), theirs),
        lambda mine, theirs: (mine, theirs.at[0, 0].set(jnp.inf)),
    ],
    ids=["a worker lost", "the first for all", "workers lost", "server lost", "nan", "inf"],
)
def test_an_estimate_lost_on_one_side_is_found_and_its_leaf_is_named(name, damage):
    mine, theirs = estimates(trained())
    lost, kept = damage(mine[name], theirs[name])
    state = with_estimates(trained(), {**mine, name: lost}, {**theirs, name: kept})
    with pytest.raises(ValueError) as error:
        ef21.check_invariant(state)
    assert str(error.value).startswith(f"{name}: G and the mean of the G_j differ by")
    assert "Restore workers and server from the same step" in str(error.value)


def test_starting_again_from_zero_on_both_sides_is_no_breach():
    zeros = jax.tree.map(jnp.zeros_like, estimates(trained()))
    assert ef21.check_invariant(with_estimates(trained(), *zeros)) == 0


def test_at_an_optimum_where_the_mean_vanishes_the_invariant_still_holds():
    centres = np.random.default_rng(0).normal(0, 3, (WORKERS, 50)).astype(np.float32)
    tx = ef21.ef21_sgd(0.3, uplink=ef21.TopK(0.2), axis_name="workers")

    def step(x, state, centre):
        updates, state = tx.update(x - centre, state, x)
        return optax.apply_updates(x, updates), state, None

    x = np.zeros(50, np.float32)
    carry = (x, ef21.replicate(tx.init(x), WORKERS))
    one = lambda carry, _: (ef21.spmd(step)(*carry, centres)[:2], None)  # noqa: E731
    x, state = jax.jit(lambda carry: jax.lax.scan(one, carry, length=500)[0])(carry)
    np.testing.assert_allclose(x, np.mean(centres, axis=0), atol=1e-5)
    assert ef21.check_invariant(state) < 1e-6


def test_methods_without_both_estimates_are_refused():
    state = ef21.ef14_sgd(0.1, uplink=ef21.TopK(0.2)).init(PARAMS)
    with pytest.raises(ValueError, match="0 EF21 estimates at the workers and 0 at the server"):
        ef21.check_invariant(state)


def gradients():
    return jax.tree.map(lambda p: jnp.ones((WORKERS, *p.shape)), PARAMS)


def fresh():
    return TX.init(PARAMS)


def test_a_warm_start_sets_estimates_and_momenta_to_the_gradients_and_keeps_the_types():
    cold = ef21.replicate(fresh(), WORKERS)
    given = jax.tree.map(
        lambda g: (g * jnp.arange(3.0)[:, None, None]).astype(jnp.bfloat16), gradients()
    )
    warm = ef21.warm_start(TX, cold, given)
    momentum = warm.worker[0]
    estimate, mean = estimates(warm)
    of_momentum = jax.vmap(lambda m: TX.unstack(m, PARAMS))(momentum.momentum)
    for name, g in given.items():
        np.testing.assert_array_equal(of_momentum[name], g.astype(jnp.float32))
        np.testing.assert_array_equal(estimate[name], g.astype(jnp.float32))
        np.testing.assert_array_equal(mean[name], np.ones(SHAPE))
    np.testing.assert_array_equal(momentum.count, np.ones(WORKERS))
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: tree))  # noqa: E731
    assert types(warm) == types(cold)
    assert ef21.check_invariant(warm) == 0


def test_a_warm_start_from_gradients_that_do_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"has shape \(1, 3, 12, 20\), the state's estimate \(1, 12, 20\)"
    ):
        ef21.warm_start(TX, fresh(), gradients())
    replicated = ef21.replicate(fresh(), WORKERS)
    with pytest.raises(ValueError, match=r"shape \(12, 20\).*leading axis of the 3 workers"):
        ef21.warm_start(TX, replicated, PARAMS)
    with pytest.raises(ValueError, match="Gradients have structure"):
        few = {name: gradients()[name] for name in list(PARAMS)[:2]}
        tx = ef21.ef21_sgd(0.1, uplink=ef21.TopK(0.1))
        ef21.warm_start(tx, ef21.replicate(tx.init(PARAMS), WORKERS), few)
