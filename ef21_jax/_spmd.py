"""A step written for one worker, mapped over lanes of a device, over devices, or both."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from . import _axes
from ._axes import AxisName
from ._state import map_per_worker, state_axes


def spmd(
    step: Callable,
    *,
    axis_name: AxisName = "workers",
    mean_axis_name: AxisName = None,
    mesh: Mesh | None = None,
) -> Callable:
    """Maps `step(*carry, batch) -> (*carry, aux)`, written for one worker, over all of them.

    `carry` is e.g. `(params, state)`, or one Flax `TrainState`. In it, the workers' part of the
    optimizer's state has a leading axis of workers (`replicate`), all else is shared. `batch` and
    `aux` have a leading axis of workers throughout; with `mean_axis_name`, of all devices of all
    workers, worker by worker.

    Args:
      step: one worker's step. It calls `tx.update` with its own gradients.
      axis_name: as in `distribute`. Without a mesh, one name: the workers are lanes of a vmap.
        With a mesh, those of the names that it has are its axes, manual in a `shard_map`; one more
        name is that of the lanes within a device, so n workers run on any number of devices that
        divides n: `("devices", "lanes")`.
      mean_axis_name: as in `distribute`: the axes of the mesh for the devices within a worker, each
        with a batch of its own. Devices along axes that are named nowhere share one worker's
        arrays, by the compiler; where all axes are Explicit these lie after a step as before it.
      mesh: the devices.

    Returns:
      A function to be jitted by the caller, who may donate the carry.

    Raises:
      ValueError: for axis names that fit neither case; when called, for a number of workers that
        does not fit, or a state for another one.
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
    inside = _axes.names(mean_axis_name)
    if inside and (lanes or mesh is None or not set(inside) <= set(mesh.axis_names) - set(names)):
        raise ValueError(
            f"`mean_axis_name` must name other axes of the mesh than `axis_name`, {axis_name!r}, "
            f"and there can be no lanes then, got {mean_axis_name!r}."
        )

    def mapped(*args):
        *carry, batch = args
        rows = _check_workers(batch, mesh, on_mesh + inside, lanes)
        if rows is not None:
            each = 1 if mesh is None else math.prod(mesh.shape[name] for name in inside)
            _check_state(carry, rows // each)
        axes = (*(state_axes(part) for part in carry), 0)
        if lanes:
            inner = jax.vmap(step, in_axes=axes, out_axes=axes, axis_name=lanes[0])
        else:
            inner = _alone_on_its_device(step, inside)
        if mesh is None:
            return inner(*args)
        parts = (state_axes(part, P(on_mesh), P()) for part in carry)
        specs = (*parts, P(on_mesh + inside))
        # With check_vma=True the gradient with respect to shared parameters is a sum over workers,
        # and collectives over a vmap axis do not trace.
        return jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=specs,
            out_specs=specs,
            axis_names=frozenset(on_mesh + inside),
            check_vma=False,
        )(*args)

    return mapped


def _alone_on_its_device(step, inside):
    """Takes the axis of workers, of length one, off the arguments, and puts it on the results."""

    def wrapped(*args):
        *carry, batch = args
        carry = [map_per_worker(lambda x: x[0], part) for part in carry]
        with _axes.mapped_inside(inside):
            *carry, aux = step(*carry, jax.tree.map(lambda x: x[0], batch))
        carry = [map_per_worker(lambda x: x[None], part) for part in carry]
        return (*carry, jax.tree.map(lambda x: jnp.asarray(x)[None], aux))

    return wrapped


def _check_workers(batch, mesh, on_mesh, lanes):
    """How many rows the batch has. None if it has no leaves."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(counts) > 1 or () in counts:
        raise ValueError(
            "Every leaf of the batch must have the same leading axis of workers, got "
            f"{sorted(counts)}."
        )
    if not counts:
        return None
    (workers,), devices = counts.pop(), 1
    if mesh is None:
        return workers
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
    return workers


def _check_state(carry, workers):
    """Raises a ValueError for a state of another number of workers than the batch."""
    counts = set()
    map_per_worker(lambda x: counts.add(jnp.shape(x)[:1]), carry)
    if counts - {(workers,)}:
        raise ValueError(
            f"The batch is for {workers} workers, and what the optimizer's state has of each "
            f"worker has leading axes {sorted(counts)}: `replicate(tx.init(params), {workers})` "
            "makes a state for so many."
        )
