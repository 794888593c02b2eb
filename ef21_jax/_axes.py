"""The worker axis: one name, or several, of a vmap, a pmap or a mesh.

In `shard_map` with `check_vma=True` JAX types every array by the axes over which it varies. That
is what lets us tell local gradients from already summed ones, and what an all-gather must keep
right. Under vmap, pmap and `check_vma=False` there are no such types, and nothing to keep.
"""

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._settings import path_name


AxisName = str | tuple[str, ...] | None


def names(axis_name: AxisName) -> tuple[str, ...]:
    """The axis names as a tuple, outermost first. Empty for None: one worker, alone."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def check_bound(axis_name: AxisName) -> None:
    """Raises a `ValueError` unless something that maps over `axis_name` is being traced."""
    for name in names(axis_name):
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"The worker axis {name!r} is not bound here. Map the step over the workers, "
                f"ef21_jax.spmd(step, axis_name={axis_name!r}), or by a vmap, pmap or shard_map "
                "of that axis name; or pass axis_name=None to train with a single worker."
            ) from error


_inside: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("inside", default=())


@contextlib.contextmanager
def mapped_inside(axis_name: AxisName) -> Iterator[None]:
    """While a step is traced: each device along `axis_name` has a batch of its worker's."""
    token = _inside.set(names(axis_name))
    try:
        yield
    finally:
        _inside.reset(token)


def check_inside(mean_axis_name: AxisName) -> None:
    """Raises a `ValueError` where `mapped_inside` names axes that `mean_axis_name` does not."""
    missing = [name for name in _inside.get() if name not in names(mean_axis_name)]
    if missing:
        raise ValueError(
            f"The step is mapped over the devices of a worker, `mean_axis_name={missing}`, and the "
            "optimizer does not know of it: each would train on a batch of its own, and they would "
            "drift apart. Pass the same `mean_axis_name` to the optimizer, which averages."
        )


def worker_count(axis_name: AxisName) -> int:
    """How many workers there are. Static."""
    return math.prod(lax.axis_size(name) for name in names(axis_name))


def worker_index(axis_name: AxisName) -> jax.Array | int:
    """This worker's number, the outermost axis counting slowest."""
    return lax.axis_index(names(axis_name)) if names(axis_name) else 0


def together(axis_name: AxisName) -> list[tuple[str, ...]]:
    """The names, outermost first, in groups that one collective takes each.

    Over the axes of a mesh one collective sends less than one for each. None takes a vmap axis and
    another one.
    """
    manual = _of_a_mesh(axis_name)
    groups = itertools.groupby(names(axis_name), lambda name: None if name in manual else name)
    return [tuple(group) for _, group in groups]


def is_wired(axis_name: AxisName) -> bool:
    """Whether any is the axis of a mesh, between whose devices something is sent."""
    return bool(_of_a_mesh(axis_name))


def _of_a_mesh(axis_name):
    return set(names(axis_name)) & set(jax.sharding.get_abstract_mesh().manual_axes)


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Every worker's `x`, stacked along a new leading axis of length `worker_count`."""
    shape = x.shape
    for group in reversed(together(axis_name)):
        if x.size == 0:
            x = jnp.zeros((worker_count(group), *x.shape), x.dtype)
        elif all(map(is_tracked, group)):
            # The plain gather is typed as varying, though every worker has the same; a pmean to
            # mend that would be a dense all-reduce.
            x = lax.all_gather(x, group, to="invarying")
        else:
            x = lax.all_gather(x, group)
    return x.reshape(-1, *shape)


def varying(tree: Any, axis_name: AxisName) -> Any:
    """`tree`, typed as each worker's own. Differentiate with respect to this in a `shard_map`.

    With `check_vma=True`, the gradient with respect to *shared* parameters is the sum over the
    workers: dense bytes have then travelled already. With respect to `varying(params, axis)` it is
    each worker's own. Call it outside of the function that is differentiated. Does nothing
    elsewhere, nor to what varies already; `spmd` needs none of it.
    """

    def cast(leaf):
        for name in names(axis_name):
            if is_tracked(name) and name not in _varying_axes(leaf):
                leaf = lax.pcast(leaf, name, to="varying")
        return leaf

    return jax.tree.map(cast, tree)


def check_local(gradients: Any, axis_name: AxisName) -> None:
    """Raises a `ValueError` for gradients whose type says that they were summed already."""
    for name in names(axis_name):
        if not is_tracked(name):
            continue
        summed = [
            path_name(path)
            for path, leaf in jax.tree.leaves_with_path(gradients)
            if name not in _varying_axes(leaf)
        ]
        if summed:
            raise ValueError(
                f"Gradients are the same on every worker of axis {name!r}, hence already summed "
                f"over it: {', '.join(summed)}. Each worker must bring its own: differentiate with "
                f"respect to ef21_jax.varying(params, {axis_name!r}), and do not average the loss "
                "or the gradients."
            )


def is_tracked(name: str) -> bool:
    """Whether types say what varies over the axis: in `shard_map` with `check_vma=True`."""
    return name in _varying_axes(lax.axis_index(name))


def _varying_axes(x):
    return frozenset(jax.typeof(x).manual_axis_type.varying)
