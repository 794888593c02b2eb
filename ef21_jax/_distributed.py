"""One optimizer over many workers.

`distribute` alone knows that there are workers, and it knows no compressor and no norm. The
worker's half turns a gradient into messages; messages travel; the server's half, replicated on
every worker, turns their mean into a step; the downlink's half turns the step into messages again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _axes, _placement, _topologies
from ._axes import AxisName
from ._dtypes import rounded, widen
from ._guard import all_finite, or_zero, select, silenced
from ._links import Links
from ._messages import Floats, expand_in_turn, is_message
from ._repeatable import Repeatable
from ._state import DistributedState, as_parts_of, find_state, is_per_worker, own_parts
from ._topologies import Gather, Topology


class Distributed(optax.GradientTransformationExtraArgs):
    """What `distribute` returns: an optax transformation that can say what it will send.

    Attributes:
      messages: a function from parameters (or their `jax.ShapeDtypeStruct`s) to the pair of trees
        of shapes, (uplink, downlink), that one worker sends and receives in a step.
      traffic: from parameters to the bytes that one worker brings to collectives, by their kind.
      stack: from a tree like the parameters to how the state lays it out (see `grouped`).
      unstack: from that, and a tree like the parameters, back.
      topology: who averages the messages, and takes the server's step.
      check_gradients: raises a ValueError, when traced, for some that are not a worker's own.
    """

    messages: Callable[[optax.Params], tuple[Any, Any]]
    traffic: Callable[[optax.Params], dict[str, int]]
    stack: Callable[[Any], Any]
    unstack: Callable[[Any, Any], Any]
    topology: Topology
    check_gradients: Callable[[Any], None]

    @classmethod
    def of(
        cls,
        init: Callable,
        update: Callable,
        *,
        messages: Callable,
        traffic: Callable,
        topology: Topology,
        check_gradients: Callable[[Any], None],
        stack: Callable = lambda tree: tree,
        unstack: Callable = _topologies.join,
    ) -> "Distributed":
        """With these attributes."""
        transformation = cls(_placement.left_to_the_compiler(init), _in_place(update))
        transformation.messages = lambda params: messages(_shapes(params))
        transformation.traffic = lambda params: traffic(_shapes(params))
        transformation.stack = stack
        transformation.unstack = unstack
        transformation.topology = topology
        transformation.check_gradients = check_gradients
        return transformation


def _in_place(update):
    """`update`, whose updates lie as the parameters do, or gradients without; state as it did."""

    def places(updates, state, params, extra_args):
        return _placement.places((updates if params is None else params, state))

    def positional(updates, state, params, extra_args):
        return update(updates, state, params, **extra_args)

    automatic = _placement.left_to_the_compiler(positional, places)

    def wrapped(updates, state, params=None, **extra_args):
        return automatic(updates, state, params, extra_args)

    return wrapped


def _shapes(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def distribute(
    worker: optax.GradientTransformation,
    server: optax.GradientTransformation,
    downlink: optax.GradientTransformation | None = None,
    *,
    axis_name: AxisName = None,
    mean_axis_name: AxisName = None,
    topology: Topology = Gather(),
    seed: int = 0,
) -> Distributed:
    """Runs `worker` on each worker's gradient and `server` on the mean of the messages.

    One round: every worker's gradient, taken at `params`, goes through `worker`, which gives a
    tree of messages (or of arrays). Messages travel and are averaged; arrays, and messages that can
    be summed, are averaged by a reduction. `server`, any optax transform, turns the mean into a
    step, and is given the server's own model as `params`. The step goes through `downlink`, and
    what that sends is the update.

    With `Gather()` every worker has all messages and repeats the server's step, with the same
    result. So the uplink really travels, and the downlink is counted but need not be. With
    `Sharded(n)` both travel, and `server` and `downlink` see a worker's share of the layers alone,
    along the leading axis of each leaf: they must treat layers one by one.

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
      mean_axis_name: the axis or axes of the devices within a worker, where they are fast: there
        gradients are averaged as they are, and compressed messages go over `axis_name` alone.
      topology: `Gather()` or `Sharded(n)`.
      seed: of all randomness.

    Raises:
      ValueError: for what is no topology, or a sharded server of a single worker; when traced
        where an axis is not bound, with gradients that were summed over it already, or for another
        number of workers than that of the topology.
    """
    if not isinstance(topology, Topology):
        raise ValueError(f"`topology` must be Gather() or Sharded(n), got {topology!r}.")
    if topology.owners > 1 and axis_name is None:
        raise ValueError(f"{topology} needs workers: name their axis, `axis_name=...`.")
    worker = optax.with_extra_args_support(worker)
    server = optax.with_extra_args_support(server)
    downlink = None if downlink is None else optax.with_extra_args_support(downlink)
    links = Links(axis_name, mean_axis_name)

    def check_gradients(updates):
        for axis in (axis_name, mean_axis_name):
            _axes.check_bound(axis)
            _axes.check_local(updates, axis)
        _axes.check_inside(mean_axis_name)
        topology.check(axis_name)

    def init(params):
        params = widen(params)
        return DistributedState(
            worker=worker.init(params),
            server=_topologies.init(topology, server.init, params),
            downlink=(
                optax.EmptyState()
                if downlink is None
                else _topologies.init(topology, downlink.init, params)
            ),
            count=jnp.zeros([], jnp.int32),
            rejected=jnp.zeros([], jnp.int32),
        )

    def exchange(updates, state, params, keys, **extra_args):
        first = {"provisional": True} if isinstance(worker, Repeatable) else {}
        messages, proposed = worker.update(
            updates, state.worker, widen(params), **keys, **first, **extra_args
        )
        # The gradient too: a compressor may make something finite of a NaN.
        finite = all_finite((updates, messages, proposed), _axes.worker_count(axis_name))
        rejected = state.rejected + jnp.where(finite, 0, 1).astype(jnp.int32)
        messages = silenced(finite, messages)
        arrays = expand_in_turn(messages)
        if isinstance(worker, Repeatable):
            arrays, kept = worker.update(
                or_zero(finite, updates),
                state.worker,
                widen(params),
                sent=arrays,
                accepted=finite,
                **keys,
                **extra_args,
            )
            messages = jax.tree.map(_as_made_last, messages, arrays, is_leaf=is_message)
        else:
            kept = select(finite, proposed, state.worker)
        mean = arrays
        if _axes.names(axis_name):
            mean = _topologies.average(topology, messages, links)
        return mean, kept, rejected

    def update(updates, state, params=None, **extra_args):
        check_gradients(updates)
        _check_dealt(state, jax.eval_shape(init, _shapes(updates)), topology)
        updates = _mean_within(widen(updates), mean_axis_name)
        index = _axes.worker_index(axis_name)
        up, at_server, down = _keys(seed, state.count)
        keys = _worker_keys(up, index)

        mean, worker_state, rejected = exchange(updates, state, params, keys, **extra_args)
        ours = _topologies.own(topology, params, index)  # what this worker serves
        step, server_state = server.update(
            mean, own_parts(state.server), _shifted(ours, state), key=at_server, **extra_args
        )
        shift, downlink_state = step, state.downlink
        if downlink is not None:
            shift, downlink_state = downlink.update(
                step,
                own_parts(state.downlink),
                ours,
                key=down,
                choose=lambda keys: _topologies.own_keys(topology, keys, index),
            )
        shift = _topologies.broadcast(topology, shift, updates, links)

        out = _cast_like(shift, updates if params is None else params)
        return out, DistributedState(
            worker=worker_state,
            server=as_parts_of(state.server, server_state),
            downlink=as_parts_of(state.downlink, downlink_state),
            count=optax.safe_increment(state.count),
            rejected=rejected,
        )

    def messages(params):
        def one_round(params):
            # A gradient looks like the parameters, and so does a step.
            wide = widen(params)
            up, _, down = _keys(seed, jnp.zeros([], jnp.int32))
            sent = worker.update(wide, worker.init(wide), wide, **_worker_keys(up, 0))[0]
            if downlink is None:
                return sent, wide
            return sent, downlink.update(wide, downlink.init(wide), params, key=down)[0]

        return jax.eval_shape(one_round, params)

    def traffic(params):
        if not _axes.names(axis_name):
            return {}
        return _topologies.traffic(topology, *messages(params))

    return Distributed.of(
        init,
        update,
        messages=messages,
        traffic=traffic,
        topology=topology,
        check_gradients=check_gradients,
    )


def _check_dealt(state, like, topology):
    """Raises a ValueError for a state that is not dealt out as the topology does it."""
    ours, fresh = (
        [is_per_worker(x) for x in jax.tree.leaves((s.server, s.downlink), is_leaf=is_per_worker)]
        for s in (state, like)
    )
    if ours != fresh:
        raise ValueError(
            f"The optimizer's state is not one that an optimizer with `topology={topology}` makes: "
            f"of {len(fresh)} arrays of the server {sum(fresh)} should be dealt out to the "
            f"workers, and of {len(ours)} there are {sum(ours)}. Make the state anew, "
            "`tx.init(params)`, or go on with the optimizer that it is from."
        )


def _mean_within(updates, mean_axis_name):
    names = _axes.names(mean_axis_name)
    return lax.pmean(updates, names) if names else updates


def _shifted(params, state):
    """X from W."""
    residual = _residual(state)
    if params is None or residual is None:
        return widen(params)
    return optax.tree.add(widen(params), own_parts(residual))


def _keys(seed, count):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), count), 3)


def _worker_keys(key, index):
    # No worker has the number of the key that all of them share.
    return {
        "key": jax.random.fold_in(key, index),
        "shared_key": jax.random.fold_in(key, jnp.iinfo(jnp.uint32).max),
    }


def _as_made_last(node, array):
    """The message, or the array it stands for where that is sent as it is."""
    return array if isinstance(node, Floats) else node


def _cast_like(tree, like):
    return jax.tree.map(lambda x, target: rounded(x, target.dtype), tree, like)


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
    residual = _residual(find_state(state))
    if residual is None:
        return params

    def shifted(params, residual):
        return optax.tree.add(widen(params), tx.unstack(residual, params))

    def places(params, residual):
        del residual
        return _placement.places(params)

    return _placement.left_to_the_compiler(shifted, places)(params, residual)


def _residual(state):
    return getattr(state.downlink, "residual", None)


def check_distributed(tx: Any) -> None:
    """Raises a ValueError unless `tx` is what `distribute` makes."""
    if not isinstance(tx, Distributed):
        raise ValueError(
            f"Only what `distribute` makes can say what it sends and keeps, got "
            f"{type(tx).__name__}. Of a chain, pass the communicating part."
        )
