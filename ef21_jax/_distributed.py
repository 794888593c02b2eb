"""One optimizer over many workers.

`distribute` alone knows that there are workers, and it knows no compressor and no norm. The
worker's half turns a gradient into messages; messages travel; the server's half, replicated on
every worker, turns their mean into a step; the downlink's half turns the step into messages again.

`spmd` maps a step that was written for one worker over lanes of a device (vmap), over devices
(shard_map), or both. The same update runs in each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from . import _axes
from ._axes import AxisName
from ._dtypes import rounded, widen
from ._messages import expand, is_message


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


class Distributed(optax.GradientTransformationExtraArgs):
    """What `distribute` returns: an optax transformation that can say what it will send.

    Attributes:
      messages: a function from parameters (or their `jax.ShapeDtypeStruct`s) to the pair of trees
        of shapes, (uplink, downlink), that one worker sends and receives in a step.
      stack: from a tree like the parameters to how the state lays it out (see `grouped`).
      unstack: from that, and a tree like the parameters, back.
    """

    messages: Callable[[optax.Params], tuple[Any, Any]]
    stack: Callable[[Any], Any]
    unstack: Callable[[Any, Any], Any]


def distribute(
    worker: optax.GradientTransformation,
    server: optax.GradientTransformation,
    downlink: optax.GradientTransformation | None = None,
    *,
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """Runs `worker` on each worker's gradient and `server` on the mean of the messages.

    One round: every worker's gradient, taken at `params`, goes through `worker`, which gives a
    tree of messages (or of arrays). Messages are all-gathered and averaged; arrays, and messages
    that can be summed, are averaged by an all-reduce. `server`, any optax transform, turns the
    mean into a step, and is given the server's own model as `params`. The step goes through
    `downlink`, and what that sends is the update.

    Topology: gather. Every worker has all messages and repeats the server's step, with the same
    result. So the uplink really travels, and the downlink is counted but need not be.

    A worker whose message or state is not finite sends zero and keeps its state, on both ends;
    `state.rejected` counts these. Randomness is a function of (seed, step, worker, leaf) alone.
    All arithmetic and state is in float32 (float64 for that), updates are in the parameters'
    dtype.

    Do not wrap this in `optax.masked`, `optax.MultiSteps` or `optax.apply_if_finite` where there
    are several workers: leaves passed by would never be averaged, and collectives under a
    condition that differs between workers hang. Put those inside, or accumulate in the loss.

    Args:
      worker: local gradient -> messages; `update` is given `key`, another one for each worker, and
        `shared_key`, the same for all.
      server: mean -> step; given `key`, the same for all.
      downlink: step -> messages, `ef21_p(...)`, or None to send the step as it is.
      axis_name: the axis, or tuple of axes outermost first, over which the step is mapped. None
        for a single worker and no communication.
      seed: of all randomness.

    Raises:
      ValueError: when traced where `axis_name` is not bound, or with gradients that were summed
        over it already.
    """
    worker = optax.with_extra_args_support(worker)
    server = optax.with_extra_args_support(server)

    def init(params):
        params = widen(params)
        return DistributedState(
            worker=worker.init(params),
            server=server.init(params),
            downlink=optax.EmptyState() if downlink is None else downlink.init(params),
            count=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
        )

    def exchange(updates, state, params, keys, **extra_args):
        updates = widen(updates)
        messages, proposed = worker.update(
            updates, state.worker, widen(params), **keys, **extra_args
        )
        # The gradient too: a compressor may make something finite of a NaN.
        finite = _all_finite((updates, expand(messages), proposed), _axes.worker_count(axis_name))
        rejected = state.rejected + jnp.where(finite, 0, 1).astype(jnp.int32)
        mean = _mean(messages, finite, axis_name)
        return mean, _select(finite, proposed, state.worker), rejected

    def broadcast(step, state, params, key):
        if downlink is None:
            return step, state.downlink
        return downlink.update(step, state.downlink, params, key=key)

    def update(updates, state, params=None, **extra_args):
        _axes.check_bound(axis_name)
        _axes.check_local(updates, axis_name)
        up, at_server, down = _keys(seed, state.count)
        up = _worker_keys(up, _axes.worker_index(axis_name))

        mean, worker_state, rejected = exchange(updates, state, params, up, **extra_args)
        step, server_state = server.update(
            mean, state.server, widen(_shifted(params, state)), key=at_server, **extra_args
        )
        shift, downlink_state = broadcast(step, state, params, down)

        count = optax.safe_increment(state.count)
        out = _cast_like(expand(shift), updates if params is None else params)
        return out, DistributedState(worker_state, server_state, downlink_state, count, rejected)

    def messages(params):
        def one_round(params):
            state = init(params)
            up, _, down = _keys(seed, state.count)
            # A gradient looks like the parameters, and so does a step.
            keys = _worker_keys(up, 0)
            sent = worker.update(widen(params), state.worker, widen(params), **keys)[0]
            return sent, broadcast(widen(params), state, params, down)[0]

        return jax.eval_shape(one_round, params)

    transformation = Distributed(init, update)
    transformation.messages = messages
    transformation.stack = lambda tree: tree
    transformation.unstack = lambda tree, like: tree
    return transformation


def _keys(seed, count):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), count), 3)


def _worker_keys(key, index):
    # No worker has the number of the key that all of them share.
    return {
        "key": jax.random.fold_in(key, index),
        "shared_key": jax.random.fold_in(key, jnp.iinfo(jnp.uint32).max),
    }


def _silenced(finite, message):
    """`message` where `finite`, else one that stands for zero."""
    if is_message(message) and message.summable:
        # What is not the addend is no worker's own: it is needed to decode the others' sum.
        addend = message.addend()
        return message.with_addend(jnp.where(finite, addend, jnp.zeros_like(addend)))
    # All-zero leaves stand for zero, whatever the kind of message.
    return _select(finite, message, optax.tree.zeros_like(message))


def _mean(messages, finite, axis_name):
    """The mean of every worker's messages, as dense arrays, where those not `finite` are zero."""
    names = _axes.names(axis_name)
    if not names:
        # What the worker has expanded already, to know its own estimate.
        arrays = expand(messages)
        return _select(finite, arrays, optax.tree.zeros_like(arrays))

    def mean(node):
        node = _silenced(finite, node)
        if not is_message(node):
            return lax.pmean(node, names)
        if node.summable:
            return node.with_addend(lax.pmean(node.addend(), names)).dense()
        total = jax.tree.map(lambda leaf: _axes.gather(leaf, axis_name), node).total()
        return total / jnp.asarray(_axes.worker_count(axis_name), total.dtype)

    return jax.tree.map(mean, messages, is_leaf=is_message)


