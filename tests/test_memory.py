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
        for topology in ("gather", "sharded"):
            assert taken[topology] <= 2.5 * taken["alone"], (compressor, topology, taken)


# --- The guard ---

SHAPES = ((64, 40), (50, 70), (30, 110), (3000,))


def step_of(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def share_of_parameters(uplink, shapes):
    """Temporary memory of a step over that of the parameters."""
    tx = ef21.ef21_sgdm(0.1, uplink=uplink)
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    arguments = params, jax.eval_shape(tx.init, params), params
    memory = step_of(tx).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes / sum(4 * leaf.size for leaf in params)


@pytest.mark.parametrize(
    ("uplink", "most"), [(ef21.Identity(), 0.6), (ef21.BlockTopK(), 0.8)], ids=repr
)
def test_what_a_worker_proposes_is_not_held_until_it_is_known_to_be_finite(uplink, most, optimized):
    assert share_of_parameters(uplink, SHAPES) <= most


@pytest.mark.parametrize(
    "uplink",
    [
        ef21.RankK(0.1),
        pytest.param(ef21.BlockTopK() >> ef21.BlockNatural(), marks=pytest.mark.slow),
        pytest.param(ef21.Natural(), marks=pytest.mark.slow),
        pytest.param(ef21.Quantize(4), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_layers_are_compressed_one_after_the_other(uplink, optimized):
    # No two of them are stacked. At once, they would take from one to three times the parameters.
    shapes = [(64, 64 + 16 * number) for number in range(8)]
    assert share_of_parameters(uplink, shapes) <= 0.7
    # Vectors between them, which are sent as they are, wait for none and keep none waiting.
    mixed = [each for number, shape in enumerate(shapes) for each in (shape, (17 + number,))]
    assert share_of_parameters([uplink, ef21.Identity()] * len(shapes), mixed) <= 0.7


@pytest.mark.parametrize(
    ("uplink", "most"),
    # Layers of a shape are stacked on entry. Besides, what a stack takes to be compressed.
    [(ef21.Identity(), 1.1), (ef21.BlockTopK(), 2.1)],
    ids=["as it is", "compressed"],
)
def test_what_is_sent_as_it_is_is_not_held_either(uplink, most, optimized):
    assert share_of_parameters(uplink, [(64, 64), (64, 128)] * 8) <= most


@pytest.mark.parametrize("uplink", [ef21.Identity(), ef21.BlockTopK()], ids=repr)
@pytest.mark.parametrize("axis_name", [None, "workers"])
def test_worker_and_server_add_up_the_same_bits(axis_name, uplink, optimized):
    tx = ef21.ef21_sgdm(0.1, uplink=uplink, axis_name=axis_name)
    params = [jnp.zeros(shape) for shape in [*SHAPES, (50, 70), (600, 500)]]
    state = tx.init(params)

    def step(state, gradients):
        return tx.update(gradients, state)[1], None

    if axis_name:  # four alike: then G is each G_j, and the mean of four is exact
        step, state = ef21.spmd(step), ef21.replicate(state, 4)
    step, rng = jax.jit(step, donate_argnums=0), np.random.default_rng(0)
    for size in (1.0, 1e-3, 30.0, 1.0):
        gradients = [rng.normal(scale=size, size=p.shape).astype(np.float32) for p in params]
        if axis_name:
            gradients = [np.stack([g] * 4) for g in gradients]
        state, _ = step(state, gradients)
    of_worker, of_server = state.worker[1].estimate, state.server[0].estimate
    for name, estimate in of_server.items():
        own = of_worker[name][0] if axis_name else of_worker[name]
        np.testing.assert_array_equal(own, estimate, err_msg=name)


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
@pytest.mark.parametrize(
    "momentum", [ef21.worker_momentum(0.7), optax.trace(0.7)], ids=["ours", "optax"]
)
def test_the_state_that_is_made_twice_is_that_made_once_bit_for_bit(
    mechanism, uplink, momentum, optimized
):
    feedback = mechanism(uplink)
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
