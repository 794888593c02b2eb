"""What every optimizer owes optax, and the callers that optax has."""

import functools
import inspect

import flax.serialization
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef21_jax as ef21


TOP = ef21.TopK(0.2)
NEAREST = ef21.Natural(nearest=True)
BOTH = dict(uplink=TOP, downlink=NEAREST)

# Every public optimizer, with what it must be given and what can be traced besides the rate.
OPTIMIZERS = {
    "ef21_muon": (ef21.ef21_muon, BOTH, dict(momentum=0.8, weight_decay=0.1)),
    "gluon": (ef21.gluon, {}, dict(momentum=0.8, weight_decay=0.1)),
    "scion": (ef21.scion, {}, dict(momentum=0.8)),
    "muon": (ef21.muon, {}, dict(momentum=0.8, weight_decay=0.1)),
    "ef21_sgd": (ef21.ef21_sgd, BOTH, {}),
    "ef21_sgdm": (ef21.ef21_sgdm, BOTH, dict(momentum=0.8)),
    "normalized_ef21": (ef21.normalized_ef21, BOTH, {}),
    "ef14_sgd": (ef21.ef14_sgd, dict(uplink=TOP), {}),
    "compressed_sgd": (ef21.compressed_sgd, dict(uplink=TOP), {}),
}
RATE = 0.01


def normal(seed, dtypes=(jnp.float32,) * 3):
    # NumPy's numbers: those of JAX compile a program for each shape.
    rng = np.random.default_rng(seed)
    bias, kernel, embedding = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape, dtype in zip([(4,), (6, 4), (10, 4)], dtypes, strict=True)
    )
    return {"bias": bias, "block": {"kernel": kernel}, "embed": {"embedding": embedding}}


def optimizer(name, learning_rate=RATE, **kwargs):
    factory, needs, traced = OPTIMIZERS[name]
    return factory(learning_rate, **{**needs, **traced, **kwargs})


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    # Adam of optax, in `muon`, adds Python floats to integer counts.
    promotion = "standard" if request.param == "muon" else "strict"
    with jax.numpy_dtype_promotion(promotion):
        yield request.param


def types(tree):
    """Shapes, dtypes and weak types, of arrays or of what `jax.eval_shape` gives."""
    shapes = tree if has_shapes_only(tree) else jax.eval_shape(lambda: tree)
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), shapes)


def has_shapes_only(tree):
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def assert_same(a, b, rtol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


def test_all_public_optimizers_are_tested_here():
    public = {
        name
        for name, value in vars(ef21).items()
        if inspect.isfunction(value)
        and inspect.signature(value).return_annotation is ef21.Distributed
    }
    assert public - {"distribute", "grouped"} == set(OPTIMIZERS)


# Structure. Traced only, never compiled. ----------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes",
    [(jnp.bfloat16,) * 3, (jnp.float32, jnp.bfloat16, jnp.float16)],
    ids=["bfloat16", "mixed"],
)
def test_updates_have_the_dtypes_of_the_parameters_and_state_is_float32_and_a_fixpoint(
    name, dtypes
):
    tx, params, gradients = optimizer(name), normal(0, dtypes), normal(1, dtypes)
    state = tx.init(params)
    assert all(
        leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32) for leaf in jax.tree.leaves(state)
    )

    def one(carry, _):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        assert types(updates) == types(params)
        return (optax.apply_updates(params, updates), state), None

    # A scan refuses a carry whose shapes, dtypes or weak types change.
    later = jax.eval_shape(lambda carry: jax.lax.scan(one, carry, length=2)[0], (params, state))
    assert types(later) == types((params, state))


def test_with_x64_every_leaf_keeps_its_own_width(name):
    with jax.enable_x64(True):
        dtypes = (jnp.float64, jnp.float32, jnp.bfloat16)
        tx, params, gradients = optimizer(name), normal(0, dtypes), normal(1, dtypes)
        state = tx.init(params)
        updates, later = jax.eval_shape(tx.update, gradients, state, params)
        assert types(updates) == types(params)
        assert types(later) == types(state)


