"""What a compiled program sends, by collective."""

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from .. import _axes, _collectives
from .._axes import AxisName
from .._collectives import Collective
from .._tables import shape_name, table


@dataclasses.dataclass(frozen=True)
class CollectiveLedger:
    """Bytes that the collectives of a compiled program send in a run. Prints as a table.

    Totals add up the busiest device (or worker) of each row, and every branch of a condition.
    """

    rows: tuple[Collective, ...]

    @property
    def sent(self) -> int:
        """Bytes that each device sends."""
        return _total(self.rows, "sent")

    @property
    def crossing(self) -> int:
        """Bytes that each device sends to devices of other workers."""
        return _total(self.rows, "crossing")

    @property
    def sent_per_worker(self) -> int:
        """Bytes that all devices of a worker together send to other workers.

        Here it shows where the devices of a worker repeat one another: a payload that each of f
        sends whole counts f times.
        """
        return _total(self.rows, "sent_per_worker")

    @property
    def by_kind(self) -> dict[str, int]:
        """`sent`, for each kind of collective that there is."""
        kinds = sorted({row.kind for row in self.rows})
        return {
            kind: _total([row for row in self.rows if row.kind == kind], "sent") for kind in kinds
        }

    def __str__(self):
        counts = ("sent", "crossing", "sent_per_worker")
        rows = [
            (
                row.kind,
                _arrays(row),
                row.source.rpartition("/")[2] or row.op_name,
                f"{row.operand_bytes:,}",
                str(row.group_size),
                ("≤ " if row.conditional else "") + _count(row.executions),
                *(_count(getattr(row, name)) for name in counts),
            )
            for row in self.rows
        ]
        totals = (
            None if any(getattr(row, name) is None for row in self.rows) else getattr(self, name)
            for name in counts
        )
        head = ("kind", "operands", "source", "bytes", "group", "times", "sent", "crossing")
        total = ("total", "", "", "", "", "", *map(_count, totals))
        return table((*head, "per worker"), [*rows, total], right=6)


def _total(rows, name):
    for row in rows:
        if getattr(row, name) is None:
            raise ValueError(
                f"How often a loop runs is not known, nor what its {row.kind} at "
                f"{row.source or row.op_name} sends: {row.operand_bytes} bytes each time."
            )
    return sum(getattr(row, name) for row in rows)


def _count(number):
    return "?" if number is None else f"{number:,}"


def _arrays(row):
    names = [
        f"{dtype} {shape_name(shape)}" for dtype, shape in zip(row.dtypes, row.shapes, strict=True)
    ]
    return ", ".join(names if len(names) < 3 else [names[0], f"… ({len(names)})"])


def collective_bytes(
    compiled: Any, mesh: Mesh | AbstractMesh | None = None, axis_name: AxisName = None
) -> CollectiveLedger:
    """What the collectives of a compiled program send, read from its HLO.

    A device of a group of g sends, with an operand of b bytes: (g - 1) b in an all-gather,
    (g - 1)/g b in an all-to-all or a reduce-scatter, twice that in an all-reduce, b in a
    permutation, (g - 1) b from the root of a broadcast, and at most b in a ragged all-to-all,
    rounded up to whole bytes. To the c members of a group that belong to other workers it sends
    c/(g - 1) of that.

    Unlike the message arrays this shows what the compiler makes of them: floats that it widens,
    and, where axes are left to the partitioner, payloads that every inner device repeats.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or the text of its HLO.
      mesh: that of the program, in the order of its devices. Without it every device is a worker.
      axis_name: the workers' axis of the mesh, or axes. Devices with the same place along it are
        one worker.

    Raises:
      ValueError: for a line of HLO that may send and is not understood, or a mesh that is not the
        program's.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    workers = _workers(_collectives.device_count(text), mesh, axis_name)
    return CollectiveLedger(_collectives.read(text, workers))


def _workers(devices, mesh, axis_name):
    """To which worker each device belongs."""
    if mesh is None and axis_name is None:
        return list(range(devices))
    names = _axes.names(axis_name)
    if mesh is None or not names or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            "`mesh` and `axis_name` come together, and the second names axes of the first: got "
            f"{axis_name!r} of {None if mesh is None else mesh.axis_names}."
        )
    if mesh.size != devices:
        raise ValueError(f"The program has {devices} devices, the mesh {mesh.size}.")
    places = dict(zip(mesh.axis_names, np.indices(mesh.axis_sizes), strict=True))
    sizes = tuple(mesh.shape[name] for name in names)
    return np.ravel_multi_index([places[name] for name in names], sizes).ravel().tolist()
