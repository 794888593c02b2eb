"""Arrays that lie along Explicit axes of a mesh.

There JAX asks of every operation where its result lies, and for what we do, to stack, flatten, cut
and multiply, it cannot tell. So our arithmetic is left to the compiler, as along Auto axes, and
only its results are put in their places.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P


def left_to_the_compiler(
    function: Callable, placed: Callable[..., Any] = lambda *args: P()
) -> Callable:
    """`function` of trees, in which Explicit axes of the mesh are Auto.

    That is for arrays that are spread over devices, or for the devices of one worker; what is whole
    everywhere JAX can place by itself.

    Args:
      placed: from the arguments to the places of the results, a prefix tree of `PartitionSpec`s.
        Without, they are whole on every device.
    """

    def wrapped(*args):
        mesh, enter = _mesh(args)
        if not (mesh.explicit_axes and (mesh.manual_axes or _spread(args))):
            return function(*args)
        leaves, treedef = jax.tree.flatten(args)
        arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

        def of_arrays(arrays):
            merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            return function(*treedef.unflatten(merged))

        automatic = jax.sharding.auto_axes(
            of_arrays, axes=mesh.explicit_axes, out_sharding=placed(*args)
        )
        with enter():
            return automatic(arrays)

    return wrapped


def places(tree: Any) -> Any:
    """Where arrays lie: a tree of `PartitionSpec`s."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def here(x: Any) -> Any:
    """`x`, a number from outside of a function that is left to the compiler, for use in it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.explicit_axes or not isinstance(x, jax.Array):
        return x
    return jax.sharding.reshard(x, P()) if jax.typeof(x).sharding.mesh.explicit_axes else x


def _mesh(args):
    """The mesh in force, or else that of the first array whose type names one; and how to enter."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh, contextlib.nullcontext
    for x in jax.tree.leaves(args):
        if isinstance(x, jax.Array) and jax.typeof(x).sharding.mesh.explicit_axes:
            mesh = jax.typeof(x).sharding.mesh
            if isinstance(x, jax.core.Tracer):
                return mesh, functools.partial(jax.sharding.use_abstract_mesh, mesh)
            # Called, it sets the mesh at once.
            return mesh, functools.partial(jax.set_mesh, x.sharding.mesh)  # type: ignore
    return mesh, contextlib.nullcontext


def _spread(args):
    specs = (jax.typeof(x).sharding.spec for x in jax.tree.leaves(args) if isinstance(x, jax.Array))
    return any(axis is not None for spec in specs for axis in spec)
