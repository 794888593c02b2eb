import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ef21_jax._grouping import map_grouped


def items():
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return [
        ("a", array(2, 3)),
        ("b", array(2, 3)),
        ("a", array(3, 2)),
        ("a", array(2, 3)),
        ("a", array(2, 3, dtype=jnp.bfloat16)),
        ("a", {"x": array(2, 3), "y": (array(4),)}),
        ("b", array(2, 3)),
        ("a", {"x": array(2, 3), "y": (array(4),)}),
        ("a", {"x": array(2, 3), "z": (array(4),)}),
        ("a", {"x": array(2, 3), "y": (array(5),)}),
        ("a", array(2, 3)),
    ]


def test_grouping_equals_the_loop_in_order():
    calls = []

    def function(setting, item):
        calls.append(setting)
        sign = {"a": 1, "b": -1}[setting]
        return jax.tree.map(lambda leaf: (sign * leaf, jnp.sum(leaf)), item)

    settings, arrays = zip(*items(), strict=True)
    expected = [function(s, x) for s, x in zip(settings, arrays, strict=True)]
    calls.clear()
    results = map_grouped(function, settings, arrays)
    # Seven kinds: a matrix, its transpose, the matrix in bfloat16, three trees; and "b".
    assert len(calls) == 7 and calls.count("b") == 1
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_nothing_maps_to_nothing_and_one_item_to_one_call():
    assert map_grouped(lambda s, x: x, [], []) == []
    one = jnp.arange(3.0)
    assert map_grouped(lambda s, x: x, [None], [one])[0] is one


def test_a_setting_for_each_item():
    with pytest.raises(ValueError):
        map_grouped(lambda s, x: x, ["a"], [jnp.ones(2), jnp.ones(2)])


def test_rows_of_a_group_do_not_meet():
    # A sum over the item alone: a call that were not mapped would add up all the rows.
    rows = [jnp.full((2,), float(i)) for i in range(4)]
    sums = map_grouped(lambda s, x: jnp.sum(x), [0] * 4, rows)
    assert [float(s) for s in sums] == [0.0, 2.0, 4.0, 6.0]
