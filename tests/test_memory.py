"""What compiled programs need beside their arguments."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import memory_job
import numpy as np
import optax
import pytest

import ef21_jax as ef21


REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("which", ["few", pytest.param("more", marks=pytest.mark.slow)])
def test_the_mean_of_eight_messages_takes_little_more_memory_than_that_of_one(which):
    job = [sys.executable, "-m", "tests.memory_job", which]
    done = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(memory_job.COMPRESSORS[which])
    for compressor, taken in found.items():
        # As they come, and taken apart.
        received = 2 * memory_job.WORKERS * taken["message"]
        for topology in ("gather", "sharded"):
            most = 2.5 * taken["alone"] + received
            assert taken[topology] <= most, (compressor, topology, taken)


# --- The guard ---

SHAPES = ((64, 40), (50, 70), (30, 110), (3000,))


def step_of(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.mark.parametrize(
    ("uplink", "most"),
    # Layers of a shape are stacked on entry. Besides, all that is sent, if it is compressed.
    [(ef21.Identity(), 1.1), (ef21.BlockTopK(), 2.3)],
    ids=lambda value: "" if isinstance(value, float) else repr(value),
)
def test_what_a_worker_proposes_is_not_held_until_it_is_known_to_be_finite(uplink, most, optimized):
    tx = ef21.ef21_sgdm(0.1, uplink=uplink)
    shapes = [(64, 64), (64, 128)] * 8
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments = params, jax.eval_shape(tx.init, params), params
    memory = step_of(tx).lower(*arguments).compile().memory_analysis()
    size = sum(4 * leaf.size for leaf in params)
    assert memory.temp_size_in_bytes <= most * size  # neither momenta nor estimates


@pytest.mark.parametrize(
    ("mechanism", "uplink"),
    [
        (ef21.ef21, ef21.Identity()),
        (ef21.ef21, ef21.BlockTopK() >> ef21.BlockNatural()),
        (ef21.ef14, ef21.Identity()),
        (ef21.ef14, ef21.BlockTopK()),
        pytest.param(ef21.no_feedback, ef21.BlockNatural(), marks=pytest.mark.slow),
        pytest.param(ef21.ef21, ef21.TopK(0.1) >> ef21.Natural(), marks=pytest.mark.slow),
        pytest.param(ef21.ef14, ef21.RandK(0.2), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_the_state_that_is_made_twice_is_that_made_once_bit_for_bit(mechanism, uplink, optimized):
    feedback, momentum = mechanism(uplink), ef21.worker_momentum(0.7)
    server = optax.chain(feedback.server, optax.sgd(0.1))
    carries = []
    for worker in (optax.chain(momentum, feedback.worker), feedback.after(momentum)):
        tx = ef21.distribute(worker, server)
        step, rng = step_of(tx), np.random.default_rng(0)
        params = {"w": jnp.zeros((50, 70)), "b": jnp.zeros((30,))}
        state = tx.init(params)
        for number in range(6):
            gradients = jax.tree.map(
                lambda p, rng=rng: rng.normal(size=p.shape).astype(np.float32), params
            )
            gradients["w"][4, 2] = np.nan if number == 3 else 1.0
            params, state = step(params, state, gradients)
        assert state.rejected == 1
        carries.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *carries)


@pytest.mark.parametrize("repeatable", [True, False])
def test_the_guard_has_nothing_compressed_twice(repeatable, monkeypatch):
    compressed = []

    def compress(self, x, key):
        compressed.append(x.shape)
        return ef21.Identity().compress(x, key)

    monkeypatch.setattr(ef21.TopK, "compress", compress)
    feedback, momentum = ef21.ef21(ef21.TopK(0.1)), ef21.worker_momentum(0.7)
    chained = optax.chain(momentum, feedback.worker)
    tx = ef21.distribute(feedback.after(momentum) if repeatable else chained, optax.sgd(0.1))
    params = [jnp.zeros(shape) for shape in SHAPES]
    jax.eval_shape(tx.update, params, tx.init(params), params)
    assert compressed == list(SHAPES)


def test_a_worker_of_the_users_own_is_asked_once_and_needs_not_know_of_it():
    asked = []

    def update(updates, state, params=None, **extra_args):
        asked.append(sorted(extra_args))
        return updates, state

    worker = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = ef21.distribute(worker, optax.sgd(0.1))
    params = [jnp.zeros(shape) for shape in SHAPES]
    tx.update(params, tx.init(params), params)
    assert asked == [["key", "shared_key"]]
