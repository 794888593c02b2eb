"""The state of an optimizer over many workers, and where its parts live.

All of it works on any tree that has a `DistributedState` somewhere in it: the state of a chain, a
Flax `TrainState`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from . import _axes
from ._axes import AxisName


class DistributedState(NamedTuple):
    """State split by where it lives, so that one prefix gives its axes or its specs.

    Attributes:
      worker: each worker's own, e.g. M_j and G_j. Outside of the mapped step its leaves have a
        leading axis of workers.
      server: one copy, e.g. G.
      downlink: one copy, e.g. X − W.
      count: steps taken. One copy; shape (), int32.
      rejected: messages refused since they were not finite. Each worker's own; int32.
    """

    worker: optax.OptState
    server: optax.OptState
    downlink: optax.OptState
    count: jax.Array
    rejected: jax.Array


def is_state(node: Any) -> bool:
    """Whether `node` is a `DistributedState`: the `is_leaf` of every map over a tree with one."""
    return isinstance(node, DistributedState)


def find_state(tree: Any) -> DistributedState:
    """The one `DistributedState` in `tree`.

    Raises:
      ValueError: where there is none, or more than one.
    """
    found = [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one DistributedState, as `distribute` makes it, and found {len(found)}: "
            "pass the optimizer's state."
        )
    return found[0]


def state_axes(tree: Any, worker: Any = 0, shared: Any = None) -> Any:
    """A prefix of `tree` with `worker` where there is a leading axis of workers, else `shared`.

    With the defaults, `in_axes` and `out_axes` for vmap and pmap; with `worker=P("workers")` and
    `shared=P()`, specs for `shard_map`.
    """

    def axes(node):
        if not is_state(node):
            return shared
        return DistributedState(worker, shared, shared, shared, worker)

    return jax.tree.map(axes, tree, is_leaf=is_state)


def replicate(
    tree: Any,
    num_workers: int,
    *,
    mesh: Mesh | None = None,
    axis_name: AxisName = "workers",
) -> Any:
    """Gives the workers' part of a fresh state its leading axis of workers.

    Args:
      tree: `tx.init(params)`, or anything that holds it.
      num_workers: n.
      mesh: where given, everything is placed on it: the workers' part split over the axes of
        `axis_name` that the mesh has, the rest replicated.
      axis_name: as in `distribute`.

    Raises:
      ValueError: for fewer than one worker.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")

    def stack(node):
        if not is_state(node):
            return node
        worker, rejected = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_workers, *leaf.shape)),
            (node.worker, node.rejected),
        )
        return node._replace(worker=worker, rejected=rejected)

    tree = jax.tree.map(stack, tree, is_leaf=is_state)
    if mesh is None:
        return tree
    on_mesh = tuple(name for name in _axes.names(axis_name) if name in mesh.axis_names)
    placement = state_axes(tree, NamedSharding(mesh, P(on_mesh)), NamedSharding(mesh, P()))
    return jax.device_put(tree, jax.tree.broadcast(placement, tree))
