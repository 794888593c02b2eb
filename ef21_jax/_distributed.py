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

from . import _axes
from ._axes import AxisName
from ._dtypes import rounded, widen
from ._messages import expand, is_message
from ._state import DistributedState, find_state


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

    @classmethod
    def of(
        cls,
        init: Callable,
        update: Callable,
        *,
        messages: Callable,
        stack: Callable = lambda tree: tree,
        unstack: Callable = lambda stacked, like: stacked,
    ) -> "Distributed":
        """With these attributes."""
        transformation = cls(init, update)
        transformation.messages = messages
        transformation.stack = stack
        transformation.unstack = unstack
        return transformation


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

    return Distributed.of(init, update, messages=messages)


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
