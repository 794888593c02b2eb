"""Runs EF21-Muon on quadratics: many runs at once, as lanes of one jitted scan.

Layers are matrices, a tuple of them, and the loss is the sum of theirs: they do not interact.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef21_jax as ef21
from experiments.problems.quadratics import Quadratics


@dataclasses.dataclass(frozen=True)
class Method:
    """One of paper M's algorithms, as a theorem asks for it. Tuples have one entry a layer."""

    norms: tuple[ef21.Norm, ...]
    uplinks: tuple[ef21.Compressor, ...]
    downlinks: tuple[ef21.Compressor, ...] | None  # None: lossless
    sharp: bool  # steps −γ G^♯; else t LMO(G)
    noisy: bool  # Algorithm 3, with momentum; else Algorithm 2
    warm: bool  # G_j^0 = M_j^0; else C_j(M_j^0)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """What differs between runs; leaves have a leading axis of lanes.

    Attributes:
      workers: `Quadratics.workers` of each layer.
      starts: X^0 of each layer.
      rates: γ_i or t_i, (lanes, layers).
      decays: 1 − β, (lanes,). Without noise there is no momentum.
      sigmas: σ_i, (lanes, layers). The noise is Gaussian, of root mean square length σ_i.
      seeds: of noise and compressors, (lanes,), integers.
    """

    workers: tuple[Any, ...]
    starts: tuple[Any, ...]
    rates: Any
    decays: Any
    sigmas: Any
    seeds: Any


jax.tree_util.register_dataclass(Lanes)


def dual_norms(method: Method, lanes: Lanes, iterates: int, *, chunk: int = 32):
    """‖∇_i f(X^k)‖_* for k < `iterates`: a float64 array (iterates, lanes, layers)."""
    lanes = jax.tree.map(_as_jax, lanes)
    carry = _init(method, lanes)
    parts = []
    for begin in range(0, iterates, chunk):
        carry, norms = _advance(method, lanes, carry, begin, chunk)
        parts.append(np.asarray(norms, np.float64))
    return np.concatenate(parts)[:iterates]


def _as_jax(leaf):
    leaf = np.asarray(leaf)
    return jnp.asarray(leaf, jnp.int32 if np.issubdtype(leaf.dtype, np.integer) else float)


def _optimizer(method, lane):
    feedback = ef21.ef21(method.uplinks)
    step = ef21.sharp_step if method.sharp else ef21.lmo_step
    rates = optax.stateless(lambda steps, _: tuple(map(jnp.multiply, lane.rates, steps)))
    momentum = [ef21.worker_momentum(lane.decays)] if method.noisy else []
    return ef21.distribute(
        worker=feedback.after(*momentum),
        server=optax.chain(feedback.server, step(method.norms, 1.0), rates),
        downlink=None if method.downlinks is None else ef21.ef21_p(method.downlinks),
        axis_name="workers",
        seed=lane.seeds,
    )


def _loss(params, worker):
    return sum(map(Quadratics.loss, params, worker))


def _gradient(params, batch):
    worker, noise = batch
    exact = jax.grad(_loss)(params, worker)
    return jax.tree.map(jnp.add, exact, noise) if noise else exact


def _batch(method, lane, k):
    """What the workers are given in round k: their functions, and their noise."""
    if not method.noisy:
        return lane.workers, ()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), lane.seeds), k)
    n = len(jax.tree.leaves(lane.workers)[0])
    shapes = [x.shape for x in lane.starts]
    sizes = [n * x.size for x in lane.starts]
    drawn = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return lane.workers, tuple(
        sigma / (x.size // n) ** 0.5 * x.reshape(n, *shape)
        for sigma, x, shape in zip(lane.sigmas, drawn, shapes, strict=True)
    )


@functools.partial(jax.jit, static_argnums=0)
def _init(method, lanes):
    def one_lane(lane):
        n = len(jax.tree.leaves(lane.workers)[0])
        tx = _optimizer(method, lane)
        state = ef21.replicate(tx.init(lane.starts), n)
        if method.warm:
            # The first round has the same noise, so that it leaves M and G as they are.
            gradients = jax.vmap(_gradient, in_axes=(None, 0))(lane.starts, _batch(method, lane, 0))
            state = ef21.warm_start(tx, state, gradients)
        return lane.starts, state

    return jax.vmap(one_lane)(lanes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _advance(method, lanes, carry, begin, chunk):
    def one_lane(lane, carry):
        tx = _optimizer(method, lane)

        def one_worker(params, state, batch):
            updates, state = tx.update(_gradient(params, batch), state, params)
            return optax.apply_updates(params, updates), state, None

        def one_round(carry, k):
            model = ef21.server_params(tx, *carry)  # X^k: the guarantee is for it
            gradients = jax.vmap(jax.grad(_loss), in_axes=(None, 0))(model, lane.workers)
            *carry, _ = ef21.spmd(one_worker)(*carry, _batch(method, lane, k))
            return tuple(carry), jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

        return jax.lax.scan(one_round, carry, begin + jnp.arange(chunk))

    carry, gradients = jax.vmap(one_lane, out_axes=(0, 1))(lanes, carry)
    norms = [norm.dual(g) for norm, g in zip(method.norms, gradients, strict=True)]
    return carry, jnp.stack(norms, axis=-1)