def test_extra_arguments_that_nobody_expects_are_tolerated(name):
    tx, params = optimizer(name), normal(0)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    jax.eval_shape(
        lambda state: tx.update(params, state, params, unexpected=1, value=2.0), tx.init(params)
    )


def test_init_takes_shapes_and_finds_no_values_in_them(name):
    tx, params = optimizer(name), normal(0)
    shapes = jax.eval_shape(lambda: params)
    assert types(tx.init(shapes)) == types(tx.init(params))
    assert types(jax.eval_shape(tx.init, params)) == types(tx.init(params))


def full_of_holes(tree):
    return {
        **tree,
        "block": None,
        "embed": optax.MaskedNode(),
        "nothing": [{}, ()],
        "no entries": {"kernel": jnp.zeros((0, 4))},
    }


@pytest.mark.parametrize("change", [full_of_holes, lambda tree: {}], ids=["holes", "empty"])
def test_trees_with_holes_and_without_leaves_pass(name, change):
    tx, params, gradients = optimizer(name), change(normal(0)), change(normal(1))
    state = tx.init(params)
    updates, later = jax.eval_shape(tx.update, gradients, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert types(later) == types(state)


def test_the_parameters_are_found_in_the_state(name):
    tx, params = optimizer(name), normal(0)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)


def test_only_weight_decay_needs_the_parameters(name):
    tx, gradients = optimizer(name), normal(1)
    state = tx.init(normal(0))
    if "weight_decay" in OPTIMIZERS[name][2]:
        with pytest.raises(ValueError, match="params"):
            jax.eval_shape(lambda: tx.update(gradients, state))
    else:
        updates, _ = jax.eval_shape(lambda: tx.update(gradients, state))
        assert types(updates) == types(gradients)


# Values. One compilation for each optimizer. ------------------------------------------------------


@functools.cache
def histories(name):
    """Three steps of the optimizer and of what should be the same one, and the traces it took."""
    factory, needs, traced = OPTIMIZERS[name]
    variants = {
        "plain": optimizer(name),
        "schedule": optimizer(name, lambda count: RATE + 0.0 * count.astype(jnp.float32)),
        "injected": optax.inject_hyperparams(factory)(learning_rate=RATE, **needs, **traced),
    }
    traces = []

    @jax.jit
    def step(carries, gradients):
        traces.append(name)
        for variant, (params, state) in carries.items():
            updates, state = variants[variant].update(gradients, state, params)
            carries[variant] = optax.apply_updates(params, updates), state
        return carries

    params = normal(0)
    carries = {variant: (params, tx.init(params)) for variant, tx in variants.items()}
    history = []
    for seed in (1, 2, 3):
        carries = step(dict(carries), normal(seed))
        history.append(carries)
    return history, len(traces)


def paths(name, variant):
    return [carries[variant][0] for carries in histories(name)[0]]


def test_the_second_step_does_not_compile_again(name):
    assert histories(name)[1] == 1


def test_a_constant_schedule_is_a_constant(name):
    assert_same(paths(name, "schedule"), paths(name, "plain"), 1e-6)
    assert np.any(paths(name, "plain")[2]["bias"] != normal(0)["bias"])


def test_hyperparameters_can_be_traced(name):
    _, _, traced = OPTIMIZERS[name]
    assert_same(paths(name, "injected"), paths(name, "plain"), 1e-6)
    state = histories(name)[0][0]["injected"][1]
    assert {"learning_rate", *traced} <= set(state.hyperparams)
    assert all(isinstance(value, jax.Array) for value in state.hyperparams.values())


# Composition. -------------------------------------------------------------------------------------


