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
        for group in reversed(self._groups):
            row = self._cut(lambda x, group=group: _axes.gather(x, group), group, row)
        return row.reshape(-1, length)

    def exchange(self, rows: jax.Array) -> jax.Array:
        """Row j to worker j: (n, length) -> (n, length), row i from worker i."""
        rows = self._by_group(rows)
        for axis, group in enumerate(self._groups):

            def swap(x, axis=axis, group=group):
                return lax.all_to_all(x, group, axis, axis, tiled=True)

            rows = self._cut(swap, group, rows)
        return rows.reshape(-1, rows.shape[-1])

    def mean(self, row: jax.Array) -> jax.Array:
        """The mean of all workers' rows: (length,) -> (length,)."""
        for group in reversed(self._groups):
            row = self._cut(lambda x, group=group: lax.pmean(x, group), group, row)
        return row

    def scatter(self, rows: jax.Array) -> jax.Array:
        """The mean of all workers' rows j, at worker j: (n, length) -> (length,)."""
        count, length = rows.shape
        rows = self._by_group(rows)
        for axis, group in reversed(list(enumerate(self._groups))):

            def add(x, axis=axis, group=group):  # tiled: else vmap may lose its axis, in jax 0.10
                return lax.psum_scatter(x, group, scatter_dimension=axis, tiled=True)

            rows = self._cut(add, group, rows)
        return rows.reshape(length) / jnp.asarray(count, rows.dtype)

    @property
    def _groups(self):
        """Outermost first. Sums begin with the last: lanes are added up before a device sends."""
        return _axes.together(self.axis_name)

    def _by_group(self, rows):
        sizes = map(_axes.worker_count, self._groups)
        return rows.reshape(*sizes, rows.shape[-1])

    def _cut(self, collective: Callable, group: tuple[str, ...], row: jax.Array) -> jax.Array:
        """`collective` over `group`, of a piece of the last axis on each device of a worker."""
        if row.size == 0:
            return jnp.zeros(jax.eval_shape(collective, row).shape, row.dtype)
        manual, automatic = _axes.names(self.inside), _left_to_the_compiler(group)
        pieces = _axes.worker_count(self.inside) * math.prod(automatic.values())
        if pieces == 1:
            return collective(row)
        length = row.shape[-1]
        wide = -(-length // pieces)
        row = jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, pieces * wide - length)])
        if automatic:
            collective = _over_mesh(collective, group, tuple(automatic))
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


def _over_mesh(collective, group, automatic):
    def wrapped(row):
        result = jax.eval_shape(collective, row)
        last = [P(*(None,) * (x.ndim - 1), automatic) for x in (row, result)]
        return jax.shard_map(
            collective,
            in_specs=last[0],
            out_specs=last[1],
            axis_names=set(automatic),
            check_vma=all(map(_axes.is_tracked, group)),
        )(row)

    return wrapped


def _left_to_the_compiler(group):
    """The mesh's axes that are not manual, with their sizes, where those of `group` are."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(group) <= set(mesh.manual_axes):
        return {}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        axis: mesh.shape[axis]
        for axis, kind in types.items()
        if kind != AxisType.Manual and mesh.shape[axis] > 1
    }
