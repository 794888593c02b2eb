"""Workers along several axes: rows go where they should, in one collective over the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from ef21_jax._links import Links
from ef21_jax.ledger import collective_bytes


LENGTH = 6
# The mesh, the axes of the workers, lanes on each device, and whether types are checked.
SETTINGS = {
    "two axes": (dict(a=2, b=2), ("a", "b"), 1, False),
    "two axes, types checked": (dict(a=2, b=2), ("a", "b"), 1, True),
    "two axes, the inner one first": (dict(a=2, b=2), ("b", "a"), 1, False),
    "lanes on devices": (dict(a=4), ("a", "lanes"), 2, False),
    "lanes on two axes": (dict(a=2, b=2), ("a", "b", "lanes"), 2, False),
    "lanes on workers of two devices": (dict(a=2, rest=2), ("a", "lanes"), 2, False),
}


def program(mesh, axis_name, lanes, checked):
    links = Links(axis_name)

    def of_worker(row, rows):
        gathered, mean = links.gather(row), links.mean(row)
        return gathered, mean, links.exchange(rows), links.scatter(rows)

    def of_device(row, rows):
        if lanes > 1:
            shared, own = None, 0
            outs = (shared, shared, own, own)
            return jax.vmap(of_worker, axis_name="lanes", out_axes=outs)(row, rows)
        gathered, mean, *own = of_worker(row[0], rows[0])
        return gathered, mean, *(x[None] for x in own)

    on_mesh = tuple(name for name in axis_name if name in mesh.axis_names)
    ours, shared = P(on_mesh), P()
    specs = dict(in_specs=ours, out_specs=(shared, shared, ours, ours))
    names = frozenset(on_mesh)
    return jax.jit(
        jax.shard_map(of_device, mesh=mesh, axis_names=names, check_vma=checked, **specs)
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_rows_of_workers_along_several_axes_go_once_and_to_their_places(setting, optimized):
    axes, axis_name, lanes, checked = SETTINGS[setting]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    on_mesh = tuple(name for name in axis_name if name in axes)
    devices = int(np.prod([axes[name] for name in on_mesh]))
    n = devices * lanes
    rng = np.random.default_rng(0)
    row, rows = (jnp.asarray(rng.normal(size=s), "float32") for s in [(n, LENGTH), (n, n, LENGTH)])
    compiled = program(mesh, axis_name, lanes, checked).lower(row, rows).compile()
    gathered, mean, exchanged, scattered = compiled(row, rows)
    np.testing.assert_array_equal(gathered, row)
    np.testing.assert_array_equal(exchanged, np.swapaxes(rows, 0, 1))
    np.testing.assert_allclose(mean, np.mean(row, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scattered, np.mean(rows, 0), rtol=1e-5, atol=1e-6)

    found = collective_bytes(compiled, mesh, on_mesh)
    size = 4 * LENGTH
    assert sorted((row.kind, row.sent_per_worker) for row in found.rows) == [
        ("all-gather", (devices - 1) * lanes * size),
        # What lanes have is added up first: a device sends as if it were one worker.
        ("all-reduce", 2 * (devices - 1) * size // devices),
        ("all-to-all", (devices - 1) * lanes * lanes * size),
        ("reduce-scatter", (devices - 1) * lanes * size),
    ]
