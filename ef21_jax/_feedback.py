"""Error feedback: how a compressed message is made good later.

EF21 sends the compressed *change* of an estimate that both ends keep, so what is lost now is
sent later. EF14 keeps what compression has withheld and adds it to the next message. EF21-P, the
compressed broadcast of a model, is EF14 in the primal: with X the server's model and W the one
that the workers hold, X − W obeys just EF14's recursion, so X is never stored.

Everything here is one worker's or the server's own arithmetic: nothing communicates.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._compressors import Compressor, Identity
from ._dtypes import rounded, without_overflow
from ._messages import expand
from ._order import after
from ._placement import here
from ._repeatable import Repeatable, either
from ._settings import Setting, is_zero, per_leaf


class ErrorFeedback(NamedTuple):
    """Both ends of a compressed uplink.

    Attributes:
      worker: turns a local gradient into a tree of messages. Its `update` needs `key`, and takes
        `shared_key` and `choose`; see `compress`.
      server: turns the mean of the expanded messages into an estimate of the gradient.
    """

    worker: Repeatable
    server: optax.GradientTransformationExtraArgs

    def after(self, *before: optax.GradientTransformation) -> Repeatable:
        """`optax.chain(*before, worker)`, which `distribute` runs in less memory.

        Args:
          before: what the gradient goes through first, as `worker_momentum`; it sends nothing.
        """
        return Repeatable.chain(*before, self.worker)


def compress(
    compressors: Setting,
    tree: Any,
    key: jax.Array,
    shared_key: jax.Array | None = None,
    choose: Callable[[jax.Array], jax.Array] = lambda keys: keys,
) -> Any:
    """The tree of messages for the leaves of `tree`, each with a key of its own.

    Args:
      compressors: a compressor, a prefix tree of them, or a function from `tree` to one of these.
      tree: floating arrays.
      key: a typed PRNG key. Leaf number i is given `fold_in(key, i)`.
      shared_key: likewise, for `shared` compressors: the same at all workers. None, for a single
        worker: `key`.
      choose: of the keys of all layers of a stacked leaf, those of the layers that `tree` has.

    A worker, which has a `shared_key`, compresses a leaf when it has the message of the last one
    that it compressed: what is needed on the way need not be held for all. Not so a server, where
    one leaf may be the same at all workers and the next one not.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen = per_leaf(compressors, tree, Compressor)
    numbers = [(i,) if c.numbers is None else c.numbers for i, c in enumerate(chosen)]
    # All keys in one call: drawing them one by one would be most of a large program.
    own, shared = (
        jax.vmap(jax.random.fold_in, in_axes=(None, 0))(k, jnp.asarray(sum(numbers, ()), int))
        for k in (key, key if shared_key is None else shared_key)
    )
    messages, start, before = [], 0, None
    for leaf, compressor, of_leaf in zip(leaves, chosen, numbers, strict=True):
        keys = (shared if compressor.shared else own)[start : start + len(of_leaf)]
        keys = keys[0] if compressor.numbers is None else choose(keys)
        # What is sent as it is needs nothing on the way, and has no part in the order.
        waits = shared_key is not None and compressor != Identity()
        if waits and before is not None:
            leaf = after(leaf, before)
        messages.append(compressor.compress(leaf, keys))
        if waits:
            before = messages[-1].bound()  # which takes all of it, and is asked for anyhow
        start += len(of_leaf)
    return treedef.unflatten(messages)


def _messages(compressors, tree, key, sent=None, accepted=True, **extra_args):
    """What `tree` is sent as; or what it was sent as, see `Repeatable`."""
    if sent is None:
        wanted = {name: extra_args[name] for name in ("shared_key", "choose") if name in extra_args}
        return compress(compressors, tree, key, **wanted)
    chosen = per_leaf(compressors, tree, Compressor)
    made, treedef = jax.tree.flatten(tree)
    leaves = zip(chosen, made, treedef.flatten_up_to(sent), strict=True)
    return treedef.unflatten(
        either(accepted, now, 0.0) if compressor == Identity() else before
        for compressor, now, before in leaves
    )


def _once(updates, extra_args):
    """`updates`. The second time behind a barrier, so that what is made of them, worker's and
    server's estimate, is simplified alike: they are to be equal bit for bit."""
    return lax.optimization_barrier(updates) if "sent" in extra_args else updates


class EF21State(NamedTuple):
    """`estimate` is G_j at worker j, and G, the mean of them all, at the server."""

    estimate: optax.Updates


