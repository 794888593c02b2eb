"""Layers of equal settings, shape and dtype, stacked into one array.

A model has many layers and few shapes. Stacked at the door, gradients on entry and updates on
exit, with state that stays as it is stacked, a step is a program of so many operations as there are
shapes: traced and compiled once a shape, not once a layer.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._settings import path_name


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which leaves of a tree are stacked with which.

    Attributes:
      treedef: of the tree.
      members: of each group, by its name, the numbers of its leaves, ascending.
    """

    treedef: jax.tree_util.PyTreeDef
    members: dict[str, tuple[int, ...]]

    @staticmethod
    def of(tree: Any, settings: Sequence[Hashable]) -> "Grouping":
        """Groups of equal settings, shapes and dtypes. `settings`: one for each leaf, in order.

        A group has the name of its first leaf, and how many others there are:
        `blocks.0.q.kernel+11`.
        """
        groups: dict[Hashable, list[int]] = {}
        paths = jax.tree.leaves_with_path(tree)
        for i, ((_, leaf), setting) in enumerate(zip(paths, settings, strict=True)):
            groups.setdefault((setting, leaf.shape, leaf.dtype), []).append(i)
        members = {
            _name(paths[numbers[0]][0], len(numbers) - 1): tuple(numbers)
            for numbers in groups.values()
        }
        return Grouping(jax.tree.structure(tree), members)

    def stack(self, tree: Any) -> Any:
        """{group: shape (layers, ...)}. Takes arrays and `jax.ShapeDtypeStruct`s alike.

        What has no leaves is given back, since `optax.tree.map_params` looks for just that.
        """
        leaves = jax.tree.leaves(tree)
        if not leaves:
            return tree
        return {name: _stack([leaves[i] for i in m]) for name, m in self.members.items()}

    def unstack(self, stacked: Any) -> Any:
        """The inverse of `stack`."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for name, numbers in self.members.items():
            for layer, i in enumerate(numbers):
                leaves[i] = stacked[name][layer]
        return self.treedef.unflatten(leaves)

    def choose(self, values: Sequence[Any]) -> dict[str, Any]:
        """Of `values`, one for each leaf, that of each group's first."""
        return {name: values[numbers[0]] for name, numbers in self.members.items()}


def each_layer(function: Callable[..., Any], *stacked: Any) -> Any:
    """`function` of each layer of trees whose leaves have a leading axis of layers, stacked again.

    One batched call. Where the same is asked for twice, the compiler makes it once.
    """
    if _layers(stacked) > 1:
        return jax.vmap(function)(*stacked)
    results = function(*jax.tree.map(lambda leaf: leaf[0], stacked))
    return jax.tree.map(lambda leaf: leaf[None], results)


def one_by_one(function: Callable[[jax.Array], jax.Array], stacked: jax.Array) -> jax.Array:
    """`each_layer` of a costly function to arrays of the same shape and dtype.

    A loop on a CPU, where that is as fast and needs the memory of one layer only. It writes into a
    copy of its input: a fresh array, which depends on nothing, would be held from the beginning of
    the program.
    """
    if _layers(stacked) == 1:
        return each_layer(function, stacked)

    def loop(x):
        return lax.fori_loop(0, len(x), lambda i, x: x.at[i].set(function(x[i])), x)

    return lax.platform_dependent(stacked, cpu=loop, default=jax.vmap(function))


def _layers(stacked):
    return jax.tree.leaves(stacked)[0].shape[0]


def _name(path, others):
    name = path_name(path).replace("/", ".")
    return f"{name}+{others}" if others else name


def _stack(leaves):
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    if len(leaves) == 1:
        return first[None]
    return jnp.stack(leaves)