def run(tx, params, every_gradient):
    """The path of the parameters and the last state, for leaves stacked over steps."""

    def one(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jax.jit(lambda carry, gradients: jax.lax.scan(one, carry, gradients))
    (_, state), path = scan((params, tx.init(params)), every_gradient)
    return path, state


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


PARAMS, GRADIENTS = normal(0), stack(normal(1), normal(2), normal(3))


@functools.cache
def plain_path():
    return run(optimizer("ef21_sgdm"), PARAMS, GRADIENTS)[0]


def test_masked_treats_the_chosen_leaves_as_if_they_were_all():
    mask = {"bias": False, "block": True, "embed": True}
    path, _ = run(optax.masked(optimizer("ef21_sgdm"), mask), PARAMS, GRADIENTS)
    assert_same(path["block"], plain_path()["block"], 1e-6)
    assert_same(path["embed"], plain_path()["embed"], 1e-6)
    passed_by = PARAMS["bias"][None] + jnp.cumsum(GRADIENTS["bias"], axis=0)
    assert_same(path["bias"], passed_by, 1e-6)


def test_partition_gives_each_part_its_own_optimizer():
    labels = {"bias": "sgd", "block": "ours", "embed": "ours"}
    tx = optax.partition({"ours": optimizer("ef21_sgdm"), "sgd": optax.sgd(RATE)}, labels)
    path, state = run(tx, PARAMS, GRADIENTS)
    assert_same(path["block"], plain_path()["block"], 1e-6)
    assert_same(path["embed"], plain_path()["embed"], 1e-6)
    expected = PARAMS["bias"][None] - RATE * jnp.cumsum(GRADIENTS["bias"], axis=0)
    assert_same(path["bias"], expected, 1e-6)
    assert ef21.find_state(state).count == 3


def test_a_chain_clips_each_workers_gradient_before_it_is_compressed():
    clip = optax.clip_by_global_norm(1.0)
    ours = ef21.ef21_sgdm(RATE, uplink=TOP, axis_name="workers")
    tx = optax.chain(clip, ours)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, None

    batch = stack(normal(1), normal(2))
    state = ef21.replicate(tx.init(PARAMS), 2)
    _, state, _ = jax.jit(ef21.spmd(step))(PARAMS, state, batch)
    momentum = ef21.find_state(state).worker[0].momentum
    momentum = jax.vmap(lambda m: ours.unstack(m, PARAMS))(momentum)
    for j in range(2):
        norm = np.sqrt(sum(np.sum(np.square(g[j])) for g in jax.tree.leaves(batch)))
        assert norm > 1
        assert_same(
            jax.tree.map(lambda m, j=j: m[j], momentum),
            jax.tree.map(lambda g, j=j, norm=norm: np.asarray(g[j]) / norm, batch),
            1e-6,
        )
    assert ef21.check_invariant(state) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_parameters_follow_a_float32_master_copy(optimized, dtype):
    # Every step is less than half a unit in the last place of the parameters: alone it is lost.
    tx = ef21.ef21_sgd(1e-5, uplink=ef21.Identity(), downlink=ef21.Natural(nearest=True))
    start = jnp.linspace(0.5, 1.9, 8).astype(dtype)

    def follow(params):
        gradients = jnp.ones((4000, 8), params.dtype)
        path, state = run(tx, params, gradients)
        return path[-1], ef21.server_params(tx, path[-1], state)

    narrow, master = follow(start)
    _, expected = follow(start.astype(jnp.float32))
    assert narrow.dtype == dtype and master.dtype == jnp.float32
    np.testing.assert_allclose(expected, start.astype(jnp.float32) - 0.04, atol=1e-4)
    np.testing.assert_allclose(master, expected, atol=1e-4)
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, rtol=jnp.finfo(dtype).eps)


# Flax. --------------------------------------------------------------------------------------------


def new_train_state(tx):
    train_state = flax.training.train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    # A Python integer for a step count would be another type after the first step.
    return ef21.replicate(train_state.replace(step=jnp.zeros([], jnp.int32)), 2)


def test_a_train_state_saved_as_bytes_goes_on_bit_for_bit():
    tx = optimizer("ef21_sgdm", axis_name="workers", uplink=ef21.RandK(0.3) >> ef21.Natural())

    def step(train_state, gradients):
        return train_state.apply_gradients(grads=gradients), None

    step = jax.jit(ef21.spmd(step))
    batches = [stack(normal(2 * k), normal(2 * k + 1)) for k in range(4)]
    through, saved = new_train_state(tx), None
    for k, batch in enumerate(batches):
        if k == 2:
            saved = flax.serialization.to_bytes(through)
        through, _ = step(through, batch)

    restored = flax.serialization.from_bytes(new_train_state(tx), saved)
    assert ef21.find_state(restored).count == 2
    for batch in batches[2:]:
        restored, _ = step(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, restored, through)
    assert through.step == 4
    assert ef21.check_invariant(through) < 1e-6
    residual = ef21.find_state(through).downlink.residual
    X = ef21.server_params(tx, through.params, through)
    residual = tx.unstack(residual, PARAMS)
    assert_same(X, jax.tree.map(jnp.add, through.params, residual))


