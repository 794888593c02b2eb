"""Randomness is a function of seed, step, worker, leaf and direction, and of nothing else."""

import jax
import numpy as np

import ef21_jax as ef21


# Each entry, 1.5, becomes 1 or 2: two draws agree with a probability of 2**-64.
COIN = ef21.Natural()
PARAMS = {"a": np.zeros((8, 8), np.float32), "b": np.zeros((8, 8), np.float32)}
GRADIENTS = {name: np.full_like(leaf, 1.5) for name, leaf in PARAMS.items()}


def distinct(patterns):
    rows = np.stack([np.ravel(pattern) for pattern in patterns])
    return len(np.unique(rows, axis=0)) == len(rows)


@jax.jit
def up(seed):
    """What a single worker sends in its first two steps, as updates."""
    tx = ef21.compressed_sgd(1.0, uplink=COIN, seed=seed)
    first, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)
    second, _ = tx.update(GRADIENTS, state, PARAMS)
    return first, second


@jax.jit
def down(seed):
    """What the server sends in its first step."""
    tx = ef21.ef21_sgd(1.0, uplink=ef21.Identity(), downlink=COIN, seed=seed)
    return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)[0]


def test_every_step_leaf_direction_and_seed_draws_anew_and_draws_again_the_same():
    first, second = up(0)
    draws = [*jax.tree.leaves((first, second)), *jax.tree.leaves(down(0))]
    assert all(set(np.ravel(draw)) == {-1.0, -2.0} for draw in draws)
    assert distinct(draws)
    assert distinct([*draws, *jax.tree.leaves((up(1), down(1)))])
    jax.tree.map(np.testing.assert_array_equal, up(0), (first, second))


def test_every_worker_draws_its_own_and_all_receive_the_same():
    tx = ef21.ef21_sgd(1.0, uplink=COIN, downlink=COIN, axis_name="workers")

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return params, state, updates

    gradients = {name: np.stack([g] * 4) for name, g in GRADIENTS.items()}
    state = ef21.replicate(tx.init(PARAMS), 4)
    _, state, updates = jax.jit(ef21.spmd(step))(PARAMS, state, gradients)
    estimates = jax.vmap(lambda e: tx.unstack(e, PARAMS))(state.worker[0].estimate)
    assert distinct([*estimates["a"], *estimates["b"]])
    for name in PARAMS:
        np.testing.assert_array_equal(updates[name], np.stack([updates[name][0]] * 4))
