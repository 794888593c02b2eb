"""Collectives between workers, in which every byte leaves its worker once.

A worker may be several devices, which all have the same messages. Were each to send them, they
would travel as many times. So each sends a piece, and they share what they receive among
themselves. Rows travel, arrays whose last axis may be cut anywhere.

The devices of a worker are named by the mesh: they are its axes that are not the workers'. Inside
a `shard_map` over those too, every device does its part by its own number; where they are left to
the compiler, a `shard_map` around the collective makes it. (Without, the compiler has each device
send the whole: the operand of a collective of ours is replicated before it.)
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from . import _axes
from ._axes import AxisName


@dataclasses.dataclass(frozen=True)
class Links:
    """Between the workers of `axis_name`, each of which is all devices of `inside`.

    Attributes:
      axis_name: the axis, or axes outermost first, of the workers.
      inside: the axes over which a worker's own devices are mapped, all with the same messages.
    """

    axis_name: AxisName
    inside: AxisName = None

    def gather(self, row: jax.Array) -> jax.Array:
        """Every worker's row: (length,) -> (n, length)."""
        (length,) = row.shape
        for name in reversed(self._names):  # one by one: no gather mixes a vmap and a mesh axis
            row = self._cut(lambda x, name=name: _axes.gather(x, name), name, row)
        return row.reshape(-1, length)

    def exchange(self, rows: jax.Array) -> jax.Array:
        """Row j to worker j: (n, length) -> (n, length), row i from worker i."""
        sizes = [lax.axis_size(name) for name in self._names]
        rows = rows.reshape(*sizes, rows.shape[-1])
        for axis, name in enumerate(self._names):

            def swap(x, axis=axis, name=name):
                return lax.all_to_all(x, name, axis, axis, tiled=True)

            rows = self._cut(swap, name, rows)
        return rows.reshape(-1, rows.shape[-1])

    def mean(self, row: jax.Array) -> jax.Array:
        """The mean of all workers' rows: (length,) -> (length,)."""
        for name in self._names:
            row = self._cut(lambda x, name=name: lax.pmean(x, name), name, row)
        return row

    def scatter(self, rows: jax.Array) -> jax.Array:
        """The mean of all workers' rows j, at worker j: (n, length) -> (length,)."""
        sizes = [lax.axis_size(name) for name in self._names]
        rows = rows.reshape(*sizes, rows.shape[-1])
        for name in self._names:
            rows = self._cut(lambda x, name=name: lax.psum_scatter(x, name), name, rows)
        return rows / jnp.asarray(math.prod(sizes), rows.dtype)

    @property
    def _names(self):
        return _axes.names(self.axis_name)

    def _cut(self, collective: Callable, name: str, row: jax.Array) -> jax.Array:
        """`collective` over `name`, of a piece of the last axis on each device of a worker."""
        if row.size == 0:
            return jnp.zeros(jax.eval_shape(collective, row).shape, row.dtype)
        manual, automatic = _axes.names(self.inside), _left_to_the_compiler(name)
        pieces = _axes.worker_count(self.inside) * math.prod(automatic.values())
        if pieces == 1:
            return collective(row)
        length = row.shape[-1]
        wide = -(-length // pieces)
        row = jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, pieces * wide - length)])
        if automatic:
            collective = _over_mesh(collective, name, tuple(automatic))
        if manual:
            collective = _over_devices(collective, self.inside)
        return collective(row)[..., :length]


def _over_devices(collective, inside):
    def wrapped(row):
        wide = row.shape[-1] // _axes.worker_count(inside)
        start = _axes.worker_index(inside) * wide
        piece = collective(lax.dynamic_slice_in_dim(row, start, wide, axis=-1))
        pieces = _axes.gather(piece, inside)  # (devices, ..., wide)
        return jnp.moveaxis(pieces, 0, -2).reshape(*piece.shape[:-1], -1)

    return wrapped


def _over_mesh(collective, name, automatic):
    def wrapped(row):
        result = jax.eval_shape(collective, row)
        last = [P(*(None,) * (x.ndim - 1), automatic) for x in (row, result)]
        return jax.shard_map(
            collective,
            in_specs=last[0],
            out_specs=last[1],
            axis_names=set(automatic),
            check_vma=_axes.is_tracked(name),
        )(row)

    return wrapped


def _left_to_the_compiler(name):
    """The mesh's axes that are not manual, with their sizes, where `name` is one that is."""
    mesh = jax.sharding.get_abstract_mesh()
    if name not in mesh.manual_axes:
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis: mesh.shape[axis]
        for axis, kind in types.items()
        if kind != AxisType.Manual and mesh.shape[axis] > 1
    }
