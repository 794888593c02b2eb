"""What EF21 rests on: G is the mean of the G_j, at all times.

EF21 never heals a breach of it. An estimate lost on one side (a restore that drops the workers'
part, say) stays wrong for good, and the method converges to the wrong point.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._distributed import Distributed, check_distributed
from ._dtypes import widen
from ._feedback import EF21State, MomentumState
from ._placement import left_to_the_compiler, places
from ._settings import path_name
from ._state import DistributedState, find_state, is_per_worker
from ._topologies import deal, join


def check_invariant(state: Any, *, tolerance: float = 1e-4) -> float:
    """Verifies G = mean_j G_j. For outside of jit: after a restore, and every so often.

    Args:
      state: the optimizer's state, or anything that holds it.
      tolerance: the largest gap to pass, relative to the largest entry of a leaf. Rounding in
        float32 makes about 1e-7 in the first steps and 1e-5 after 10,000.

    Returns:
      The largest relative gap.

    Raises:
      ValueError: naming the leaf and the gap, where it is larger; or where the state holds no EF21
        estimates.
    """
    state = find_state(state)
    worker, server = _estimates(state.worker), _estimates(state.server)
    if not worker or len(worker) != len(server):
        raise ValueError(
            f"The state holds {len(worker)} EF21 estimates at the workers and {len(server)} at the "
            "server: `check_invariant` is for methods built from both ends of `ef21`."
        )
    compared = left_to_the_compiler(functools.partial(_compared, state))
    worst = 0.0
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(worker),
        jax.tree.leaves(server, is_leaf=is_per_worker),
        strict=True,
    ):
        size, gap = map(float, compared(path_name(path[2:]), mine, theirs))
        relative = gap / size if size else gap
        if not relative <= tolerance:  # so written, NaN fails
            raise ValueError(
                f"{path_name(path[2:])}: G and the mean of the G_j differ by {relative:.2e} of "
                f"their largest entry (tolerance {tolerance:.0e}). EF21 cannot recover from that. "
                "Restore workers and server from the same step, or restart both from zero."
            )
        worst = max(worst, relative)
    return worst


def warm_start(tx: Distributed, state: Any, gradients: optax.Updates) -> Any:
    """Starts a fresh state exactly: G_j = M_j = ∇f_j, G their mean, at the price of dense bytes.

    The initialisation of paper M, Algorithm 2 and Theorems 3, 4, 5. Without it, the first round
    sends C(∇f_j), as in Theorem 6.

    Args:
      tx: one of our optimizers, or `distribute` itself; of a chain, that part.
      state: the optimizer's state, or anything that holds it, already replicated.
      gradients: each worker's, with the leading axis of workers that the state has.

    Returns:
      The same tree, with estimates and momenta set.

    Raises:
      ValueError: where the gradients do not fit the estimates, or for a transformation that is
        not made by `distribute`.
    """
    check_distributed(tx)
    workers = find_state(state).rejected.shape  # (), of a single one that is not replicated
    for path, leaf in jax.tree.leaves_with_path(gradients):
        if jnp.shape(leaf)[: len(workers)] != workers:
            raise ValueError(
                f"{path_name(path)}: the gradient has shape {jnp.shape(leaf)}, and wants the "
                f"leading axis of the {workers[0]} workers that the state has."
            )
    start = left_to_the_compiler(
        functools.partial(_started, tx), lambda state, gradients: places(state)
    )
    return start(state, gradients)


def _started(tx, state, gradients):
    replicated = find_state(state).rejected.ndim
    gradients = widen((jax.vmap(tx.stack) if replicated else tx.stack)(gradients))

    def fill(node, new):
        if isinstance(node, EF21State):
            _check_same(node.estimate, new)
            return EF21State(new)
        if isinstance(node, MomentumState):
            _check_same(node.momentum, new)
            return MomentumState(new, jnp.ones_like(node.count))
        return node

    def start(node):
        if not isinstance(node, DistributedState):
            return node
        mean = deal(tx.topology, jax.tree.map(lambda g: _mean(g, node), gradients))
        return node._replace(
            worker=jax.tree.map(lambda n: fill(n, gradients), node.worker, is_leaf=_is_memory),
            server=jax.tree.map(lambda n: fill(n, mean), node.server, is_leaf=_is_memory),
        )

    return jax.tree.map(start, state, is_leaf=lambda node: isinstance(node, DistributedState))


def _compared(state, name, mine, theirs):
    """The largest of the G_j, and of G less their mean."""
    mean = _mean(mine, state)
    theirs = join(theirs, mean)
    if mean.shape != theirs.shape:
        raise ValueError(
            f"{name}: the workers' estimates average to shape {mean.shape}, the server's has "
            f"{theirs.shape}. Was the state restored for another model?"
        )
    # Of the G_j: near an optimum they stay as large as they are, and their mean vanishes.
    return [jnp.max(jnp.abs(x), initial=0.0) for x in (mine, theirs - mean)]


def _is_memory(node):
    return isinstance(node, EF21State | MomentumState)


def _estimates(tree):
    nodes = jax.tree.leaves(tree, is_leaf=_is_memory)
    return [node for node in nodes if isinstance(node, EF21State)]


def _mean(leaf, state):
    # `rejected` is a scalar for each worker, so it tells whether there is an axis of them.
    return jnp.mean(leaf, axis=0) if state.rejected.ndim else leaf


def _check_same(old, new):
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"Gradients have structure {jax.tree.structure(new)}, the state's estimates "
            f"{jax.tree.structure(old)}."
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"{path_name(path)}: the gradient has shape {b.shape}, the state's estimate "
                f"{a.shape}. Both have a leading axis of workers once the state is replicated."
            )
