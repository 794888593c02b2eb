"""Who averages the messages and takes the server's step.

*Gather*: everyone has every message and repeats the server's step. *Sharded*: layers are dealt out
to the workers; a layer's messages go to its owner alone, which averages them, takes the step of its
own layers and sends it, compressed, to all. So a worker sends its message once and its share of
the step once, however many workers there are, and keeps 1/n of the server's state.

What is dealt out are the layers along the leading axis of a leaf (`grouped` stacks them so). A leaf
of a single layer has nothing to deal out, and its messages are gathered. Where the workers do not
divide the layers, zeros stand for those that are missing.

*Whole* are trees like the parameters; *own* is what one worker has of them as a server.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _axes
from ._axes import AxisName
from ._links import Links
from ._messages import Floats, Message, Stacked, dense, is_message, wire_bits
from ._settings import path_name
from ._state import PerWorker, is_per_worker
from ._wire import Rows, piece_by_piece, pieces


class Topology(abc.ABC):
    """Interface of `Gather` and `Sharded`.

    Attributes:
      owners: among how many the layers are dealt out.
    """

    owners: int

    @abc.abstractmethod
    def check(self, axis_name: AxisName) -> None:
        """Raises a ValueError where the workers of `axis_name` are not those it is made for."""

    def share(self, layers: int) -> int:
        """How many of the `layers` of a leaf each owner has, missing ones included."""
        return layers if layers == 1 else -(-layers // self.owners)


@dataclasses.dataclass(frozen=True)
class Gather(Topology):
    """Every worker has every message, and repeats the server's step.

    Each sends its message to the n − 1 others. What the downlink sends need not travel then.
    """

    owners = 1

    def check(self, axis_name):
        del axis_name


@dataclasses.dataclass(frozen=True)
class Sharded(Topology):
    """Every worker is the server of its share of the layers.

    Each sends its message once and its share of the step to the others. What the server keeps of a
    layer, its owner keeps.

    Attributes:
      num_workers: n.

    Raises:
      ValueError: for fewer than one worker; when traced, where there are not so many.
    """

    num_workers: int

    def __post_init__(self):
        if self.num_workers < 1:
            raise ValueError(f"`num_workers` must be at least 1, got {self.num_workers}.")

    @property
    def owners(self):  # type: ignore
        return self.num_workers

    def check(self, axis_name):
        workers = _axes.worker_count(axis_name)
        if workers != self.num_workers:
            raise ValueError(
                f"{self} is not for the {workers} workers of axis {axis_name!r}: pass "
                f"Sharded({workers}), and a state that it has made."
            )


# Outside of the step that is mapped over the workers.


def init(topology: Topology, of_layers: Callable[[Any], Any], whole: Any) -> Any:
    """The state that `of_layers` makes, with `PerWorker` parts where it is of layers dealt out."""

    def shrink(x):
        return jax.ShapeDtypeStruct((topology.share(len(x)), *x.shape[1:]), x.dtype)

    own = jax.tree.map(lambda x: shrink(x) if _is_dealt(topology, x) else x, whole)
    # A part of the state is of layers where it has as many as the parameters that it is made for.
    return jax.tree.map(
        lambda x, shape: x if x.shape == shape.shape else PerWorker(_rows(topology, x)),
        of_layers(whole),
        jax.eval_shape(of_layers, own),
    )


def deal(topology: Topology, whole: Any) -> Any:
    """Arrays as a sharded server keeps them: `PerWorker` parts where they are dealt out."""
    return init(topology, lambda tree: tree, whole)


def join(dealt: Any, like: Any) -> Any:
    """The inverse of `deal`. `like`: leaves of the shapes that are wanted."""

    def put_together(x, shape):
        return _merge(x.part)[: len(shape)] if is_per_worker(x) else x

    return jax.tree.map(put_together, dealt, like, is_leaf=is_per_worker)


def traffic(topology: Topology, messages: Any, answers: Any) -> dict[str, int]:
    """Bytes that a worker brings to the collectives of a step, by kind, as HLO names them.

    Args:
      messages: for whole arrays, of the workers.
      answers: likewise of the server.
    """
    carried = dict.fromkeys(("all-gather", "all-to-all", "all-reduce", "reduce-scatter"), 0)
    for nodes, is_answer in ((messages, False), (answers, True)):
        for node in jax.tree.leaves(nodes, is_leaf=is_message):
            shape = jax.eval_shape(dense, node)
            dealt = _is_dealt(topology, shape)
            if is_answer and not dealt:
                continue  # everyone takes that step
            if is_answer:
                kind = "all-gather"
            elif not is_message(node) or node.summable:
                kind = "reduce-scatter" if dealt else "all-reduce"
            else:
                kind = "all-to-all" if dealt else "all-gather"
            size = wire_bits(node) // 8
            if dealt:  # layers are of equal size; an owner answers for its own
                owners = 1 if is_answer else topology.owners
                size = size // len(shape) * topology.share(len(shape)) * owners
            carried[kind] += size
    return carried


# Inside of it.


def own(topology: Topology, whole: Any, index: jax.Array | int) -> Any:
    """Of arrays, the layers of owner `index`."""

    def take(x):
        if not _is_dealt(topology, x):
            return x
        share = topology.share(len(x))
        return lax.dynamic_slice_in_dim(_padded(topology, x), index * share, share)

    return jax.tree.map(take, whole)


def own_keys(topology: Topology, keys: jax.Array, index: jax.Array | int) -> jax.Array:
    """Of keys, one for each layer, those of the layers of owner `index`."""
    if not _is_dealt(topology, keys):
        return keys
    share = topology.share(len(keys))
    # What stands for a missing layer may have any key.
    return keys[jnp.minimum(index * share + jnp.arange(share), len(keys) - 1)]


def average(topology: Topology, messages: Any, links: Links) -> Any:
    """The mean, as arrays, of all workers' messages for the layers of this owner.

    Raises:
      ValueError: naming a leaf whose message cannot be dealt out.
    """
    nodes, treedef, dealt = _nodes(topology, messages, jax.eval_shape(_expanded, messages))
    means = [None] * len(nodes)
    for i, node in enumerate(nodes):
        if not is_message(node):
            means[i] = _mean_of_floats(topology, node, dealt[i], links)
        elif node.summable:
            mean = _mean_of_floats(topology, node.addend(), dealt[i], links)
            ours = own(topology, node, _axes.worker_index(links.axis_name)) if dealt[i] else node
            means[i] = ours.with_addend(mean).dense()
    for is_dealt in (False, True):
        numbers = [i for i, mean in enumerate(means) if mean is None and dealt[i] == is_dealt]
        found = [nodes[i] for i in numbers]
        if is_dealt:
            found = jax.tree.map(lambda x: _rows(topology, x), found)
        for i, mean in zip(numbers, _means(found, is_dealt, links), strict=True):
            means[i] = mean
    return treedef.unflatten(means)


def _mean_of_floats(topology, floats, is_dealt, links):
    """The mean of all workers' arrays, or of the layers of this owner: added up on their way."""
    if not is_dealt:
        return links.mean(floats.ravel()).reshape(floats.shape)
    rows = _rows(topology, floats)
    return links.scatter(rows.reshape(len(rows), -1)).reshape(rows.shape[1:])


