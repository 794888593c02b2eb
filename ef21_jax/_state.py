"""The state of an optimizer over many workers, and where its parts live.

All of it works on any tree that has a `DistributedState` somewhere in it: the state of a chain, a
Flax `TrainState`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from . import _axes
from ._axes import AxisName


class PerWorker(NamedTuple):
    """In the server's half, what each worker has another part of.

    Outside of the mapped step it has a leading axis of workers.
    """

    part: jax.Array


def is_per_worker(node: Any) -> bool:
    """Whether `node` is a `PerWorker`."""
    return isinstance(node, PerWorker)


def own_parts(tree: Any) -> Any:
    """`tree` with this worker's part in place of every `PerWorker`."""
    return jax.tree.map(lambda x: x.part if is_per_worker(x) else x, tree, is_leaf=is_per_worker)


def as_parts_of(like: Any, tree: Any) -> Any:
    """The inverse of `own_parts`: with a `PerWorker` where `like` has one."""
    return jax.tree.map(
        lambda old, x: PerWorker(x) if is_per_worker(old) else x, like, tree, is_leaf=is_per_worker
    )


class DistributedState(NamedTuple):
    """State split by where it lives, so that one prefix gives its axes or its specs.

    Attributes:
      worker: each worker's own, e.g. M_j and G_j. Outside of the mapped step its leaves have a
        leading axis of workers.
      server: one copy, e.g. G; of a sharded server, `PerWorker` parts.
      downlink: likewise, e.g. X − W.
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

    def of(half):
        return jax.tree.map(
            lambda x: PerWorker(worker) if is_per_worker(x) else shared, half, is_leaf=is_per_worker
        )

    def axes(node):
        if not is_state(node):
            return shared
        return DistributedState(worker, of(node.server), of(node.downlink), shared, worker)

    return jax.tree.map(axes, tree, is_leaf=is_state)


def map_per_worker(function: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """`function` of every leaf in `tree` that has, or shall have, a leading axis of workers."""

    def of(half):
        return jax.tree.map(
            lambda x: PerWorker(function(x.part)) if is_per_worker(x) else x,
            half,
            is_leaf=is_per_worker,
        )

    def mapped(node):
        if not is_state(node):
            return node
        return node._replace(
            worker=jax.tree.map(function, node.worker),
            server=of(node.server),
            downlink=of(node.downlink),
            rejected=function(node.rejected),
        )

    return jax.tree.map(mapped, tree, is_leaf=is_state)


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
      ValueError: for fewer than one worker, or another number of them than the parts of a sharded
        server.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")

    def stack(node):
        if not is_state(node):
            return node
        _check_parts((node.server, node.downlink), num_workers)
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


def _check_parts(halves, num_workers):
    for node in jax.tree.leaves(halves, is_leaf=is_per_worker):
        if is_per_worker(node) and len(node.part) != num_workers:
            raise ValueError(
                f"The server is sharded over {len(node.part)} workers, and `num_workers` is "
                f"{num_workers}: make both the same."
            )
