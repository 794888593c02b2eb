"""Runs a method on a problem: many step sizes and starts at once, as lanes of one jitted scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ef21_jax as ef21


def everything(losses, gradients, estimates):
    """What the theorems are about, at one iterate x^k, before its step.

    Args:
      losses: f_i(x^k), (n,).
      gradients: ∇f_i(x^k), (n, d).
      estimates: v_i^k, (n, d), after round k's message; None for a method without any.
    """
    measured = {
        "loss": jnp.mean(losses),
        "squared_gradient": squared_gradient(losses, gradients, estimates)["squared_gradient"],
        "worker_gradient": jnp.mean(jnp.linalg.norm(gradients, axis=1)),
    }
    if estimates is not None:
        squared = jnp.sum(jnp.square(gradients - estimates), axis=1)
        measured |= {"distance": jnp.mean(jnp.sqrt(squared)), "squared_distance": jnp.mean(squared)}
    return measured


def squared_gradient(losses, gradients, estimates):
    """‖∇f(x^k)‖² alone."""
    del losses, estimates
    return {"squared_gradient": jnp.sum(jnp.square(jnp.mean(gradients, axis=0)))}


def descend(
    method,
    problem,
    starts,
    step_sizes,
    iterations,
    *,
    uplink,
    exact=False,
    measure=everything,
    chunk=None,
):
    """Yields what `measure` says of x⁰, …, x^K, in chunks; leaves (lanes, iterates of the chunk).

    A non-finite number anywhere is what the method made of itself, and is left in.

    Args:
      method: `ef21.normalized_ef21`, or any of the same arguments.
      problem: one of `experiments.problems`.
      starts: x⁰, (lanes, d).
      step_sizes: (lanes,).
      iterations: K.
      uplink: the workers' compressor.
      exact: first estimates are the first gradients, v_i^{-1} = ∇f_i(x⁰), else zero.
      measure: like `everything`.
      chunk: iterates of one jitted call; None for all.
    """
    starts, step_sizes = jnp.asarray(starts, float), jnp.asarray(step_sizes, float)
    workers = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.workers)
    settings = {"method": method, "uplink": uplink}
    state = _init(starts, workers, loss=problem.loss, exact=exact, **settings)
    total = iterations + 1
    chunk = min(chunk or total, total)
    carry = starts, state
    for begin in range(0, total, chunk):
        carry, measured = _advance(
            carry,
            workers,
            step_sizes,
            loss=problem.loss,
            measure=measure,
            length=min(chunk, total - begin),
            **settings,
        )
        yield jax.tree.map(np.asarray, measured)


def path(*args, **kwargs):
    """The chunks of `descend` as one: leaves (lanes, K + 1)."""
    chunks = list(descend(*args, **kwargs))
    return {name: np.concatenate([c[name] for c in chunks], axis=1) for name in chunks[0]}


def lanes(*axes):
    """Every combination, each axis as one array over the lanes: the last axis runs fastest."""
    axes = [np.asarray(axis) for axis in axes]
    at = np.meshgrid(*(np.arange(len(axis)) for axis in axes), indexing="ij")
    return [axis[index.ravel()] for axis, index in zip(axes, at, strict=True)]


@functools.partial(jax.jit, static_argnames=("method", "uplink", "loss", "exact"))
def _init(starts, workers, *, method, uplink, loss, exact):
    n = len(jax.tree.leaves(workers)[0])
    tx = method(0.0, uplink=uplink, axis_name="workers")

    def one_lane(x):
        state = ef21.replicate(tx.init(x), n)
        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(x, workers)
        return ef21.warm_start(tx, state, gradients) if exact else state

    return jax.vmap(one_lane)(starts)


@functools.partial(jax.jit, static_argnames=("method", "uplink", "loss", "measure", "length"))
def _advance(carry, workers, step_sizes, *, method, uplink, loss, measure, length):
    def one_lane(carry, step_size):
        tx = method(step_size, uplink=uplink, axis_name="workers")

        def step(x, state, worker):
            value, gradient = jax.value_and_grad(loss)(x, worker)
            update, state = tx.update(gradient, state, x)
            return optax.apply_updates(x, update), state, (value, gradient)

        def one(carry, _):
            x, state, (values, gradients) = ef21.spmd(step)(*carry, workers)
            estimates = optax.tree.get(state.worker, "estimate")
            if estimates is not None:
                estimates = jax.vmap(lambda estimate: tx.unstack(estimate, x))(estimates)
            return (x, state), measure(values, gradients, estimates)

        return jax.lax.scan(one, carry, length=length)

    return jax.vmap(one_lane)(carry, step_sizes)