def _all_finite(tree, num_workers):
    """Whether every float is finite, and small enough that the sum over the workers will be."""
    finite = [  # a maximum is NaN where one entry is
        jnp.max(jnp.abs(leaf), initial=0.0) <= jnp.finfo(leaf.dtype).max / (2 * num_workers)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def _select(chosen, new, old):
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), new, old)


def _cast_like(tree, like):
    return jax.tree.map(lambda x, target: rounded(x, target.dtype), tree, like)


# What follows works on any tree that has a `DistributedState` somewhere in it: the state of a
# chain, a Flax `TrainState`.


def _is_state(node):
    return isinstance(node, DistributedState)


def find_state(tree: Any) -> DistributedState:
    """The one `DistributedState` in `tree`.

    Raises:
      ValueError: where there is none, or more than one.
    """
    found = [node for node in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(node)]
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
        if not _is_state(node):
            return shared
        return DistributedState(worker, shared, shared, shared, worker)

    return jax.tree.map(axes, tree, is_leaf=_is_state)


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
        if not _is_state(node):
            return node
        worker, rejected = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_workers, *leaf.shape)),
            (node.worker, node.rejected),
        )
        return node._replace(worker=worker, rejected=rejected)

    tree = jax.tree.map(stack, tree, is_leaf=_is_state)
    if mesh is None:
        return tree
    on_mesh = tuple(name for name in _axes.names(axis_name) if name in mesh.axis_names)
    placement = state_axes(tree, NamedSharding(mesh, P(on_mesh)), NamedSharding(mesh, P()))
    return jax.device_put(tree, jax.tree.broadcast(placement, tree))


def server_params(tx: Distributed, params: optax.Params, state: Any) -> optax.Params:
    """The server's model X. `params` are W, the model that the workers hold.

    Gradients are taken at W, the guarantee is for X. They are one where the downlink is lossless.

    Args:
      tx: one of our optimizers, or `distribute` itself; of a chain, that part.
      params: W.
      state: the optimizer's state, or anything that holds it.

    Raises:
      ValueError: for a transformation that is not made by `distribute`.
    """
    check_distributed(tx)
    state = find_state(state)
    if _residual(state) is None:
        return params
    return tx.unstack(_shifted(tx.stack(params), state), params)


