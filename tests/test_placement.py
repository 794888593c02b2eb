"""Arrays along Explicit axes of a mesh are worked on as any others, and lie as they lay."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_topologies import (
    BLOCKS,
    RULES,
    agree,
    batches,
    gradient,
    mesh_of,
    muon,
    one_worker,
    run,
)

import ef21_jax as ef21


PLACES = {
    "hidden": [P("inside"), P(None, "inside"), P()],  # three, which two workers do not divide
    "odd": [P()],
    "table": [P(None, "inside")],
}


def put(tree, mesh, places):
    return jax.device_put(tree, jax.tree.map(lambda place: NamedSharding(mesh, place), places))


def specs(tree):
    return [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]


def spread_params():
    rng = np.random.default_rng(0)
    shapes = {"hidden": [(6, 4)] * 3, "odd": [(3, 7)], "table": [(5, 6)]}
    return {
        name: [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in several]
        for name, several in shapes.items()
    }


@pytest.mark.parametrize(
    "of_workers", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("topology", "places"),
    [(ef21.Gather(), PLACES), (ef21.Sharded(2), PLACES), (ef21.Sharded(2), P())],
    ids=["all repeat", "sharded", "sharded, whole parameters"],
)
def test_axes_within_a_worker_may_be_explicit(topology, places, of_workers):
    params, types = spread_params(), (of_workers, AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("workers", "inside"), axis_types=types)
    placed = put(params, mesh, places)
    tx = muon(topology)
    step = jax.jit(ef21.spmd(one_worker(tx), mesh=mesh))
    batch = put(batches(2), mesh, P("workers"))
    state = ef21.replicate(tx.init(placed), 2, mesh=mesh)
    estimate = state.worker[1].estimate
    if places == PLACES:
        along = P("workers", None, None, "inside")
        estimate["hidden.0+2"] = put(estimate["hidden.0+2"], mesh, along)
    carry = placed, state
    compiled = step.lower(*carry, batch).compile()
    assert ef21.ledger.audit(compiled, tx, placed, mesh=mesh)
    books = [ef21.ledger.bytes_per_step(tx, each) for each in (placed, params)]
    assert books[0] == books[1]
    for _ in range(6):
        *carry, _ = step(*carry, batch)
    agree(tuple(carry), run(tx, params, 2))

    found, state = carry
    if of_workers == AxisType.Explicit:  # jax 0.10 forgets how, of a mesh of both types
        assert specs(found) == specs(placed)
        assert specs(state.worker[1].estimate) == specs(estimate)


@pytest.mark.parametrize("mesh_is_set", [False, True], ids=["types alone", "mesh set"])
@pytest.mark.parametrize("topology", [ef21.Gather(), ef21.Sharded(2)], ids=str)
def test_what_is_asked_of_arrays_on_explicit_axes_is_what_lanes_say(topology, mesh_is_set):
    mesh = mesh_of(("workers", 2), ("inside", 2), types=AxisType.Explicit)
    tx, params = muon(topology, (BLOCKS, BLOCKS)), spread_params()
    expected, state = run(tx, params, 2)
    placed = put(expected, mesh, PLACES)
    state_there = put(state, mesh, ef21.state_axes(state, P("workers"), P()))
    gradients = jax.tree.map(lambda x: jnp.stack([x, -3 * x]), params)
    gradients_there = put(gradients, mesh, P("workers"))

    def model(params, state):
        return ef21.server_params(tx, params, state)

    def unstacked(params, state):
        of_workers = jax.vmap(lambda part: tx.unstack(part, params))(state.worker[1].estimate)
        return of_workers, tx.unstack(state.server[0].estimate, params)

    with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
        for ask in (model, unstacked):
            for asked in (ask, jax.jit(ask)):
                agree(asked(placed, state_there), ask(expected, state))
        agree(tx.init(placed), tx.init(params))
        jax.eval_shape(tx.init, placed)
        started = ef21.warm_start(tx, state_there, gradients_there)
        agree(started, ef21.warm_start(tx, state, gradients))
        assert specs(started) == specs(state_there)
        assert ef21.check_invariant(state_there) == ef21.check_invariant(state)
        ef21.check_invariant(put(state, mesh, P()))
        assert specs(model(placed, state_there)) == specs(placed)
    assert jax.sharding.get_abstract_mesh().empty  # what was entered has been left


def ours(learning_rate, momentum, weight_decay):
    return ef21.ef21_muon(
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        uplink=BLOCKS,
        rules=RULES,
        extrapolation=momentum,
    )


def muon_and_adam(learning_rate, momentum, weight_decay):
    of_hidden = ef21.Rule("hidden", ef21.Spectral(), path="hidden/0")
    of_others = ef21.Rule("adam", ef21.Sign(), path="hidden/1")
    return ef21.muon(
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        rules=(of_hidden, of_others),
    )


def euclidean(learning_rate, momentum, weight_decay):
    del weight_decay
    return ef21.ef21_sgdm(learning_rate, momentum=momentum, uplink=BLOCKS)


def rate_before_the_compressor(learning_rate, momentum, weight_decay):
    del momentum, weight_decay
    return ef21.ef14_sgd(learning_rate, uplink=BLOCKS)


def normalized(learning_rate, momentum, weight_decay):
    del momentum, weight_decay
    return ef21.normalized_ef21(learning_rate, uplink=BLOCKS)


INJECTED = [ours, muon_and_adam, euclidean, rate_before_the_compressor, normalized]


@pytest.mark.parametrize("mesh_is_set", [False, True], ids=["types alone", "mesh set"])
@pytest.mark.parametrize("injected", INJECTED)
def test_a_single_worker_on_explicit_axes_and_hyperparameters_that_are_injected(
    injected, mesh_is_set
):
    mesh = mesh_of(("inside", 4), types=AxisType.Explicit)
    normal = np.random.default_rng(0).normal(size=(2, 8, 4))
    hidden = {"hidden": [jnp.asarray(x, jnp.float32) for x in normal]}
    placed = put(hidden, mesh, {"hidden": [P("inside"), P(None, "inside")]})

    tx = optax.inject_hyperparams(injected)(learning_rate=0.1, momentum=0.8, weight_decay=0.5)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params, jnp.float32(0.7)), state, params)
        return optax.apply_updates(params, updates), state

    expected, found = (hidden, tx.init(hidden)), (placed, tx.init(placed))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            expected = step(*expected)
            with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
                found = step(*found)
    agree(found[0], expected[0])
    assert specs(found[0]) == specs(placed)
