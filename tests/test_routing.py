"""Every layer's role, norm, radius and bytes, or an error that names the layer."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ef21_jax as ef21


TOP, NATURAL = ef21.TopK(0.1), ef21.Natural()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8, name="wte")(tokens) + nn.Embed(4, 8)(jnp.arange(4))
        x = nn.LayerNorm()(x)
        x = nn.Dense(12)(x)
        x = nn.Dense(8, use_bias=False)(x)
        return nn.Dense(16, name="lm_head")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 12, rngs=rngs)])
        self.head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)


def shapes_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def linen(module, *shape, dtype=jnp.float32):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape, dtype))


def roles(params, rules=ef21.SCION_RULES):
    return {route.path: route.role for route in ef21.routes(params, rules)}


def test_the_rules_know_the_names_of_flax_linen():
    assert roles(linen(Linen(), 4, dtype=jnp.int32)) == {
        "params/Dense_0/bias": "vector",
        "params/Dense_0/kernel": "hidden",
        "params/Dense_1/kernel": "hidden",
        "params/Embed_0/embedding": "embedding",
        "params/LayerNorm_0/bias": "vector",
        "params/LayerNorm_0/scale": "vector",
        "params/lm_head/bias": "vector",
        "params/lm_head/kernel": "head",
        "params/wte/embedding": "embedding",
    }


def test_the_rules_know_the_names_of_flax_nnx():
    state = nnx.state(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))), nnx.Param)
    assert roles(state) == {
        "blocks/0/bias/value": "vector",
        "blocks/0/kernel/value": "hidden",
        "embed/embedding/value": "embedding",
        "head/kernel/value": "head",
        "norm/scale/value": "vector",
    }


def test_the_rules_know_plain_names():
    params = {
        "gain": shapes_of(),
        "layers": [{"w1": shapes_of(3, 4), "b1": shapes_of(4), "weight": shapes_of(4, 3)}],
        "tok_embeddings": shapes_of(9, 3),
        "unembed": {"w": shapes_of(3, 9)},
        "Wpe": shapes_of(5, 3),
    }
    assert roles(params) == {
        "Wpe": "embedding",
        "gain": "vector",
        "layers/0/b1": "vector",
        "layers/0/w1": "hidden",
        "layers/0/weight": "hidden",
        "tok_embeddings": "embedding",
        "unembed/w": "head",
    }


def test_muon_leaves_vectors_embeddings_and_heads_to_adam():
    found = roles(linen(Linen(), 4, dtype=jnp.int32), ef21.MUON_RULES)
    assert {path for path, role in found.items() if role == "hidden"} == {
        "params/Dense_0/kernel",
        "params/Dense_1/kernel",
    }
    assert set(found.values()) == {"hidden", "adam"}


@pytest.mark.parametrize("rules", [ef21.SCION_RULES, ef21.MUON_RULES], ids=["scion", "muon"])
@pytest.mark.parametrize(
    "params",
    [
        linen(nn.Conv(4, (3, 3)), 2, 8, 8, 6),
        linen(nn.MultiHeadDotProductAttention(2), 2, 4, 6),
        {"stack": {"kernel": shapes_of(12, 8, 8)}},
        {"proj": shapes_of(3, 3)},
    ],
    ids=["convolution", "attention", "stack", "unknown name"],
)
def test_what_no_rule_claims_is_named_and_not_guessed(params, rules):
    vectors = (0, 1)
    with pytest.raises(ValueError, match="No rule claims") as error:
        ef21.routes(params, rules)
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (f"{name} {leaf.shape}" in str(error.value)) == (leaf.ndim not in vectors)
    assert rules[-1].role in str(error.value)


def test_the_rule_that_the_error_suggests_mends_it():
    params = {"stack": {"kernel": shapes_of(12, 8, 16)}, "other": {"kernel": shapes_of(8, 8)}}
    rule = ef21.Rule("hidden", ef21.Spectral(), path="stack/kernel", ndims=(3,))
    other, stack = ef21.routes(params, (rule, *ef21.SCION_RULES))
    assert stack.norm == ef21.Spectral()
    assert other.norm == ef21.Scaled(ef21.Spectral(), 50.0)


def test_a_role_gets_another_norm_and_nothing_else_changes():
    params = {"wte": shapes_of(9, 768), "up": {"kernel": shapes_of(768, 3072)}, "gain": shapes_of()}
    rules = ef21.with_norm(ef21.SCION_RULES, "hidden", ef21.Frobenius())
    for old, new in zip(ef21.routes(params), ef21.routes(params, rules), strict=True):
        expected = ef21.Scaled(ef21.Frobenius(), 100.0) if old.path == "up/kernel" else old.norm
        assert new == dataclasses.replace(old, norm=expected)


def test_a_norm_for_a_role_that_no_rule_has_is_refused():
    with pytest.raises(ValueError, match="No rule has .*'hiden'.*vector, head, embedding, hidden"):
        ef21.with_norm(ef21.SCION_RULES, "hiden", ef21.Spectral())


def test_the_first_rule_that_fits_wins():
    one, two = ef21.Rule("one", ef21.Sign(), "a"), ef21.Rule("two", ef21.Frobenius())
    params = {"a": shapes_of(2, 2), "c": shapes_of(2, 2)}
    assert roles(params, (one, two)) == {"a": "one", "c": "two"}
    assert roles(params, (two, one)) == {"a": "two", "c": "two"}


def test_a_rule_claims_by_the_number_of_axes_too():
    rule = ef21.Rule("any", ef21.Frobenius(), ndims=(1, 3))
    assert rule.claims("x", (2,)) and rule.claims("x", (2, 2, 2))
    assert not rule.claims("x", ()) and not rule.claims("x", (2, 2))


@pytest.mark.parametrize(
    "rules, path, shape, norm",
    [
        # Paper M, Table 4, and the shape factors of the Scion code.
        (ef21.SCION_RULES, "block/kernel", (768, 3072), ef21.Scaled(ef21.Spectral(), 100.0)),
        (ef21.SCION_RULES, "block/kernel", (3072, 768), ef21.Scaled(ef21.Spectral(), 25.0)),
        (ef21.SCION_RULES, "lm_head/kernel", (768, 50304), ef21.Scaled(ef21.Sign(), 3000 / 768)),
        (ef21.SCION_RULES, "wte/embedding", (50304, 768), ef21.Scaled(ef21.Sign(), 3000 / 768)),
        (ef21.SCION_RULES, "block/bias", (768,), ef21.Scaled(ef21.RMS(), 50.0)),
        (ef21.SCION_RULES, "gain", (), ef21.Scaled(ef21.RMS(), 50.0)),
        # Jordan (2024).
        (ef21.MUON_RULES, "block/kernel", (768, 3072), ef21.Scaled(ef21.Spectral(), 2.0)),
        (ef21.MUON_RULES, "block/kernel", (3072, 768), ef21.Spectral()),
    ],
)
def test_radii_are_those_of_the_papers(rules, path, shape, norm):
    (route,) = ef21.routes({path: shapes_of(*shape)}, rules)
    assert route.norm == norm


@pytest.mark.parametrize("base", [ef21.Sign(), ef21.RMS(), ef21.Spectral(exact=True)], ids=repr)
def test_a_step_at_learning_rate_one_is_as_long_as_the_scale_says(base):
    rule = ef21.Rule("rule", base, scale=3.0, policy=ef21.scion_scale)
    norm = rule.norm_for((4, 16))
    step = norm.lmo(jax.random.normal(jax.random.key(0), (4, 16)))
    np.testing.assert_allclose(base.norm(step), 6.0, rtol=1e-5)
    np.testing.assert_allclose(norm.norm(step), 1.0, rtol=1e-5)


POLICIES = {  # (fan_in, fan_out): Scion, Muon, Moonlight, 1 / fan_in, 1 / fan_out
    (768, 768): (1, 1, 5.542562584220407, 1 / 768, 1 / 768),
    (768, 3072): (2, 2, 11.085125168440815, 1 / 768, 1 / 3072),
    (3072, 768): (0.5, 1, 11.085125168440815, 1 / 3072, 1 / 768),
    (100, 1): (0.1, 1, 2, 1 / 100, 1),
    (1, 100): (10, 10, 2, 1, 1 / 100),
}


@pytest.mark.parametrize("fans, factors", POLICIES.items())
def test_scale_policies_know_in_from_out(fans, factors):
    policies = (ef21.scion_scale, ef21.muon_scale, ef21.moonlight_scale)
    policies += (ef21.one_over_fan_in, ef21.one_over_fan_out)
    assert ef21.constant(*fans) == 1
    assert [policy(*fans) for policy in policies] == pytest.approx(factors, rel=1e-12)
    # The same of a leaf: (fan_in, fan_out), stacked or not.
    for policy, factor in zip(policies, factors, strict=True):
        rule = ef21.Rule("any", ef21.Sign(), policy=policy, scale=3.0)
        for shape in (fans, (7, *fans)):
            norm = rule.norm_for(shape)
            assert getattr(norm, "scale", 1.0) == pytest.approx(3 * factor)


def axes(reduction, output):
    return optax.contrib.MuonDimensionNumbers(reduction, output)


# Leaves that hold their matrices in other shapes: what a rule says of them, and the matrices, each
# as an array of the indices of its entries, (fan_in, fan_out), found by slicing alone.
ROLES = {
    "kernel": ((6, 4), {}, lambda i: [i]),
    "experts": ((3, 6, 4), {}, lambda i: [*i]),
    "scanned experts": ((2, 3, 6, 4), {}, lambda i: [e for layer in i for e in layer]),
    "convolution": (
        (3, 2, 2, 5),
        dict(dims=axes((0, 1, 2), 3)),
        lambda i: [np.concatenate([i[h, w] for h in range(3) for w in range(2)])],
    ),
    "convolution, each tap": (
        (3, 2, 4, 5),
        dict(dims=axes(2, 3)),
        lambda i: [i[h, w] for h in range(3) for w in range(2)],
    ),
    "heads as one": (
        (6, 3, 4),
        dict(dims=axes(0, (1, 2))),
        lambda i: [np.concatenate([i[:, head] for head in range(3)], axis=1)],
    ),
    "heads": ((6, 3, 4), dict(dims=axes(0, 2)), lambda i: [i[:, head] for head in range(3)]),
    "projection of heads": (
        (3, 4, 6),
        dict(dims=axes((0, 1), 2)),
        lambda i: [np.concatenate([i[head] for head in range(3)])],
    ),
    "fused": ((6, 12), dict(splits=3), lambda i: [i[:, :4], i[:, 4:8], i[:, 8:]]),
    "scanned fused": (
        (2, 6, 12),
        dict(splits=3),
        lambda i: [layer[:, start : start + 4] for layer in i for start in (0, 4, 8)],
    ),
    "fused heads": (
        (6, 3, 2, 4),
        dict(dims=axes(0, (2, 3))),
        lambda i: [np.concatenate([i[:, part, 0], i[:, part, 1]], axis=1) for part in range(3)],
    ),
    "scanned fused heads": (
        (2, 6, 3, 2, 4),
        dict(dims=axes([-4], [-2, -1])),
        lambda i: [
            np.concatenate([layer[:, part, 0], layer[:, part, 1]], axis=1)
            for layer in i
            for part in range(3)
        ],
    ),
    "transposed": ((4, 6), dict(dims=axes(1, 0)), lambda i: [i.T]),
    "stacked vectors": ((3, 5), dict(dims=axes((), 1)), lambda i: [row[None] for row in i]),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def applied(columns, spectral, x):
    """All that a norm can do, of one that tells in from out, and a step of one that mixes all."""
    steps = columns.lmo(x), columns.sharp(x), spectral.lmo(x)
    return (columns.norm(x), columns.dual(x)), steps


@pytest.mark.parametrize("role", ROLES)
def test_every_matrix_of_a_leaf_is_treated_once_and_by_itself(role):
    shape, settings, matrices_of = ROLES[role]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    indices = matrices_of(np.arange(x.size).reshape(shape))
    covered = np.sort(np.concatenate([i.ravel() for i in indices]))
    np.testing.assert_array_equal(covered, np.arange(x.size))

    bases = (ef21.ColumnNorm(), ef21.Spectral())
    policy = ef21.scion_scale
    rules = [ef21.Rule(role, base, scale=3.0, policy=policy, **settings) for base in bases]
    sizes, steps = applied(*(rule.norm_for(shape) for rule in rules), x)
    fans = indices[0].shape
    scaled = [ef21.Scaled(base, 3.0 * policy(*fans)) for base in bases]
    for matrix, index in enumerate(indices):
        sizes_alone, steps_alone = applied(*scaled, x.ravel()[index])
        for got, expected in zip(sizes, sizes_alone, strict=True):
            assert got.size == len(indices)
            np.testing.assert_allclose(got.ravel()[matrix], expected, rtol=1e-5)
        for got, expected in zip(steps, steps_alone, strict=True):
            assert got.shape == shape
            close = 1e-5 * np.max(np.abs(expected))
            np.testing.assert_allclose(np.asarray(got).ravel()[index], expected, atol=close)
    constants = [norm.equivalence(fans) for norm in scaled]
    assert [rule.norm_for(shape).equivalence(shape) for rule in rules] == constants


def test_an_optimizer_step_treats_the_matrices_of_every_role_once():
    rng = np.random.default_rng(0)
    grads = {role: rng.normal(size=shape).astype(np.float32) for role, (shape, *_) in ROLES.items()}
    rules = tuple(
        ef21.Rule(
            role, ef21.Frobenius(), f"^{role}$", (len(shape),), policy=ef21.scion_scale, **settings
        )
        for role, (shape, settings, _) in ROLES.items()
    )
    tx = ef21.gluon(0.5, momentum=0.0, rules=rules)
    steps, _ = jax.jit(lambda g: tx.update(g, tx.init(g), g))(grads)
    for role, (shape, _, matrices_of) in ROLES.items():
        for index in matrices_of(np.arange(grads[role].size).reshape(shape)):
            g = grads[role].ravel()[index]
            expected = -0.5 * ef21.scion_scale(*index.shape) * g / np.linalg.norm(g)
            np.testing.assert_allclose(steps[role].ravel()[index], expected, rtol=1e-5)


def test_the_table_shows_the_matrices_of_a_leaf():
    rules = tuple(
        ef21.Rule(role, ef21.Spectral(), f"^{role}$", (len(shape),), scale=2.0, **settings)
        for role, (shape, settings, _) in ROLES.items()
    )
    params = {role: shapes_of(*shape) for role, (shape, *_) in ROLES.items()}
    table = str(ef21.routes(params, rules))
    shown = {line.split("  ")[0]: line for line in table.splitlines()}
    for role, norm in {
        "kernel": "2 × Spectral()  ",
        "convolution": "2 × Spectral() on (12×5)  ",
        "heads": "2 × Spectral() on 3×(6×4)  ",
        "scanned fused heads": "2 × Spectral() on 2×3×(6×8)  ",
    }.items():
        assert norm in shown[role]


@pytest.mark.parametrize(
    "settings, shape, message",
    [
        (dict(dims=axes(0, 3)), (2, 3, 4), r"among the 3 of \(2, 3, 4\)"),
        (dict(dims=axes(-4, 1)), (2, 3, 4), "among the 3 of"),
        (dict(dims=axes(0, (0, 1))), (2, 3, 4), "named once at most"),
        (dict(dims=axes((1, -2), 2)), (2, 3, 4), "named once at most"),
        (dict(splits=3), (6, 4), r"3 splits do not divide the 4 outputs of \(6, 4\)"),
        (dict(splits=3), (6,), r"\(Sign\(\), -2, -1, splits=3\): the axes must be among"),
    ],
)
def test_axes_that_do_not_fit_the_leaf_are_named(settings, shape, message):
    rule = ef21.Rule("bad", ef21.Sign(), ndims=(1, 2, 3), **settings)
    with pytest.raises(ValueError, match=f"Rule 'bad': Shaped.*{message}"):
        rule.norm_for(shape)


def test_leaves_without_entries_keep_their_shape():
    for norm in (ef21.Shaped(ef21.Sign(), 0, (1, 2)), ef21.Shaped(ef21.Sign(), -2, -1, splits=2)):
        assert norm.lmo(jnp.zeros((3, 0, 4))).shape == (3, 0, 4)


def test_lists_of_axes_are_values_too():
    listed = ef21.Shaped(ef21.Sign(), [0, 1], [2])
    assert listed == ef21.Shaped(ef21.Sign(), (0, 1), (2,)) and len({listed, listed}) == 1
    assert eval(repr(listed), vars(ef21)) == listed


def test_routes_print_as_a_table():
    params = {"block": {"bias": shapes_of(4), "kernel": shapes_of(8, 32)}}
    table = str(
        ef21.routes(params, uplink=ef21.RankK(0.125) >> ef21.Natural(), downlink=ef21.RandK(0.1))
    )
    assert table.splitlines() == [
        "path          shape  role    norm              uplink                     downlink  "
        "  bytes up  bytes down",
        "────────────  ─────  ──────  ────────────────  ─────────────────────────  ──────────"
        "  ────────  ──────────",
        "block/bias    4      vector  50 × RMS()        Identity()                 Identity()"
        "        16          16",
        "block/kernel  8×32   hidden  100 × Spectral()  RankK(0.125) >> Natural()  RandK(0.1)"
        "        44         108",
        "total                                                                               "
        "        60         124",
    ]


COMPRESSORS = (
    ef21.Identity(),
    TOP,
    ef21.TopK(0.01),
    ef21.RandK(0.1),
    ef21.RankK(0.2, exact=True),
    ef21.Natural(),
    TOP >> ef21.Natural(),
    ef21.RankK(0.2, exact=True) >> ef21.Natural(),
)


def test_routes_and_ledger_count_the_bytes_of_the_very_arrays_that_are_sent():
    params = {repr(c): jnp.ones((12, 20)) for c in COMPRESSORS}
    up = {repr(c): c for c in COMPRESSORS}
    down = dict(zip(sorted(up), reversed(COMPRESSORS), strict=True))
    rules = (ef21.Rule("all", ef21.Frobenius()),)
    routes = ef21.routes(params, rules, uplink=up, downlink=down)
    tx = ef21.ef21_muon(0.1, rules=rules, uplink=up, downlink=down)
    ledger = ef21.ledger.bytes_per_step(tx, params)

    @jax.jit
    def send(key):
        worker, server = ef21.ef21(up).worker, ef21.ef21_p(down)
        sent, _ = worker.update(params, worker.init(params), params, key=key)
        broadcast, _ = server.update(params, server.init(params), params, key=key)
        return sent, broadcast

    sent, broadcast = send(jax.random.key(0))
    for route, row in zip(routes, ledger.rows, strict=True):
        assert route.path == row.path and route.shape == row.shape
        assert row.dense == params[route.path].nbytes
        arrays = jax.tree.leaves(sent[route.path]), jax.tree.leaves(broadcast[route.path])
        bytes_up, bytes_down = (sum(leaf.nbytes for leaf in leaves) for leaves in arrays)
        assert route.bytes_up == row.up == bytes_up
        assert route.bytes_down == row.down == bytes_down
    assert ledger.up == sum(route.bytes_up for route in routes)
    assert ledger.down == sum(route.bytes_down for route in routes)
    assert ledger.dense == len(COMPRESSORS) * 12 * 20 * 4


def test_the_ledger_reads_shapes_alone_and_counts_narrow_parameters_as_they_travel():
    tx = ef21.ef21_muon(0.1, uplink=ef21.RankK(0.2) >> ef21.Natural(), downlink=TOP)
    wide = {"block": {"kernel": jnp.ones((12, 20)), "bias": jnp.ones((20,))}}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    expected = ef21.ledger.bytes_per_step(tx, wide)
    for params in (narrow, jax.eval_shape(lambda: wide), jax.eval_shape(lambda: narrow)):
        assert ef21.ledger.bytes_per_step(tx, params) == expected
    # Two factors of rank 2, a byte an entry, and the exponent of the largest of each.
    bias, kernel = expected.rows
    assert (kernel.dense, kernel.up) == (960, (12 * 2 + 2) + (20 * 2 + 2))
    assert (bias.dense, bias.up, bias.down) == (80, 80, 80)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(norm=ef21.Spectral), "Rule 'bad': expected a norm"),
        (dict(scale=0.0), "Rule 'bad': `scale` must be positive, got 0.0"),
        (dict(scale=float("inf")), "`scale` must be positive, got inf"),
        (dict(splits=0), "Rule 'bad': `splits` must be at least 1, got 0"),
        (dict(path="("), r"`path` '\(' is no regular expression"),
    ],
)
def test_a_bad_rule_is_refused_by_name_and_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ef21.Rule("bad", **{"norm": ef21.Sign(), **kwargs})


def test_a_rule_whose_dims_do_not_fit_names_the_leaf():
    rules = (ef21.Rule("fused", ef21.Spectral(), splits=3),)
    params = {"attention": {"qkv": jnp.zeros((6, 4))}}
    for call in (
        lambda: ef21.routes(params, rules),
        lambda: ef21.ef21_muon(0.1, rules=rules).init(params),
    ):
        with pytest.raises(ValueError, match=r"^attention/qkv: Rule 'fused': .*3 splits"):
            call()


# --- A compressor for each role ---

GPT = {"wte": shapes_of(50, 8), "up": {"kernel": shapes_of(8, 32)}, "gain": shapes_of(8)}
BY_ROLE = ef21.ByRole(hidden=ef21.RankK(0.25), embedding=ef21.BlockTopK())


def test_every_role_gets_its_compressor_and_vectors_go_as_they_are():
    routes = ef21.routes(GPT, uplink=BY_ROLE, downlink=ef21.ByRole(hidden=NATURAL, embedding=TOP))
    assert {route.role: (route.uplink, route.downlink) for route in routes} == {
        "hidden": (ef21.RankK(0.25), NATURAL),
        "embedding": (ef21.BlockTopK(), TOP),
        "vector": (ef21.Identity(), ef21.Identity()),
    }


def test_a_step_with_compressors_by_role_is_that_with_a_tree_of_them():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), GPT)
    tree = {"wte": ef21.BlockTopK(), "up": ef21.RankK(0.25), "gain": ef21.Identity()}
    steps = []
    for uplink in (BY_ROLE, tree):
        tx = ef21.ef21_muon(0.1, uplink=uplink)
        gradients = jax.tree.map(lambda p: jnp.sin(jnp.arange(p.size).reshape(p.shape)), params)
        steps.append(jax.jit(tx.update)(gradients, tx.init(params), params)[0])
    jax.tree.map(np.testing.assert_array_equal, *steps)


@pytest.mark.parametrize(
    ("uplink", "message"),
    [
        ({"hidden": 0.25}, "'hidden': expected a Compressor, got 0.25"),
        ({"hiden": TOP, "embedding": TOP}, "no rule .*'hiden'.*head, embedding, hidden"),
        ({"hidden": TOP, "vector": TOP}, "no rule that says `compress` has the role 'vector'"),
        ({"hidden": TOP}, r"wte: ByRole\(hidden=TopK.*role 'embedding'.*`embedding=...`"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ", ".join(value),
)
def test_roles_that_do_not_fit_are_refused_with_the_remedy(uplink, message):
    with pytest.raises(ValueError, match=message):
        ef21.routes(GPT, uplink=ef21.ByRole(**uplink))
