"""One update, many harnesses: lanes, devices, both, pmap, and a shard_map of the user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ef21_jax as ef21


NUM_WORKERS = 4
KEYS = jax.random.split(jax.random.key(7), 3)
BATCH = (
    jax.random.normal(KEYS[0], (2 * NUM_WORKERS, 12, 6)),
    jax.random.normal(KEYS[1], (2 * NUM_WORKERS, 12, 5)),
)
PARAMS = {"w": jax.random.normal(KEYS[2], (6, 5)), "b": jnp.zeros((5,))}
UPLINKS = [
    ef21.Identity(),
    ef21.TopK(0.1),
    ef21.TopK(0.3) >> ef21.Natural(),
    ef21.RandK(0.3),
    ef21.RankK(0.4) >> ef21.Natural(),
    ef21.RandK(0.3, shared=True),
]
# Where a compressor is one more of a kind, the slow run has it.
_SLOW = (pytest.mark.slow,)
COMPRESSED = [UPLINKS[2], *(pytest.param(u, marks=_SLOW) for u in UPLINKS[1:] if u != UPLINKS[2])]
UPLINKS_OF_KINDS = [UPLINKS[0], *COMPRESSED]


def loss(params, batch):
    a, y = batch
    return jnp.mean((a @ params["w"] + params["b"][None] - y) ** 2)


def optimizer(uplink, axis_name):
    return ef21.ef21_muon(
        1e-3, momentum=0.8, uplink=uplink, downlink=ef21.Natural(), axis_name=axis_name
    )


def one_worker(tx):
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def mesh_of(devices, name="workers"):
    return jax.make_mesh((devices,), (name,), axis_types=(AxisType.Auto,))


def run(step, params, state, batch, steps=5):
    for _ in range(steps):
        params, state, value = step(params, state, batch)
    return params, state, value


def batch_of(workers):
    return jax.tree.map(lambda x: x[:workers], BATCH)


@functools.cache
def on_lanes(uplink, workers=NUM_WORKERS):
    tx = optimizer(uplink, "workers")
    step = jax.jit(ef21.spmd(one_worker(tx)))
    return run(step, PARAMS, ef21.replicate(tx.init(PARAMS), workers), batch_of(workers))


def agree(actual, expected, tolerance=1e-6):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("uplink", UPLINKS_OF_KINDS, ids=repr)
def test_devices_agree_with_lanes(uplink):
    tx, mesh = optimizer(uplink, "workers"), mesh_of(NUM_WORKERS)
    step = jax.jit(ef21.spmd(one_worker(tx), mesh=mesh))
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS, mesh=mesh)
    agree(run(step, PARAMS, state, batch_of(NUM_WORKERS)), on_lanes(uplink))


@pytest.mark.parametrize("uplink", COMPRESSED, ids=repr)
def test_several_lanes_on_each_device_agree_with_lanes(uplink):
    names = ("workers", "lanes")
    tx, mesh = optimizer(uplink, names), mesh_of(4)
    step = jax.jit(ef21.spmd(one_worker(tx), axis_name=names, mesh=mesh))
    state = ef21.replicate(tx.init(PARAMS), 8, mesh=mesh, axis_name=names)
    agree(run(step, PARAMS, state, batch_of(8)), on_lanes(uplink, 8))


@pytest.mark.parametrize("uplink", COMPRESSED, ids=repr)
def test_pmap_agrees_with_lanes(uplink):
    tx = optimizer(uplink, "workers")
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS)
    axes = (None, ef21.state_axes(state), 0)
    step = jax.pmap(one_worker(tx), axis_name="workers", in_axes=axes, out_axes=axes)
    agree(run(step, PARAMS, state, batch_of(NUM_WORKERS)), on_lanes(uplink))


@pytest.mark.parametrize("uplink", COMPRESSED, ids=repr)
def test_a_shard_map_of_the_users_own_that_checks_types_agrees_with_lanes(uplink):
    tx, mesh = optimizer(uplink, "workers"), mesh_of(NUM_WORKERS)
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS, mesh=mesh)

    def body(params, state, batch):
        state = ef21.map_per_worker(lambda x: x[0], state)
        batch = jax.tree.map(lambda x: x[0], batch)
        value, grads = jax.value_and_grad(loss)(ef21.varying(params, "workers"), batch)
        updates, state = tx.update(grads, state, params)
        state = ef21.map_per_worker(lambda x: x[None], state)
        return optax.apply_updates(params, updates), state, value[None]

    specs = (P(), ef21.state_axes(state, P("workers"), P()), P("workers"))
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs))
    agree(run(step, PARAMS, state, batch_of(NUM_WORKERS)), on_lanes(uplink))


def test_gradients_that_were_summed_already_are_an_error_that_says_what_to_do():
    tx, mesh = optimizer(ef21.Identity(), "workers"), mesh_of(NUM_WORKERS)

    def body(params, batch):
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[0], batch))
        return tx.update(grads, tx.init(params), params)[0]

    step = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P())
    with pytest.raises(ValueError, match=r"already summed over it: b, w.*ef21_jax.varying"):
        jax.eval_shape(step, PARAMS, batch_of(NUM_WORKERS))


@pytest.mark.parametrize("method", [ef21.ef21_muon, ef21.ef21_sgd], ids=lambda m: m.__name__)
def test_one_gradient_of_a_stack_that_was_summed_already_is_named(method):
    tx, mesh = method(0.1, uplink=ef21.Identity(), axis_name="workers"), mesh_of(NUM_WORKERS)
    params = {name: {"kernel": jnp.zeros((4, 3))} for name in ("own", "summed")}

    def body(params, batch):
        seen = {**params, "own": ef21.varying(params["own"], "workers")}
        grads = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(p))) * batch[0])(seen)
        return tx.update(grads, tx.init(params), params)[0]

    step = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("workers")), out_specs=P())
    with pytest.raises(ValueError, match=r"already summed over it: summed/kernel\. "):
        jax.eval_shape(step, params, jnp.ones(NUM_WORKERS))


def test_a_single_worker_needs_no_axis():
    tx, lanes = optimizer(UPLINKS[2], None), optimizer(UPLINKS[2], "workers")
    batch = jax.tree.map(lambda x: x[0], BATCH)
    alone = run(jax.jit(one_worker(tx)), PARAMS, tx.init(PARAMS), batch)
    step = jax.jit(ef21.spmd(one_worker(lanes)))
    mapped = run(step, PARAMS, ef21.replicate(lanes.init(PARAMS), 1), batch_of(1))
    agree(alone[0], mapped[0])


def sent(compiled, summed):
    """What each worker gives to collectives, in bytes. `summed`: whether every message can be.

    Messages are gathered as the unsigned integers they are; what can be summed is, as floats.
    """
    rows = ef21.ledger.collective_bytes(compiled).rows
    for row in rows:
        letter = {"all-gather": "u", "all-reduce": "f"}[row.kind]
        assert all(dtype.startswith(letter) for dtype in row.dtypes) and not row.conditional
    assert ("all-gather" in {row.kind for row in rows}) == (not summed)
    return sum(row.executions * row.operand_bytes for row in rows)


@pytest.mark.parametrize("uplink", [*UPLINKS, ef21.RankK(0.4), ef21.Natural()], ids=repr)
def test_the_compiled_program_sends_the_bytes_of_the_ledger_and_nothing_else(uplink, optimized):
    tx, mesh = optimizer(uplink, "workers"), mesh_of(NUM_WORKERS)
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS, mesh=mesh)
    step = jax.jit(ef21.spmd(one_worker(tx), mesh=mesh))
    batch = jax.device_put(batch_of(NUM_WORKERS), NamedSharding(mesh, P("workers")))
    compiled = step.lower(PARAMS, state, batch).compile()
    of_identity = 4 * sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    expected = ef21.ledger.bytes_per_step(tx, PARAMS).up
    assert (uplink == ef21.Identity()) == (expected == of_identity)
    assert sent(compiled, uplink == ef21.Identity() or uplink.shared) == expected


@pytest.mark.slow  # UPLINKS has a compressor for every way to travel
def test_every_compressors_message_travels_as_the_ledger_says(optimized):
    # One leaf, and one compressor, of each kind: a single program holds them all.
    shared = (ef21.RandK(0.25, shared=True), ef21.RandomSubspace(0.25, shared=True))
    every = (*registry.COMPRESSORS, *registry.BLOCK_COMPRESSORS, *registry.STEPS, *shared)
    kinds = {repr(compressor): compressor for compressor in every}
    params = {name: jax.random.normal(KEYS[0], registry.SHAPE) for name in kinds}
    tx, mesh = ef21.ef21_sgd(1.0, uplink=kinds, axis_name="workers"), mesh_of(NUM_WORKERS)

    def step(params, state, batch):
        grads = jax.tree.map(lambda p: p * batch, params)
        updates, state = tx.update(grads, state, params)
        return updates, state, batch

    state = ef21.replicate(tx.init(params), NUM_WORKERS, mesh=mesh)
    step = jax.jit(ef21.spmd(step, mesh=mesh))
    compiled = step.lower(params, state, jnp.ones(NUM_WORKERS)).compile()
    assert sent(compiled, summed=False) == ef21.ledger.bytes_per_step(tx, params).up


def test_without_compression_an_all_reduce_carries_the_gradient(optimized):
    tx, mesh = ef21.gluon(1e-3, axis_name="workers"), mesh_of(NUM_WORKERS)
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS, mesh=mesh)
    step = jax.jit(ef21.spmd(one_worker(tx), mesh=mesh))
    compiled = step.lower(PARAMS, state, batch_of(NUM_WORKERS)).compile()
    assert sent(compiled, summed=True) == ef21.ledger.bytes_per_step(tx, PARAMS).up == 4 * (30 + 5)


def test_a_second_step_does_not_compile_again_and_donation_is_taken():
    tx, mesh = optimizer(UPLINKS[2], "workers"), mesh_of(NUM_WORKERS)
    step = jax.jit(ef21.spmd(one_worker(tx), mesh=mesh), donate_argnums=(0, 1))
    state = ef21.replicate(tx.init(PARAMS), NUM_WORKERS, mesh=mesh)
    batch = jax.device_put(batch_of(NUM_WORKERS), NamedSharding(mesh, P("workers")))
    params = jax.device_put(jax.tree.map(jnp.copy, PARAMS), NamedSharding(mesh, P()))
    first_params, first_state, _ = step(params, state, batch)
    step(first_params, first_state, batch)
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_ten_thousand_steps_compile_once_count_exactly_and_leave_the_device_alone():
    tx = optimizer(UPLINKS[3], "workers")
    step = jax.jit(ef21.spmd(one_worker(tx)), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    carry = (params, ef21.replicate(tx.init(params), 2))
    batch = jax.device_put(batch_of(2))
    *carry, _ = step(*carry, batch)
    with jax.transfer_guard("disallow"):  # no value is read back, none is sent
        for _ in range(9_999):
            *carry, _ = step(*carry, batch)
    assert step._cache_size() == 1
    state = carry[1]
    assert state.count == 10_000
    np.testing.assert_array_equal(state.worker[0].count, [10_000, 10_000])
    np.testing.assert_array_equal(state.rejected, [0, 0])
    assert ef21.check_invariant(state) < 1e-4


def test_workers_draw_different_noise_and_steps_too():
    class Spy(ef21.Compressor):
        def compress(self, x, key):
            return ef21.Identity().compress(jax.random.uniform(key, x.shape), key)

        def contraction(self, shape):
            return None

    tx = ef21.compressed_sgd(1.0, uplink=Spy(), axis_name="workers")
    zeros = {"x": jnp.zeros(3), "y": jnp.zeros(3)}

    def step(state, batch):
        del batch
        drawn, state = tx.update(zeros, state)
        return state, drawn

    step = jax.jit(ef21.spmd(step))
    both, first = step(ef21.replicate(tx.init(zeros), 2), jnp.zeros(2))
    _, second = step(both, jnp.zeros(2))
    _, alone = step(ef21.replicate(tx.init(zeros), 1), jnp.zeros(1))
    # Shared by two workers, the first one's key would give the mean that it gives alone.
    assert not np.allclose(first["x"][0], alone["x"][0])
    assert not np.allclose(first["x"], first["y"])
    assert not np.allclose(first["x"], second["x"])


@pytest.mark.parametrize(
    ("axis_name", "mesh_axes", "message"),
    [
        (("a", "b"), None, "must be one name"),
        ("workers", "devices", "must name axes of the mesh"),
        (("lanes", "workers"), "workers", "must name axes of the mesh"),
    ],
)
def test_axis_names_that_fit_no_mesh_are_refused(axis_name, mesh_axes, message):
    mesh = mesh_of(4, mesh_axes) if mesh_axes else None
    with pytest.raises(ValueError, match=message):
        ef21.spmd(lambda *args: args, axis_name=axis_name, mesh=mesh)


def test_a_number_of_workers_that_does_not_fit_is_refused_with_the_remedy():
    tx, mesh = optimizer(ef21.Identity(), "workers"), mesh_of(4)
    step = ef21.spmd(one_worker(tx), mesh=mesh)
    state = ef21.replicate(tx.init(PARAMS), 8)
    with pytest.raises(ValueError, match="8 workers do not fit 4 devices.*lanes"):
        jax.eval_shape(step, PARAMS, state, BATCH)
    with pytest.raises(ValueError, match="same leading axis of workers"):
        jax.eval_shape(step, PARAMS, state, (BATCH[0], BATCH[1][:3]))


@pytest.mark.parametrize("kind", ["devices", "lanes", "several devices a worker"])
@pytest.mark.parametrize("workers", [8, 1, None])
def test_a_state_of_another_number_of_workers_is_refused_and_no_part_of_it_lost(workers, kind):
    tx, setting = optimizer(ef21.Identity(), "workers"), {}
    batch = jax.tree.map(lambda x: x[:4], BATCH)
    if kind == "devices":  # each would take the first of its two
        setting = dict(mesh=mesh_of(4))
    elif kind != "lanes":
        mesh = jax.make_mesh((2, 2), ("workers", "inside"), axis_types=(AxisType.Auto,) * 2)
        setting = dict(mesh=mesh, mean_axis_name="inside")
    step = ef21.spmd(one_worker(tx), **setting)
    state = tx.init(PARAMS) if workers is None else ef21.replicate(tx.init(PARAMS), workers)
    right = 2 if "several" in kind else 4
    with pytest.raises(ValueError, match=f"for {right} workers.*`replicate.*{right}.` makes"):
        jax.eval_shape(step, PARAMS, state, batch)


def test_an_axis_that_is_not_bound_is_an_error_that_says_what_to_do():
    tx = optimizer(ef21.Identity(), "workers")
    with pytest.raises(ValueError, match="axis 'workers' is not bound.*spmd"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
