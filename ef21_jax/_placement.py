"""Arrays that lie along Explicit axes of a mesh.

There JAX asks of every operation where its result lies, and for what we do, to stack, flatten, cut
and multiply, it cannot tell. So our arithmetic is left to the compiler, and its results are put
where they belong.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P


def with_auto_axes(update: Callable) -> Callable:
    """An optimizer's `update`, in which Explicit axes of the mesh are Auto.

    Updates are placed as the parameters are, and state as it was. (The workers' axes are manual or
    mapped by now: these are axes within a worker.)
    """

    def wrapped(updates, state, params=None, **extra_args):
        axes = jax.sharding.get_abstract_mesh().explicit_axes
        if not axes:
            return update(updates, state, params, **extra_args)

        def positional(updates, state, params, extra_args):
            return update(updates, state, params, **extra_args)

        results = updates if params is None else params, state
        placed = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, results)
        compiled = jax.sharding.auto_axes(positional, axes=axes, out_sharding=placed)
        return compiled(updates, state, params, extra_args)

    return wrapped


def freed(tree: Any) -> Any:
    """Arrays outside of a step, of whose results JAX does not ask where they lie.

    They lie where they did; in a program that is being traced they are whole on every device.
    """

    def free(x):
        if not jax.typeof(x).sharding.mesh.explicit_axes:
            return x
        if isinstance(x, jax.core.Tracer):
            return jax.sharding.reshard(x, P())
        types = (AxisType.Auto,) * len(x.sharding.mesh.axis_names)
        mesh = Mesh(x.sharding.mesh.devices, x.sharding.mesh.axis_names, types)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(free, tree)


def placed_like(tree: Any, like: Any) -> Any:
    """What was made of `freed` arrays, where and of the types that those were."""

    def place(x, like):
        sharding = jax.typeof(like).sharding
        if not sharding.mesh.explicit_axes:
            return x
        if isinstance(like, jax.core.Tracer):
            return jax.sharding.reshard(x, sharding.spec)
        return jax.device_put(x, like.sharding)

    return jax.tree.map(place, tree, like)