def _residual(state):
    return getattr(state.downlink, "residual", None)


def _shifted(params, state):
    """X from W, both as the state lays them out."""
    residual = _residual(state)
    if residual is None or params is None:
        return params
    return optax.tree.add(widen(params), residual)


def check_distributed(tx: Any) -> None:
    """Raises a ValueError unless `tx` is what `distribute` makes."""
    if not isinstance(tx, Distributed):
        raise ValueError(
            f"Only what `distribute` makes can say what it sends and keeps, got "
            f"{type(tx).__name__}. Of a chain, pass the communicating part."
        )


def spmd(step: Callable, *, axis_name: AxisName = "workers", mesh: Mesh | None = None) -> Callable:
    """Maps `step(*carry, batch) -> (*carry, aux)`, written for one worker, over all of them.

    `carry` is e.g. `(params, state)`, or one Flax `TrainState`. In it, the workers' part of the
    optimizer's state has a leading axis of workers (`replicate`), all else is shared. `batch` and
    `aux` have a leading axis of workers throughout.

    Args:
      step: one worker's step. It calls `tx.update` with its own gradients.
      axis_name: as in `distribute`. Without a mesh, one name: the workers are lanes of a vmap.
        With a mesh, those of the names that it has are its axes, manual in a `shard_map`; one more
        name is that of the lanes within a device, so n workers run on any number of devices that
        divides n: `("devices", "lanes")`.
      mesh: the devices.

    Returns:
      A function to be jitted by the caller, who may donate the carry.

    Raises:
      ValueError: for axis names that fit neither case, or a number of workers that does not.
    """
    names = _axes.names(axis_name)
    on_mesh = tuple(name for name in names if mesh is not None and name in mesh.axis_names)
    lanes = tuple(name for name in names if name not in on_mesh)
    if mesh is None and len(lanes) != 1:
        raise ValueError(f"Without a mesh `axis_name` must be one name, got {axis_name!r}.")
    if mesh is not None and (not on_mesh or len(lanes) > 1 or names != on_mesh + lanes):
        raise ValueError(
            f"`axis_name` must name axes of the mesh, {mesh.axis_names}, and then at most one "
            f"more for lanes within a device, got {axis_name!r}."
        )

    def mapped(*args):
        *carry, batch = args
        _check_workers(batch, mesh, on_mesh, lanes)
        axes = (*(state_axes(part) for part in carry), 0)
        if lanes:
            inner = jax.vmap(step, in_axes=axes, out_axes=axes, axis_name=lanes[0])
        else:
            inner = _alone_on_its_device(step)
        if mesh is None:
            return inner(*args)
        specs = (*(state_axes(part, P(on_mesh), P()) for part in carry), P(on_mesh))
        # With check_vma=True the gradient with respect to shared parameters is a sum over workers,
        # and collectives over a vmap axis do not trace.
        return jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=specs,
            out_specs=specs,
            axis_names=frozenset(on_mesh),
            check_vma=False,
        )(*args)

    return mapped


def _alone_on_its_device(step):
    """Takes the axis of workers, of length one, off the arguments, and puts it on the results."""

    def per_worker(change, part):
        return jax.tree.map(
            lambda node: (
                node._replace(
                    worker=jax.tree.map(change, node.worker), rejected=change(node.rejected)
                )
                if _is_state(node)
                else node
            ),
            part,
            is_leaf=_is_state,
        )

    def wrapped(*args):
        *carry, batch = args
        carry = [per_worker(lambda x: x[0], part) for part in carry]
        *carry, aux = step(*carry, jax.tree.map(lambda x: x[0], batch))
        carry = [per_worker(lambda x: x[None], part) for part in carry]
        return (*carry, jax.tree.map(lambda x: jnp.asarray(x)[None], aux))

    return wrapped


def _check_workers(batch, mesh, on_mesh, lanes):
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(counts) > 1 or () in counts:
        raise ValueError(
            "Every leaf of the batch must have the same leading axis of workers, got "
            f"{sorted(counts)}."
        )
    if mesh is None or not counts:
        return
    (workers,), devices = counts.pop(), 1
    for name in on_mesh:
        devices *= mesh.shape[name]
    if workers % devices or (not lanes and workers != devices):
        raise ValueError(
            f"{workers} workers do not fit {devices} devices of the axes {on_mesh}: "
            + (
                "the first must be a multiple of the second."
                if lanes
                else "name one more axis for lanes, axis_name=(..., 'lanes'), in `distribute` "
                "and in `spmd`, to run several on each."
            )
        )