def ef21(compressors: Setting, *, extrapolation: float | jax.Array = 0.0) -> ErrorFeedback:
    """EF21 (Richtárik, Sokolov, Fatkhullin 2021): R_j = C(M_j − G_j), G_j ← G_j + R_j.

    Estimates start at zero, so the first message is C(M_j), as in paper M, Theorem 6, and paper
    N, Algorithm 1; `warm_start` gives the exact start of paper M, Algorithm 2.

    Args:
      compressors: a compressor, a prefix tree of them, or a function from the tree to one of these.
      extrapolation: κ >= 0. The server hands on G + κ R, with R the mean of the messages, and keeps
        G: no byte and no state more. The papers have 0, and their theorems are for it. G comes
        late, by what was withheld; were C(x) = αx, κ = 1/α − 1 would undo it. With `Identity` on
        momenta of decay κ this is Nesterov's momentum.

    Raises:
      ValueError: for an extrapolation that is negative or not finite.
    """
    _check_extrapolation(extrapolation)

    def init(params):
        per_leaf(compressors, params, Compressor)  # an error as early as can be
        return EF21State(optax.tree.zeros_like(params))

    def send(updates, state, params=None, *, key, provisional=False, **extra_args):
        del params
        change = optax.tree.sub(_once(updates, extra_args), state.estimate)
        messages = _messages(compressors, change, key, **extra_args)
        if provisional:  # the two of which the sum will be made
            return messages, state
        return messages, EF21State(optax.tree.add(state.estimate, expand(messages)))

    def ahead(g, r):
        return without_overflow(g + jnp.asarray(here(extrapolation), r.dtype) * r, g)

    def receive(updates, state, params=None, **extra_args):
        del params, extra_args
        estimate = optax.tree.add(state.estimate, updates)
        if is_zero(extrapolation):
            return estimate, EF21State(estimate)
        return jax.tree.map(ahead, estimate, updates), EF21State(estimate)

    return ErrorFeedback(
        worker=Repeatable(init, send),
        server=optax.GradientTransformationExtraArgs(init, receive),
    )


class ResidualState(NamedTuple):
    """`residual` is what compression has withheld so far."""

    residual: optax.Updates


def ef14(compressors: Setting) -> ErrorFeedback:
    """EF14 (Seide et al. 2014): compress the update plus all that was withheld before."""

    def init(params):
        per_leaf(compressors, params, Compressor)
        return ResidualState(optax.tree.zeros_like(params))

    def send(updates, state, params=None, *, key, provisional=False, **extra_args):
        del params
        target = optax.tree.add(state.residual, _once(updates, extra_args))
        messages = _messages(compressors, target, key, **extra_args)
        if provisional:  # the two of which the difference will be made
            return messages, ResidualState(target)
        withheld = optax.tree.sub(target, expand(messages))
        accepted = extra_args.get("accepted", True)
        kept = jax.tree.map(functools.partial(either, accepted), withheld, state.residual)
        return messages, ResidualState(kept)

    server = optax.with_extra_args_support(optax.identity())
    return ErrorFeedback(Repeatable(init, send), server)


def no_feedback(compressors: Setting) -> ErrorFeedback:
    """Compresses the update and forgets the rest. The baseline that may diverge."""

    def init(params):
        per_leaf(compressors, params, Compressor)
        return optax.EmptyState()

    def send(updates, state, params=None, *, key, provisional=False, **extra_args):
        del params, provisional
        return _messages(compressors, _once(updates, extra_args), key, **extra_args), state

    server = optax.with_extra_args_support(optax.identity())
    return ErrorFeedback(Repeatable(init, send), server)


def ef21_p(compressors: Setting) -> optax.GradientTransformationExtraArgs:
    """EF21-P (Gruntkowska et al. 2023): S = C(X − W), W ← W + S. The `downlink` of `distribute`.

    `params` are W. The update that comes in is the server's step from X, the messages that go out
    are S, and the state is X − W, in float32. Where parameters are narrower than that, what
    rounding takes from W + S is fed back too, so that X is a float32 master copy.
    """
    inner = ef14(compressors).worker

    def update(updates, state, params=None, **extra_args):
        messages, state = inner.update(updates, state, params, **extra_args)
        if params is not None:
            lost = jax.tree.map(_lost_in_rounding, expand(messages), params)
            state = ResidualState(optax.tree.add(state.residual, lost))
        return messages, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _lost_in_rounding(step, param):
    if param.dtype == step.dtype:
        return jnp.zeros_like(step)
    # Just what `optax.apply_updates` will do with the step, cast to the dtype of the parameter.
    later = lax.optimization_barrier(param + rounded(step, param.dtype))
    return step - (later.astype(step.dtype) - param.astype(step.dtype))


class MomentumState(NamedTuple):
    """`momentum` is M_j; `count` is how many gradients it has seen."""

    momentum: optax.Updates
    count: jax.Array  # (), int32


def worker_momentum(decay: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """M ← decay · M + (1 − decay) · ∇f, starting at the first gradient (paper M, Algorithm 3).

    Args:
      decay: the paper's 1 − β, in [0, 1). "Momentum 0.9" is decay 0.9, β = 0.1.

    Raises:
      ValueError: for a decay outside of [0, 1).
    """
    check_decay(decay)

    def init(params):
        return MomentumState(optax.tree.zeros_like(params), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, accepted=True, **extra_args):
        del params, extra_args

        def average(gradient, momentum):
            kept = jnp.asarray(here(decay), gradient.dtype)
            later = kept * momentum + (1 - kept) * gradient
            return either(accepted, jnp.where(state.count == 0, gradient, later), momentum)

        momentum = jax.tree.map(average, updates, state.momentum)
        count = either(accepted, optax.safe_increment(state.count), state.count)
        return momentum, MomentumState(momentum, count)

    return Repeatable(init, update)


def check_decay(decay: float | jax.Array) -> None:
    """Raises a `ValueError` for a momentum outside of [0, 1), unless it is traced."""
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"`decay` (momentum) must lie in [0, 1), got {decay}.")


def _check_extrapolation(extrapolation: float | jax.Array) -> None:
    """Raises a `ValueError` for one that is negative or not finite, unless it is traced."""
    if not isinstance(extrapolation, jax.Array) and not 0 <= extrapolation < math.inf:
        raise ValueError(f"`extrapolation` must lie in [0, ∞), got {extrapolation}.")
