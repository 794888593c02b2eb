"""Bytes are real: compiled programs carry what the ledger says, in every topology, and no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ef21_jax as ef21
from ef21_jax import _wire


SHAPE = registry.SHAPE
RULES = (
    ef21.Rule("vector", ef21.RMS(), ndims=(0, 1), compress=False),
    ef21.Rule("table", ef21.Sign(), path="table"),
    ef21.Rule("hidden", ef21.Frobenius()),
)
BLOCKS = ef21.BlockTopK(block=4)
NATURAL = ef21.Natural()
TOPOLOGIES = [ef21.Gather(), ef21.Sharded(4)]
PARAMS = {
    "layers": [jnp.ones((16, 24))] * 6,
    "alone": jnp.ones((8, 12)),
    "gains": [jnp.ones(16)] * 4,
    "table": jnp.ones((10, 8)),
}


def muon(topology, uplink=BLOCKS, downlink=NATURAL, axis_name="workers", **kwargs):
    return ef21.ef21_muon(
        0.1, uplink=uplink, downlink=downlink, rules=RULES, axis_name=axis_name,
        topology=topology, **kwargs,
    )  # fmt: skip


def step_of(tx, spoil=lambda grads: grads):
    def step(params, state, b):
        grads = spoil(jax.tree.map(lambda p: p * b, params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, b

    return step


def mesh_of(*axes):
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(axes))


FOUR = mesh_of(("workers", 4))


def compiled(tx, mesh, params=PARAMS, step=None, batch=4, axis_name="workers", **mapped):
    mapped_step = ef21.spmd(step or step_of(tx), mesh=mesh, axis_name=axis_name, **mapped)
    on_mesh = [name for name in np.atleast_1d(axis_name) if name in mesh.axis_names]
    devices = int(np.prod([mesh.shape[name] for name in on_mesh]))
    workers = devices if len(on_mesh) == np.size(axis_name) else batch  # lanes, on each
    state = ef21.replicate(tx.init(params), workers, mesh=mesh, axis_name=axis_name)
    return jax.jit(mapped_step).lower(params, state, jnp.ones(batch)).compile()


def brought(found):
    """Bytes of each kind of collective, as `ledger.traffic` has them."""
    kinds = dict.fromkeys(("all-gather", "all-to-all", "all-reduce", "reduce-scatter"), 0)
    for row in found.rows:
        kinds[row.kind] += row.operand_bytes * row.executions
    return kinds


@pytest.mark.slow  # test_distributed has a program of all that is gathered
def test_every_compressors_bytes_travel_both_ways_as_the_ledger_says(optimized):
    # Two leaves, that are dealt out, and one compressor, of each kind: one program holds them all.
    shared = (ef21.RandK(0.25, shared=True), ef21.RandomSubspace(0.25, shared=True))
    every = (*registry.COMPRESSORS, *registry.BLOCK_COMPRESSORS, *registry.STEPS, *shared)
    kinds = {repr(compressor): compressor for compressor in every}
    params = {name: [jnp.ones(SHAPE)] * 2 for name in kinds}
    downs = {n: c if not c.shared else NATURAL for n, c in kinds.items()}
    tx = muon(ef21.Sharded(4), uplink=kinds, downlink=downs)
    found = ef21.ledger.audit(compiled(tx, FOUR, params), tx, params, mesh=FOUR)
    assert brought(found) == ef21.ledger.traffic(tx, params, 4).brought
    for row in found.rows:  # messages as integers, what the network adds as floats
        summed = row.kind in ("all-reduce", "reduce-scatter")
        assert all(dtype.startswith("f" if summed else "u") for dtype in row.dtypes)


@pytest.mark.parametrize(
    "topology", [pytest.param(TOPOLOGIES[0], marks=pytest.mark.slow), TOPOLOGIES[1]], ids=repr
)
def test_what_is_padded_cut_or_left_with_everyone_is_counted(topology, optimized):
    tx = muon(topology)
    found = ef21.ledger.audit(compiled(tx, FOUR), tx, PARAMS, mesh=FOUR)
    assert brought(found) == ef21.ledger.traffic(tx, PARAMS, 4).brought
    many = {"all-gather", "all-to-all", "reduce-scatter"} if topology.owners > 1 else set()
    assert {row.kind for row in found.rows} >= many
    # One row of bytes for all messages that go one way.
    assert len(found.rows) <= 5


@pytest.mark.parametrize(
    ("layers", "each", "expected"),  # `each`: the bytes of a layer over those of a piece
    [
        (12, 0.25, 3),
        (12, 4, 12),
        (47, 0.95, 47),  # the only pieces of a prime number
        (5, 0.6, 5),
        (47, 0.05, 1),  # single layers are too small for that
        (5, 0.2, 1),
        (1, 50, 1),
        (4, 0, 1),
    ],
)
def test_pieces_are_as_near_to_their_size_as_the_number_of_layers_allows(layers, each, expected):
    size = round(each * _wire._PIECE)
    codes, top = np.empty((2, layers, size), np.uint8), np.empty((2, layers), np.uint16)
    assert _wire.pieces([codes[0], top[0]], 0) == _wire.pieces([codes[:1], top[:1]], 1) == expected


@pytest.mark.parametrize("inside", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sharded", [False, True], ids=["gather", "sharded"])
def test_what_goes_in_pieces_is_as_many_bytes(sharded, inside, optimized, monkeypatch):
    monkeypatch.setattr(_wire, "_PIECE", 1)
    workers = 4 // inside
    mesh = mesh_of(("workers", workers), ("inside", inside))
    tx = muon(ef21.Sharded(workers) if sharded else ef21.Gather())
    found = ef21.ledger.audit(compiled(tx, mesh, batch=workers), tx, PARAMS, mesh=mesh)
    expected = ef21.ledger.traffic(tx, PARAMS, workers).sent
    # A row that two devices do not divide has a byte more, each time that it is sent.
    spare = sum(row.executions for row in found.rows) if inside > 1 else 0
    assert expected <= found.sent_per_worker <= expected + spare
    # Six layers, of which an owner has its share.
    assert (-(-6 // workers) if sharded else 6) in {row.executions for row in found.rows}


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("compiler", ef21.Sharded(2)),
        pytest.param("mean", ef21.Sharded(2), marks=pytest.mark.slow),
        pytest.param("mean", ef21.Gather(), marks=pytest.mark.slow),
        pytest.param("compiler", ef21.Gather(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_worker_of_several_devices_sends_every_byte_once(kind, topology, optimized):
    mesh = mesh_of(("workers", 2), ("inside", 2))
    inside = "inside" if kind == "mean" else None
    tx = muon(topology, uplink={**dict.fromkeys(PARAMS, BLOCKS), "alone": ef21.Identity()},
              mean_axis_name=inside)  # fmt: skip
    program = compiled(tx, mesh, batch=4 if inside else 2, mean_axis_name=inside)
    found = ef21.ledger.audit(program, tx, PARAMS, mesh=mesh)
    expected = ef21.ledger.traffic(tx, PARAMS, 2).sent
    # A row that two devices do not divide has a byte, or a float, more.
    assert expected <= found.sent_per_worker <= expected + 4 * len(found.rows)


def test_an_array_that_is_split_inside_a_worker_is_not_gathered_across_workers(optimized):
    mesh = mesh_of(("workers", 2), ("inside", 2))
    tx = muon(ef21.Sharded(2))
    split = NamedSharding(mesh, P(None, "inside"))
    params = {**PARAMS, "layers": [jax.device_put(x, split) for x in PARAMS["layers"]]}
    ef21.ledger.audit(compiled(tx, mesh, params, batch=2), tx, params, mesh=mesh)


# Every way to travel: gathered or exchanged, added up as it is or as a message, dealt out or not.
EVERY_WAY = {
    "layers": BLOCKS,
    "alone": ef21.RandK(0.25, shared=True),
    "gains": ef21.Identity(),
    "table": ef21.RandK(0.5, shared=True),
}
DENSE = ef21.Identity()
UPLINKS = [
    pytest.param(EVERY_WAY, id="every way"),
    pytest.param(DENSE, id="dense", marks=pytest.mark.slow),
]
SEVERAL_AXES = {
    "two axes": ([("a", 2), ("b", 2)], ("a", "b"), 4),
    "lanes on devices": ([("devices", 2)], ("devices", "lanes"), 4),
    "lanes on two axes": ([("a", 2), ("b", 2)], ("a", "b", "lanes"), 8),
}
TOPOLOGY_OF = {"all repeat": lambda n: ef21.Gather(), "sharded": ef21.Sharded}


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("topology", TOPOLOGY_OF)
@pytest.mark.parametrize(
    "setting",
    ["two axes", "lanes on devices", pytest.param("lanes on two axes", marks=pytest.mark.slow)],
)
def test_workers_along_several_axes_send_what_the_ledger_says(setting, topology, uplink, optimized):
    axes, axis_name, workers = SEVERAL_AXES[setting]
    mesh = mesh_of(*axes)
    tx = muon(TOPOLOGY_OF[topology](workers), uplink=uplink, axis_name=axis_name)
    program = compiled(tx, mesh, batch=workers, axis_name=axis_name)
    at = dict(mesh=mesh, axis_name=axis_name)
    found = ef21.ledger.audit(program, tx, PARAMS, num_workers=workers, **at)
    traffic = ef21.ledger.traffic(tx, PARAMS, workers, lanes=workers // mesh.size)
    assert brought(found) == traffic.brought
    assert found.sent_per_worker == traffic.sent
    if topology == "sharded":
        assert ef21.ledger.audit(program, tx, PARAMS, **at) == found


def by_pmap(tx, workers):
    state = ef21.replicate(tx.init(PARAMS), workers)
    axes = (None, ef21.state_axes(state), 0)
    step = jax.pmap(step_of(tx), axis_name="workers", in_axes=axes, out_axes=axes)
    return step.lower(PARAMS, state, jnp.ones(workers)).compile()


def with_types_checked(tx, mesh):
    names = mesh.axis_names
    state = ef21.replicate(tx.init(PARAMS), mesh.size)

    def body(params, state, b):
        state = ef21.map_per_worker(lambda x: x[0], state)
        grads = jax.tree.map(lambda p: p * b[0], ef21.varying(params, names))
        updates, state = tx.update(grads, state, params)
        state = ef21.map_per_worker(lambda x: x[None], state)
        return optax.apply_updates(params, updates), state

    specs = (P(), ef21.state_axes(state, P(names), P()))
    step = jax.shard_map(body, mesh=mesh, in_specs=(*specs, P(names)), out_specs=specs)
    return jax.jit(step).lower(PARAMS, state, jnp.ones(mesh.size)).compile()


@pytest.mark.parametrize("kind", ["pmap", "types checked", "types checked, two axes"])
def test_steps_that_are_mapped_by_hand_send_what_the_ledger_says(kind, optimized):
    mesh = mesh_of(("a", 2), ("b", 2)) if kind.endswith("two axes") else FOUR
    tx = muon(ef21.Sharded(4), uplink=EVERY_WAY, axis_name=mesh.axis_names)
    program = by_pmap(tx, 4) if kind == "pmap" else with_types_checked(tx, mesh)
    found = ef21.ledger.audit(program, tx, PARAMS, mesh=mesh, axis_name=mesh.axis_names)
    assert brought(found) == ef21.ledger.traffic(tx, PARAMS, 4).brought


LANES = ("devices", "lanes")


@functools.cache
def eight_on_two(topology, spoil=lambda grads: grads):
    tx, mesh = muon(topology, axis_name=LANES), mesh_of(("devices", 2))
    step = step_of(tx, spoil)
    return compiled(tx, mesh, step=step, batch=8, axis_name=LANES), tx, mesh


def mean_on_devices(grads):
    return jax.tree.map(lambda g: jax.lax.pmean(g, "devices"), grads)


@pytest.mark.parametrize(
    ("program", "call", "message"),
    [
        ((ef21.Gather(),), dict(), "`num_workers` must be a multiple of 2, .*got None"),
        ((ef21.Gather(),), dict(num_workers=5), "`num_workers` .*multiple of 2, .*got 5"),
        ((ef21.Gather(),), dict(axis_name="devices"), "has a device more workers"),
        ((ef21.Sharded(8),), dict(num_workers=4), "that fits Sharded.*got 4"),
        ((ef21.Sharded(8), mean_on_devices), dict(), "A device of 4 workers sends .*averaged"),
    ],
    ids=["unknown", "no multiple", "fewer", "not the server's", "averaged before"],
)
def test_an_audit_of_lanes_says_what_is_wrong_with_it(program, call, message):
    text, tx, mesh = eight_on_two(*program)
    with pytest.raises(ValueError, match=message):
        ef21.ledger.audit(text, tx, PARAMS, **(dict(mesh=mesh, axis_name=LANES) | call))


def test_the_network_of_a_device_carries_the_messages_of_its_lanes():
    params = {"layers": [jnp.ones((16, 24))] * 8}
    alone, lanes = (ef21.ledger.traffic(muon(ef21.Gather()), params, 8, lanes=k) for k in (1, 4))
    assert alone.sent == 7 * alone.brought["all-gather"]
    assert lanes.sent == 4 * alone.brought["all-gather"]  # to one other device
    assert "8 workers, 4 on a device" in str(lanes)
    dense = muon(ef21.Gather(), uplink=DENSE)
    assert ef21.ledger.traffic(dense, params, 8, lanes=4).sent == 4 * 16 * 24 * 8
    for bad in (0, 3):
        with pytest.raises(ValueError, match=f"must divide the 8 workers, got {bad}"):
            ef21.ledger.traffic(dense, params, 8, lanes=bad)


def mean_first(grads):
    return jax.tree.map(lambda g: jax.lax.pmean(g, "workers"), grads)


def sometimes(grads):
    largest = jnp.max(grads["alone"])
    return jax.lax.cond(largest > 0, mean_first, lambda grads: grads, grads)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=repr)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (mean_first, "averaged outside of the optimizer.*all-reduce of 10,176 bytes"),
        (sometimes, "all-reduce at .*test_wire.py:.*runs only if the data say so"),
    ],
)
def test_an_audit_refuses_dense_bytes_and_collectives_under_a_condition(topology, spoil, message):
    tx = muon(topology)
    with pytest.raises(ValueError, match=message):
        ef21.ledger.audit(compiled(tx, FOUR, step=step_of(tx, spoil)), tx, PARAMS, mesh=FOUR)


def test_an_audit_of_many_steps_counts_them_all():
    tx = muon(ef21.Sharded(4))

    def three(params, state, batch):
        def body(carry, _):
            *carry, _ = ef21.spmd(step_of(tx), mesh=FOUR)(*carry, batch)
            return tuple(carry), None

        return jax.lax.scan(body, (params, state), length=3)[0]

    state = ef21.replicate(tx.init(PARAMS), 4, mesh=FOUR)
    program = jax.jit(three).lower(PARAMS, state, jnp.ones(4)).compile()
    found = ef21.ledger.audit(program, tx, PARAMS, mesh=FOUR, steps=3)
    assert brought(found) == {
        kind: 3 * size for kind, size in ef21.ledger.traffic(tx, PARAMS, 4).brought.items()
    }
    with pytest.raises(ValueError, match="A worker sends"):
        ef21.ledger.audit(program, tx, PARAMS, mesh=FOUR)


def test_a_sharded_server_sends_its_message_once_however_many_workers():
    params = {"layers": [jnp.ones((16, 24))] * 8}
    sent = {n: ef21.ledger.traffic(muon(ef21.Sharded(n)), params) for n in (2, 4, 8)}
    whole = ef21.ledger.bytes_per_step(muon(ef21.Gather()), params)
    for n, traffic in sent.items():
        assert traffic.sent == (n - 1) / n * whole.up + (n - 1) * whole.down / n
    # Where all workers repeat the step, a worker sends to every other one.
    assert ef21.ledger.traffic(muon(ef21.Gather()), params, 8).sent == 7 * whole.up


ARRAYS = [
    np.arange(7, dtype=np.uint8),
    np.zeros((0, 3), np.uint16),
    np.arange(6, dtype=np.uint16).reshape(2, 3) * 9999,
    np.asarray(4_000_000_001, np.uint32),
    np.arange(8, dtype=np.uint32).reshape(2, 2, 2) * 123_456_789,
]


@pytest.mark.parametrize("large", [0, 12, 1 << 22])
@pytest.mark.parametrize("lead", [0, 1])
def test_rows_hold_their_arrays_bit_for_bit(large, lead, monkeypatch):
    monkeypatch.setattr(_wire, "_LARGE", large)
    arrays = [jnp.asarray(np.stack([x, x[..., ::-1] if x.ndim else x])) if lead else jnp.asarray(x)
              for x in ARRAYS]  # fmt: skip
    rows = _wire.Rows.of(arrays, lead)
    assert all(row.ndim == lead + 1 for row in rows.rows)
    assert sum(row.nbytes for row in rows.rows) == sum(x.nbytes for x in arrays)
    # As a collective does, with another lead.
    carried = rows.carried(lambda row: jnp.stack([row, row]))
    for found, array in zip(carried, arrays, strict=True):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, np.stack([array, array]))