def _means(messages, is_dealt, links):
    """The mean of all workers' messages, for each of some.

    Args:
      is_dealt: whether their arrays are rows, one for each owner, and those of this one wanted.
    """
    axis, send = (1, links.exchange) if is_dealt else (0, links.gather)
    workers = _axes.worker_count(links.axis_name)

    receives = workers > 1 and _axes.is_wired(links.axis_name)  # lanes have all of it already

    def is_large(message):
        of_layers = receives and isinstance(message, Stacked)
        return of_layers and pieces(jax.tree.leaves(message), axis) > 1

    def averaged(leaves, treedef):
        sent = Rows.of(leaves, lead=axis).carried(send)
        totals = [message.total() for message in treedef.unflatten(sent)]
        return [total / jnp.asarray(workers, total.dtype) for total in totals]

    def by_pieces(message):
        leaves, treedef = jax.tree.flatten([message])
        return piece_by_piece(lambda leaves: averaged(leaves, treedef)[0], leaves, axis)

    large = [is_large(message) for message in messages]
    small = [message for message, alone in zip(messages, large, strict=True) if not alone]
    together = iter(averaged(*jax.tree.flatten(small)))
    return [
        by_pieces(message) if alone else next(together)
        for message, alone in zip(messages, large, strict=True)
    ]


def broadcast(topology: Topology, messages: Any, like: Any, links: Links) -> Any:
    """The whole arrays that all owners' messages stand for.

    Args:
      messages: of this owner, or arrays.
      like: leaves of the shapes that are wanted.

    Raises:
      ValueError: naming a leaf whose message cannot be dealt out.
    """
    nodes, treedef, dealt = _nodes(topology, messages, like)
    numbers = [i for i, is_dealt in enumerate(dealt) if is_dealt]
    for i in numbers:
        nodes[i] = nodes[i] if is_message(nodes[i]) else Floats.of(nodes[i])
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]

    def send(leaves):
        return [_merge(x) for x in Rows.of(leaves).carried(links.gather)]

    for i, node in zip(numbers, _sent(send, [nodes[i] for i in numbers]), strict=True):
        nodes[i] = jax.tree.map(lambda leaf, i=i: leaf[: shapes[i][0]], node)
    return treedef.unflatten([dense(node) for node in nodes])


def _nodes(topology, messages, like):
    """Messages as a list, how to make a tree of that again, and whether each is dealt out."""
    nodes = jax.tree.leaves_with_path(messages, is_leaf=is_message)
    dealt = [_is_dealt(topology, leaf) for leaf in jax.tree.leaves(like)]
    for (path, node), is_dealt in zip(nodes, dealt, strict=True):
        if is_dealt and is_message(node) and not isinstance(node, Floats | Stacked):
            raise ValueError(
                f"{path_name(path)}: a {type(node).__name__} cannot be dealt out. {topology} needs "
                "the layers of a leaf compressed each by itself, as our optimizers do (`grouped`); "
                "or use Gather()."
            )
    treedef = jax.tree.structure(messages, is_leaf=is_message)
    return [node for _, node in nodes], treedef, dealt


def _sent(send: Callable[[list], list], nodes: list[Message]) -> list[Message]:
    """`nodes`, with what `send` makes of all their leaves."""
    leaves, treedef = jax.tree.flatten(nodes)
    return treedef.unflatten(send(leaves))


def _expanded(messages):
    return jax.tree.map(dense, messages, is_leaf=is_message)


def _is_dealt(topology, x):
    return x.ndim > 0 and topology.share(x.shape[0]) != x.shape[0]


def _padded(topology, x):
    missing = topology.share(len(x)) * topology.owners - len(x)
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def _rows(topology, x):
    """(layers, ...) as (owners, share, ...)."""
    return _padded(topology, x).reshape(topology.owners, topology.share(len(x)), *x.shape[1:])


def _merge(x):
    return x.reshape(-1, *x.shape[2:])