def test_a_plain_dictionary_can_carry_the_state():
    tx = optimizer("ef21_sgd", axis_name="workers")

    def step(carry, gradients):
        updates, state = tx.update(gradients, carry["state"], carry["params"])
        return {"params": optax.apply_updates(carry["params"], updates), "state": state}, None

    carry = ef21.replicate({"params": PARAMS, "state": tx.init(PARAMS)}, 2)
    batch = stack(normal(1), normal(2))
    later, _ = jax.eval_shape(ef21.spmd(step), carry, batch)
    assert types(later) == types(carry)


# Errors name what is wrong, where, and what to do. ------------------------------------------------

MATRIX = {"block": {"proj": jnp.zeros((3, 3))}}


def update(tx, params):
    return jax.eval_shape(lambda: tx.update(params, tx.init(params), params))


@pytest.mark.parametrize("name", ["ef21_muon", "gluon", "scion", "muon"])
def test_an_unclaimed_matrix_is_named_as_soon_as_the_parameters_are_seen(name):
    with pytest.raises(ValueError, match=r"No rule claims block/proj \(3, 3\)\. Put one in front"):
        optimizer(name).init(MATRIX)


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan"), 90])
@pytest.mark.parametrize("name", ["ef21_muon", "gluon", "scion", "muon", "ef21_sgdm"])
def test_a_momentum_out_of_range_is_refused(name, momentum):
    with pytest.raises(ValueError, match=rf"momentum.*\[0, 1\).*{momentum}"):
        optimizer(name, momentum=momentum)


@pytest.mark.parametrize("when", ["uplink", "downlink"])
def test_a_setting_of_the_wrong_kind_is_named_as_soon_as_the_parameters_are_seen(when):
    good = dict(uplink=TOP, downlink=TOP)
    with pytest.raises(ValueError, match="block/proj: expected a Compressor, got 0.15. Pass one"):
        ef21.ef21_sgd(RATE, **{**good, when: 0.15}).init(MATRIX)
    with pytest.raises(ValueError, match="block/proj: expected a Compressor, got <class"):
        ef21.ef21_sgd(RATE, **{**good, when: ef21.TopK}).init(MATRIX)
    with pytest.raises(ValueError, match="blocks"):
        ef21.ef21_sgd(RATE, **{**good, when: {"blocks": TOP}}).init(MATRIX)


def test_an_unbound_axis_is_named_with_the_remedies():
    tx = ef21.ef21_sgd(RATE, uplink=TOP, axis_name="workers")
    with pytest.raises(ValueError, match=r"'workers' is not bound.*spmd\(step.*axis_name=None"):
        update(tx, MATRIX)


@pytest.mark.parametrize("num_workers", [0, -1])
def test_fewer_than_one_worker_is_refused(num_workers):
    state = optimizer("ef21_sgd").init(PARAMS)
    with pytest.raises(ValueError, match=f"at least 1, got {num_workers}"):
        ef21.replicate(state, num_workers)


def test_only_what_distribute_makes_can_be_asked_and_says_so():
    chain = optax.chain(optax.clip(1.0), optimizer("ef21_sgd"))
    for call in (
        lambda: ef21.ledger.bytes_per_step(chain, PARAMS),
        lambda: ef21.server_params(chain, PARAMS, chain.init(PARAMS)),
        lambda: ef21.warm_start(chain, chain.init(PARAMS), PARAMS),
    ):
        with pytest.raises(ValueError, match="got GradientTransformationExtraArgs. Of a chain"):
            call()


@pytest.mark.parametrize("states", [0, 2])
def test_one_distributed_state_is_looked_for(states):
    tx = optimizer("ef21_sgd")
    with pytest.raises(ValueError, match=f"found {states}: pass the optimizer's state"):
        ef21.server_params(tx, PARAMS, [tx.init(PARAMS)] * states)
