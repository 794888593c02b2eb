"""A server that is spread over its workers takes the steps of one that is not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ef21_jax as ef21
from ef21_jax import _topologies, _wire


SLOW = pytest.mark.slow  # a second of a kind that the default run has one of
NATURAL = ef21.Natural()
RULES = (
    ef21.Rule("vector", ef21.RMS(), ndims=(0, 1), compress=False),
    ef21.Rule("table", ef21.Sign(), path="table", scale=0.5),
    ef21.Rule("hidden", ef21.Spectral()),
)
# Of the numbers of layers some are divided by four, some are not, and some are one.
SHAPES = {
    "hidden": [(6, 5)] * 5,
    "wide": [(4, 8)] * 4,
    "odd": [(3, 7)],
    "gains": [(5,)] * 3,
    "bias": [(2,)],
    "scalar": [()],
    "table": [(10, 6)],
}
FEW = ("hidden", "odd", "table")
BLOCKS = ef21.BlockTopK(block=4)
PAIR = (BLOCKS, NATURAL)  # quick to compile
AS_IT_IS = (ef21.Identity(), ef21.Identity())  # its mean is a reduction
PAIRS = [
    PAIR,
    AS_IT_IS,
    (ef21.RankK(0.5) >> NATURAL, BLOCKS),
    (ef21.TopK(0.3) >> NATURAL, ef21.Quantize(4)),
    (ef21.RandK(0.3, shared=True), ef21.RandK(0.5)),
    (ef21.RandomSubspace(0.5, shared=True), NATURAL),
]


def tree(names=tuple(SHAPES), dtype=jnp.float32):
    key = iter(jax.random.split(jax.random.key(0), 99))
    return {
        name: [jax.random.normal(next(key), shape, dtype) for shape in SHAPES[name]]
        for name in names
    }


def muon(topology, pair=PAIR, axis_name="workers", **kwargs):
    up, down = pair
    return ef21.ef21_muon(
        0.01,
        uplink=up,
        downlink=down,
        rules=RULES,
        weight_decay=0.5,  # so that the step depends on the parameters too
        axis_name=axis_name,
        topology=topology,
        **kwargs,
    )


def batches(workers):
    return jnp.linspace(0.5, 2.0, workers)


def gradient(params, b):
    """Another one for each worker and step, of about the size of the parameters."""
    return jax.tree.map(lambda p: jnp.sin((3 * b).astype(p.dtype) * p) + p, params)


def one_worker(tx):
    def step(params, state, b):
        updates, state = tx.update(gradient(params, b), state, params)
        return optax.apply_updates(params, updates), state, b

    return step


def run(tx, params, workers, steps=6, *, axis_name="workers", mesh=None, **mapped):
    step = ef21.spmd(one_worker(tx), axis_name=axis_name, mesh=mesh, **mapped)
    state = ef21.replicate(tx.init(params), workers, axis_name=axis_name, mesh=mesh)
    batch = batches(workers)
    if mesh is not None:
        on_mesh = tuple(name for name in mesh.axis_names if name in axis_name)
        batch = jax.device_put(batch, NamedSharding(mesh, P(on_mesh)))
        params = jax.device_put(params, NamedSharding(mesh, P()))

    @jax.jit
    def train(params, state, batch):
        def body(carry, _):
            *carry, _ = step(*carry, batch)
            return tuple(carry), None

        return jax.lax.scan(body, (params, state), length=steps)[0]

    return train(params, state, batch)


@functools.cache
def on_lanes(topology, workers, steps=6):
    tx = muon(topology)
    return run(tx, tree(FEW), workers, steps)


def agree(actual, expected, tolerance=1e-6):
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=jax.tree_util.keystr(path))


def mesh_of(*axes, types=AxisType.Auto):
    names, sizes = zip(*axes, strict=True)
    return jax.make_mesh(sizes, names, axis_types=(types,) * len(axes))


@pytest.mark.parametrize(
    ("workers", "pairs"),
    [
        (2, False),
        *(pytest.param(n, False, marks=SLOW) for n in (1, 4, 8)),
        pytest.param(8, True, marks=SLOW),
    ],
    ids=["2", "1", "4", "8", "8 with every pair"],
)
def test_a_sharded_server_takes_the_steps_of_one_that_all_repeat(workers, pairs):
    # Leaves of all kinds but one that is cut, since its pieces are compressed each by itself; and
    # every pair of compressors, on five layers each.
    whole = {name: PAIR for name in SHAPES if name != "table"} | {"gains": AS_IT_IS}
    params = {"all": tree(tuple(whole))}
    pairs = {repr(pair): pair for pair in PAIRS if pairs}
    params |= {name: tree(("hidden",)) for name in pairs}
    ups, downs = (
        {"all": {name: pair[side] for name, pair in whole.items()}}
        | {name: pair[side] for name, pair in pairs.items()}
        for side in (0, 1)
    )
    runs = []
    for topology in (ef21.Gather(), ef21.Sharded(workers)):
        tx = muon(topology, (ups, downs))
        carry = run(tx, params, workers)
        runs.append((*carry, ef21.server_params(tx, *carry)))
    (params, state, model), (same_params, same_state, same_model) = runs
    agree(same_params, params, 1e-5)
    agree(same_state.worker, state.worker, 1e-5)
    agree(same_model, model, 1e-5)
    # The steps are of a length of their own: only the estimates show how long the mean is.
    estimate = state.server[0].estimate
    agree(_topologies.join(same_state.server[0].estimate, estimate), estimate, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_leaf_that_is_cut_takes_the_same_steps_where_its_compressor_does_too(dtype):
    nearest = ef21.Natural(nearest=True)
    params = tree(("table",), dtype)
    runs = []
    for topology in (ef21.Gather(), ef21.Sharded(4)):
        tx = muon(topology, (nearest, nearest))
        runs.append((tx, *run(tx, params, 4)))
    (all_tx, params, state), (tx, same_params, same_state) = runs
    agree(same_params, params, 0)
    agree(ef21.server_params(tx, same_params, same_state),
          ef21.server_params(all_tx, params, state))  # fmt: skip
    # Ten rows in four pieces of three.
    assert jax.tree.leaves(same_state.server)[0].shape == (4, 1, 3, 6)


def test_the_pieces_of_a_leaf_that_is_cut_draw_each_for_itself():
    tx = muon(ef21.Sharded(2), (ef21.RandK(0.5), NATURAL))
    _, state = run(tx, {"table": [jnp.ones((8, 6))]}, 2, steps=1)
    (estimate,) = jax.tree.leaves(state.worker[1].estimate)
    assert estimate.shape == (2, 2, 4, 6)  # workers, pieces
    # The gradient is the same everywhere, so what differs is which entries were drawn.
    assert np.all(np.any(estimate[:, 0] != estimate[:, 1], axis=(1, 2)))


HARNESSES = {
    "devices": dict(mesh=[("workers", 4)]),
    "explicit axes": dict(mesh=[("workers", 4)], types=AxisType.Explicit),
    "lanes on devices": dict(mesh=[("devices", 2)], axis_name=("devices", "lanes")),
    "two axes of devices": dict(mesh=[("a", 2), ("b", 2)], axis_name=("a", "b")),
    "two axes, the inner one first": dict(mesh=[("a", 2), ("b", 2)], axis_name=("b", "a")),
}


def in_harness(harness, topology, names, steps, pair=PAIR):
    setting = dict(HARNESSES[harness])
    mesh = mesh_of(*setting.pop("mesh"), types=setting.pop("types", AxisType.Auto))
    axis_name = setting.pop("axis_name", ("workers",))
    tx = muon(topology, pair, axis_name=axis_name)
    return run(tx, tree(names), 4, steps=steps, mesh=mesh, axis_name=axis_name)


@pytest.mark.parametrize(
    ("harness", "topology"),
    [
        *((harness, ef21.Sharded(4)) for harness in HARNESSES),
        *(pytest.param(harness, ef21.Gather(), marks=SLOW) for harness in HARNESSES),
    ],
    ids=str,
)
def test_devices_agree_with_lanes_for_a_hundred_steps(harness, topology):
    agree(in_harness(harness, topology, FEW, 100), on_lanes(topology, 4, 100))


@pytest.mark.parametrize(
    ("harness", "topology"),
    [
        ("devices", ef21.Sharded(4)),
        ("devices", ef21.Gather()),
        *(pytest.param(harness, ef21.Sharded(4), marks=SLOW) for harness in HARNESSES),
    ],
    ids=str,
)
def test_messages_that_go_in_pieces_give_the_same_means(harness, topology, monkeypatch):
    names = ("hidden", "wide", "table")
    expected = in_harness(harness, topology, names, 6)
    made = []

    def one_after_the_other(function, arrays, axis):
        made.append(_wire.pieces(arrays, axis))
        return _wire.piece_by_piece(function, arrays, axis)

    # One of an owner's two hidden layers; or of all five, and two of four wide ones.
    monkeypatch.setattr(_wire, "_PIECE", 60)
    monkeypatch.setattr(_topologies, "piece_by_piece", one_after_the_other)
    agree(in_harness(harness, topology, names, 6), expected)
    assert made == ([2] if topology.owners == 4 else [5, 2])
    # Lanes have all of it already.
    made.clear()
    run(muon(topology), tree(names), 4)
    assert not made


# Added up as it is, dealt out (gains) and not (odd), and as a message (hidden).
ADDED_UP = (*FEW, "gains")
UP_ADDED = {
    "hidden": ef21.RandK(0.3, shared=True),
    "odd": ef21.Identity(),
    "table": BLOCKS,
    "gains": ef21.Identity(),
}


@functools.cache
def added_up_on_lanes(topology):
    return run(muon(topology, (UP_ADDED, NATURAL)), tree(ADDED_UP), 4)


@pytest.mark.parametrize("harness", [name for name in HARNESSES if name != "explicit axes"])
@pytest.mark.parametrize(
    "topology", [ef21.Sharded(4), pytest.param(ef21.Gather(), marks=SLOW)], ids=str
)
def test_what_devices_add_up_agrees_with_lanes(harness, topology):
    found = in_harness(harness, topology, ADDED_UP, 6, (UP_ADDED, NATURAL))
    agree(found, added_up_on_lanes(topology), 1e-5)


def test_pmap_and_a_shard_map_that_checks_types_agree_with_lanes():
    tx, params, expected = muon(ef21.Sharded(4)), tree(FEW), on_lanes(ef21.Sharded(4), 4)
    state = ef21.replicate(tx.init(params), 4)
    axes = (None, ef21.state_axes(state), 0)
    mapped = jax.pmap(one_worker(tx), axis_name="workers", in_axes=axes, out_axes=axes)

    def body(params, state, b):
        state = ef21.map_per_worker(lambda x: x[0], state)
        grads = gradient(ef21.varying(params, "workers"), b[0])
        updates, state = tx.update(grads, state, params)
        state = ef21.map_per_worker(lambda x: x[None], state)
        return optax.apply_updates(params, updates), state, b

    specs = (P(), ef21.state_axes(state, P("workers"), P()), P("workers"))
    checked = jax.shard_map(body, mesh=mesh_of(("workers", 4)), in_specs=specs, out_specs=specs)
    for step in (mapped, jax.jit(checked)):
        carry = params, state
        for _ in range(6):
            *carry, _ = step(*carry, batches(4))
        agree(tuple(carry), expected)


@pytest.mark.parametrize(
    ("kind", "topology"),
    [
        ("mean", ef21.Sharded(2)),
        ("compiler", ef21.Sharded(2)),
        pytest.param("mean", ef21.Gather(), marks=SLOW),
        pytest.param("compiler", ef21.Gather(), marks=SLOW),
    ],
    ids=str,
)
def test_a_worker_of_several_devices_is_one_worker(kind, topology):
    """Its devices either have batches of their own, or share the arrays of one step."""
    mesh = mesh_of(("workers", 2), ("inside", 2))
    inside = "inside" if kind == "mean" else None
    tx, alone = muon(topology, mean_axis_name=inside), muon(topology)
    step = ef21.spmd(one_worker(tx), mean_axis_name=inside, mesh=mesh)

    def of_both(params, state, both):
        grads = [gradient(params, b) for b in both]
        mean = jax.tree.map(lambda x, y: (x + y) / 2, *grads)
        updates, state = alone.update(mean, state, params)
        return optax.apply_updates(params, updates), state, both

    reference = of_both if inside else one_worker(alone)
    batch = batches(4) if inside else batches(2)
    carry = tree(FEW), ef21.replicate(tx.init(tree(FEW)), 2, mesh=mesh)
    expected = tree(FEW), ef21.replicate(alone.init(tree(FEW)), 2)
    step, reference = jax.jit(step), jax.jit(ef21.spmd(reference))
    for _ in range(6):
        *carry, _ = step(*carry, batch)
        *expected, _ = reference(*expected, batch.reshape(2, 2) if inside else batch)
    agree(tuple(carry), tuple(expected))


def test_parts_of_a_server_are_unstacked_leaf_by_leaf():
    found = [
        muon(topology).unstack(on_lanes(topology, 4)[1].server[0].estimate, tree(FEW))
        for topology in (ef21.Gather(), ef21.Sharded(4))
    ]
    for part in found:
        jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), part, tree(FEW))
    # But for the table, whose pieces are compressed each by itself.
    gathered, dealt = ({"hidden": f["hidden"], "odd": f["odd"]} for f in found)
    agree(dealt, gathered, 1e-5)


def test_a_worker_keeps_its_share_of_the_servers_state_alone():
    params = tree()
    dense = ef21.replicate(muon(ef21.Gather()).init(params), 4)
    dealt = ef21.replicate(muon(ef21.Sharded(4)).init(params), 4)
    shapes = {
        name: leaf.shape
        for name, leaf in dealt.server[0].estimate.items()
        if not hasattr(leaf, "part")
    }
    # One layer of its shape, and no norm by entries: every worker keeps it.
    assert shapes == {"bias.0": (1, 2), "odd.0": (1, 3, 7), "scalar.0": (1,)}
    parts = {n: x.part.shape for n, x in dealt.server[0].estimate.items() if hasattr(x, "part")}
    assert parts == {
        "hidden.0+4": (4, 2, 6, 5),
        "wide.0+3": (4, 1, 4, 8),
        "gains.0+2": (4, 1, 5),
        "table.0": (4, 1, 3, 6),
    }
    assert jax.tree.structure(dense.worker) == jax.tree.structure(dealt.worker)


def test_what_stands_for_a_missing_layer_stays_zero():
    _, state = on_lanes(ef21.Sharded(4), 4)
    estimate, residual = state.server[0].estimate, state.downlink.residual
    for found in (estimate, residual):
        rows = found["hidden.0+4"].part.reshape(8, 6, 5)  # five layers, eight places
        assert np.all(np.any(rows[:5] != 0, axis=(1, 2)))
        np.testing.assert_array_equal(rows[5:], 0)


def test_the_invariant_and_the_exact_start_hold_for_parts():
    tx, params = muon(ef21.Sharded(4)), tree(FEW)
    state = ef21.replicate(tx.init(params), 4)
    grads = jax.vmap(gradient, in_axes=(None, 0))(params, batches(4))
    state = ef21.warm_start(tx, state, grads)
    assert ef21.check_invariant(state) < 1e-6
    step = jax.jit(ef21.spmd(one_worker(tx)))
    for _ in range(4):
        params, state, _ = step(params, state, batches(4))
    assert ef21.check_invariant(state) < 1e-5
    broken = state.server[0].estimate["hidden.0+4"]
    broken = broken._replace(part=broken.part.at[1, 0].add(1.0))
    server = state.server[0]._replace(estimate={**state.server[0].estimate, "hidden.0+4": broken})
    with pytest.raises(ValueError, match="hidden.0.4.*cannot recover"):
        ef21.check_invariant(state._replace(server=(server, *state.server[1:])))


def test_a_message_that_is_not_finite_is_refused_by_every_owner():
    tx, params = muon(ef21.Sharded(4)), tree(FEW)
    step = jax.jit(ef21.spmd(one_worker(tx)))
    start = ef21.replicate(tx.init(params), 4)
    params, before, _ = step(params, start, batches(4))
    params, after, _ = step(params, before, batches(4).at[2].set(jnp.nan))
    np.testing.assert_array_equal(after.rejected, [0, 0, 1, 0])
    assert all(
        bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, after.server))
    )
    silent = jax.tree.map(lambda a, b: bool(jnp.all(a[2] == b[2])), after.worker, before.worker)
    assert all(jax.tree.leaves(silent))
    assert ef21.check_invariant(after) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ef21.Sharded(0), "`num_workers` must be at least 1, got 0"),
        (lambda: muon("sharded"), "must be Gather.. or Sharded.n., got 'sharded'"),
        (lambda: muon(ef21.Sharded(2), axis_name=None), "Sharded.*needs workers"),
        (
            lambda: ef21.replicate(muon(ef21.Sharded(4)).init(tree()), 8),
            "sharded over 4 workers, and `num_workers` is 8",
        ),
        (
            lambda: ef21.spmd(one_worker(muon(ef21.Sharded(4))))(
                tree(FEW), ef21.replicate(muon(ef21.Gather()).init(tree(FEW)), 2), batches(2)
            ),
            "not for the 2 workers.*Sharded.2.",
        ),
        *(
            (
                lambda of=of, other=other: ef21.spmd(one_worker(muon(of)))(
                    tree(FEW), ef21.replicate(muon(other).init(tree(FEW)), 2), batches(2)
                ),
                re.escape(f"`topology={of}` makes") + ".*Make the state anew",
            )
            for of, other in (
                (ef21.Sharded(2), ef21.Gather()),
                (ef21.Gather(), ef21.Sharded(2)),
            )
        ),
        (
            lambda: ef21.spmd(lambda *a: a, mean_axis_name="fast"),
            "must name other axes of the mesh",
        ),
        (
            lambda: ef21.spmd(
                one_worker(muon(ef21.Gather())),
                mean_axis_name="inside",
                mesh=mesh_of(("workers", 2), ("inside", 2)),
            )(tree(FEW), ef21.replicate(muon(ef21.Gather()).init(tree(FEW)), 2), batches(4)),
            "the optimizer does not know.*Pass the same `mean_axis_name` to the optimizer",
        ),
        (
            lambda: ef21.ledger.traffic(muon(ef21.Sharded(4)), tree(), 2),
            "a number that fits Sharded.*got 2",
        ),
        (lambda: ef21.ledger.traffic(muon(ef21.Gather()), tree()), "got None"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_message_of_a_whole_leaf_cannot_be_dealt_out():
    feedback = ef21.ef21(ef21.TopK(0.5))
    tx = ef21.distribute(
        feedback.worker, feedback.server, axis_name="workers", topology=ef21.Sharded(2)
    )
    params = {"stack": jnp.ones((4, 3, 3))}
    step = ef21.spmd(one_worker(tx))
    with pytest.raises(ValueError, match="stack: a Sparse cannot be dealt out.*grouped"):
        jax.eval_shape(step, params, ef21.replicate(tx.init(params), 2), batches(2))


def test_routes_say_who_takes_the_step_and_add_up_to_the_ledger():
    up, down = PAIRS[3]
    topology = ef21.Sharded(4)
    routes = ef21.routes(tree(), RULES, uplink=up, downlink=down, topology=topology)
    assert {route.path.split("/")[0]: route.server for route in routes} == {
        "hidden": "5 layers, 2 each (3 empty)",
        "wide": "4 layers, 1 each",
        "odd": "every worker",
        "gains": "3 layers, 1 each (1 empty)",
        "bias": "every worker",
        "scalar": "every worker",
        "table": "4 pieces, 1 each",
    }
    assert "5 layers, 2 each (3 empty)" in str(routes)
    ledger = ef21.ledger.bytes_per_step(muon(topology, (up, down)), tree())
    assert [(r.bytes_up, r.bytes_down) for r in routes] == [(r.up, r.down) for r in ledger.rows]
