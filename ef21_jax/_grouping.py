"""Layers of equal settings, shape and dtype, stacked into one array.

A model has many layers and few shapes. Stacked at the door, gradients on entry and updates on
exit, with state that stays as it is stacked, a step is a program of so many operations as there are
shapes: traced and compiled once a shape, not once a layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._settings import path_name


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves that are stacked into one array, of shape (layers, ...).

    Attributes:
      numbers: of the leaves, ascending.
      shape: of each of them.
      pieces: into how many each is cut along its first axis, the last one filled up with zeros.
        Every piece is a layer then.
    """

    numbers: tuple[int, ...]
    shape: tuple[int, ...]
    pieces: int = 1

    @property
    def layers(self) -> int:
        """The length of the stack."""
        return len(self.numbers) * self.pieces

    def stack(self, leaves: Sequence[Any]) -> Any:
        """Takes arrays and `jax.ShapeDtypeStruct`s alike."""
        first = leaves[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((self.layers, *self.layer_shape), first.dtype)
        if self.pieces > 1:
            return jnp.concatenate([self._cut(leaf) for leaf in leaves])
        return first[None] if len(leaves) == 1 else jnp.stack(leaves)

    def unstack(self, stacked: jax.Array, numbers: Sequence[Any] | None = None) -> list[jax.Array]:
        """The inverse of `stack`. `numbers`: of at least all layers, see `layer_numbers`."""
        if self.pieces == 1:
            numbers = range(self.layers) if numbers is None else numbers[: self.layers]
            take = functools.partial(
                lax.dynamic_index_in_dim, stacked, keepdims=False, allow_negative_indices=False
            )
            return [take(i) for i in numbers]
        whole = stacked.reshape(len(self.numbers), -1, *self.shape[1:])
        # By number: an array that other processes hold parts of cannot be iterated over.
        return [whole[i, : self.shape[0]] for i in range(len(self.numbers))]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Of each layer of the stack."""
        if self.pieces == 1:
            return self.shape
        return (-(-self.shape[0] // self.pieces), *self.shape[1:])

    def _cut(self, leaf):
        shape = self.layer_shape
        missing = self.pieces * shape[0] - len(leaf)
        leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf
        return leaf.reshape(self.pieces, *shape)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which leaves of a tree are stacked with which.

    Attributes:
      treedef: of the tree.
      groups: by name.
    """

    treedef: jax.tree_util.PyTreeDef
    groups: dict[str, Group]

    @staticmethod
    def of(
        tree: Any,
        settings: Sequence[Hashable],
        pieces: Callable[[Any, Group], int] = lambda setting, group: 1,
    ) -> "Grouping":
        """Groups of equal settings, shapes and dtypes.

        A group has the name of its first leaf, and how many others there are:
        `blocks.0.q.kernel+11`.

        Args:
          settings: one for each leaf, in order.
          pieces: from the setting of a group, and the group, to the number of pieces.
        """
        found: dict[Hashable, list[int]] = {}
        paths = jax.tree.leaves_with_path(tree)
        for i, ((_, leaf), setting) in enumerate(zip(paths, settings, strict=True)):
            found.setdefault((setting, leaf.shape, leaf.dtype), []).append(i)
        groups = {}
        for (setting, shape, _), numbers in found.items():
            group = Group(tuple(numbers), tuple(shape))
            group = dataclasses.replace(group, pieces=pieces(setting, group))
            groups[_name(paths[numbers[0]][0], len(numbers) - 1)] = group
        return Grouping(jax.tree.structure(tree), groups)

    def stack(self, tree: Any) -> Any:
        """{group: shape (layers, ...)}. Takes arrays and `jax.ShapeDtypeStruct`s alike.

        What has no leaves is given back, since `optax.tree.map_params` looks for just that.
        """
        leaves = jax.tree.leaves(tree)
        if not leaves:
            return tree
        return {
            name: group.stack([leaves[i] for i in group.numbers])
            for name, group in self.groups.items()
        }

    def unstack(self, stacked: Any, count: jax.Array | None = None) -> Any:
        """The inverse of `stack`. `count`: as of `layer_numbers`, in a program to be compiled."""
        most = max((group.layers for group in self.groups.values()), default=0)
        numbers = None if count is None or most < 2 else layer_numbers(most, count)
        return self.unflatten(
            {name: group.unstack(stacked[name], numbers) for name, group in self.groups.items()}
        )

    def unflatten(self, values: dict[str, Sequence[Any]]) -> Any:
        """The tree with `values` in place of the leaves of each group, in order."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for name, group in self.groups.items():
            for i, value in zip(group.numbers, values[name], strict=True):
                leaves[i] = value
        return self.treedef.unflatten(leaves)

    def choose(self, values: Sequence[Any]) -> dict[str, Any]:
        """Of `values`, one for each leaf, that of each group's first."""
        return {name: values[group.numbers[0]] for name, group in self.groups.items()}


def layer_numbers(layers: int, count: jax.Array) -> list[jax.Array]:
    """0, 1, ..., `layers` − 1, of which a compiler for a CPU does not know that they are.

    Kernels that differ in nothing but a constant are compiled each by itself, one for each layer
    that is taken from a stack, and that is a third of the time that a step of many layers takes to
    compile. With a number that is known only when it runs, they are one.

    Args:
      count: any number that is not negative, and only known when the program runs.
    """
    *numbers, another = [jnp.asarray(i, jnp.int32) for i in range(layers + 1)]
    return lax.platform_dependent(
        count,
        cpu=lambda c: lax.cond(c >= 0, lambda: numbers, lambda: [another] * layers),
        default=lambda _: numbers,
    )


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
