"""Layers stacked at the door: the same updates, from a program as large as there are shapes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ef21_jax as ef21
from ef21_jax._grouping import Grouping, each_layer, one_by_one


def tree(layers=2, leading=(), seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=(*leading, *shape)), dtype)

    blocks = [
        {"up": {"kernel": array(6, 9)}, "down": {"kernel": array(9, 6), "bias": array(6)}}
        for _ in range(layers)
    ]
    return {"blocks": blocks, "hole": None, "head": {"kernel": array(6, 9)}, "empty": array(0, 3)}


PARAMS = tree()
DTYPES = [jnp.float32, jnp.bfloat16]


def grouping(params, setting=lambda path: "a"):
    return Grouping.of(params, [setting(path) for path, _ in jax.tree.leaves_with_path(params)])


def test_equal_settings_shapes_and_dtypes_make_a_group_named_by_its_first_leaf():
    found = grouping(PARAMS)
    assert {name: group.numbers for name, group in found.groups.items()} == {
        "blocks.0.down.bias+1": (0, 3),
        "blocks.0.down.kernel+1": (1, 4),
        "blocks.0.up.kernel+2": (2, 5, 7),
        "empty": (6,),
    }
    apart = grouping(PARAMS, lambda path: "head" in str(path))
    assert apart.groups["blocks.0.up.kernel+1"].numbers == (2, 5)
    assert apart.groups["head.kernel"].numbers == (7,)
    narrow = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"].astype(jnp.bfloat16)}}
    assert grouping(narrow).groups["head.kernel"].numbers == (7,)


def test_to_stack_and_to_unstack_are_inverses():
    found = grouping(PARAMS)
    stacked = found.stack(PARAMS)
    assert {name: leaf.shape for name, leaf in stacked.items()} == {
        "blocks.0.down.bias+1": (2, 6),
        "blocks.0.down.kernel+1": (2, 9, 6),
        "blocks.0.up.kernel+2": (3, 6, 9),
        "empty": (1, 0, 3),
    }
    jax.tree.map(np.testing.assert_array_equal, found.unstack(stacked), PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    assert found.stack(shapes) == jax.eval_shape(lambda: stacked)
    assert found.stack({}) == {}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", [each_layer, one_by_one])
def test_each_layer_is_treated_by_itself(layers, form):
    x = jnp.arange(layers * 4.0).reshape(layers, 4)
    result = jax.jit(lambda x: form(jnp.cumsum, x))(x)
    np.testing.assert_array_equal(result, np.cumsum(x, axis=1))


SETTINGS = {
    "by the data": ef21.TopK(0.2) >> ef21.Natural(nearest=True),
    "at random": ef21.RankK(0.4) >> ef21.Natural(),
    "shared": ef21.RandK(0.3, shared=True),
    "by blocks": ef21.BlockTopK(1, 4) >> ef21.BlockNatural(),
    "one of each": [ef21.TopK(0.2), ef21.RandK(0.3), ef21.Natural(), ef21.Identity()] * 2,
}
NORMS = {2: ef21.Scaled(ef21.Spectral(), 2.0), 1: ef21.RMS()}


def setting(name):
    chosen = SETTINGS[name]
    if isinstance(chosen, list):
        return jax.tree.structure(PARAMS).unflatten(chosen)
    return chosen


def norms(params):
    return jax.tree.map(lambda leaf: NORMS[leaf.ndim], params)


def assemble(uplink, downlink, norms):
    feedback = ef21.ef21(uplink)
    return ef21.distribute(
        worker=optax.chain(ef21.worker_momentum(0.8), feedback.worker),
        server=optax.chain(feedback.server, ef21.lmo_step(norms, 0.1)),
        downlink=ef21.ef21_p(downlink),
        axis_name="workers",
    )


@functools.cache
def compiled(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, None

    return jax.jit(ef21.spmd(step))


# The last holds one of each kind; the others take as long, and are of its kinds.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in list(SETTINGS)[:-1]]


@pytest.mark.parametrize("name", [*OTHERS, "one of each"])
def test_a_grouped_run_equals_the_ungrouped_one_leaf_by_leaf(name):
    up, down = setting(name), ef21.RandK(0.9) >> ef21.Natural()
    alone = assemble(up, down, norms)
    together = ef21.grouped(
        lambda topology, **settings: assemble(**settings),
        uplink=(up, ef21.Compressor),
        downlink=(down, ef21.Compressor),
        norms=(norms, ef21.Norm),
    )
    carries = [(PARAMS, ef21.replicate(tx.init(PARAMS), 3)) for tx in (alone, together)]
    for seed in (1, 2):
        gradients = tree(leading=(3,), seed=seed)
        carries = [
            compiled(tx)(*carry, gradients)[:2]
            for tx, carry in zip((alone, together), carries, strict=True)
        ]
    (params, state), (same_params, stacked) = carries
    unstack = lambda part: together.unstack(part, PARAMS)  # noqa: E731
    pairs = [
        (same_params, params),
        (jax.vmap(unstack)(stacked.worker[1].estimate), state.worker[1].estimate),
        (unstack(stacked.server[0].estimate), state.server[0].estimate),
        (unstack(stacked.downlink.residual), state.downlink.residual),
    ]
    for a, b in pairs:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)
    assert alone.messages(PARAMS)[0].keys() == together.messages(PARAMS)[0].keys()
    ledgers = [ef21.ledger.bytes_per_step(tx, PARAMS) for tx in (alone, together)]
    assert ledgers[0] == ledgers[1]


def test_an_optimizer_without_settings_is_grouped_by_shape():
    def assemble(topology):
        feedback = ef21.ef21(ef21.Natural())
        return ef21.distribute(feedback.worker, feedback.server, topology=topology)

    tx = ef21.grouped(assemble)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
    assert len(state.server.estimate) < len(jax.tree.leaves(PARAMS))


def program(layers):
    tx = ef21.ef21_muon(0.1, uplink=ef21.TopK(0.2) >> ef21.Natural(), rules=RULES)
    params = tree(layers)
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    return lowered.as_text().splitlines()


RULES = (
    ef21.Rule("vector", ef21.RMS(), ndims=(1,), compress=False),
    ef21.Rule("matrix", ef21.Spectral()),
)


def test_the_program_grows_by_what_it_takes_to_stack_a_layer_and_to_unstack_it():
    few, many = program(2), program(12)
    assert [sum("dot_general" in line for line in lines) for lines in (few, many)][0] > 0
    for kind in ("dot_general", "while", "sort", "reduce(", "select"):
        assert sum(kind in line for line in few) == sum(kind in line for line in many), kind
    # Of each leaf: an argument, a broadcast to stack it, a slice and a reshape to unstack it.
    assert (len(many) - len(few)) / (10 * 3) <= 4


@pytest.mark.parametrize("count", [0, 7])
def test_all_layers_are_taken_from_their_stack_by_one_kernel(count, optimized):
    params = tree(layers=6)
    found = grouping(params)

    @jax.jit
    def apply(params, stacked, count):
        return jax.tree.map(jnp.add, params, found.unstack(stacked, count))

    arguments = params, found.stack(params), jnp.int32(count)
    text = apply.lower(*arguments).compile().as_text()
    kernels = re.findall(r"^%fused_computation(.*?)^}", text, flags=re.M | re.S)
    taking = [re.sub(r"\.\d+|metadata=.*", "", k) for k in kernels if "dynamic-slice(" in k]
    stacks = [group.layers for group in found.groups.values() if group.layers > 1]
    # Elsewhere a branch would cost more than it saves.
    for platform, branches in (("cpu", True), ("cuda", False), ("tpu", False)):
        lowered = apply.trace(*arguments).lower(lowering_platforms=(platform,))
        assert ("stablehlo.compare" in lowered.as_text()) == branches
    assert (len(taking), len(set(taking))) == (sum(stacks), len(stacks))
    jax.tree.map(
        np.testing.assert_array_equal, apply(*arguments), jax.tree.map(jnp.add, params, params)
    )
