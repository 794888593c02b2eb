"""Whether a compiled program sends what the ledger says, and nothing else."""

import math
from typing import Any

import optax
from jax.sharding import AbstractMesh, Mesh

from .. import _axes
from .._axes import AxisName
from .._distributed import Distributed, check_distributed
from ._compiled import CollectiveLedger, collective_bytes
from ._traffic import traffic


_SMALL = 1024  # bytes: losses and counters, but nothing that scales with a layer


def audit(
    compiled: Any,
    tx: Distributed,
    params: optax.Params,
    *,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "workers",
    num_workers: int | None = None,
    steps: int = 1,
) -> CollectiveLedger:
    """Verifies that a compiled training step sends the messages of `tx` and no more.

    What counts is what leaves a worker: all that its devices send to those of other workers. Where
    a device has several workers it is what leaves the device. A kilobyte a step is allowed beside
    the messages, for a mean loss and the like.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`, or the text of its HLO.
      tx: one of our optimizers, or `distribute` itself; of a chain, that part.
      params: arrays or `jax.ShapeDtypeStruct`s.
      mesh: that of the program.
      axis_name: as in `distribute`: the workers' axis of the mesh, or axes, and last the name of
        the lanes, if a device has several workers.
      num_workers: as in `replicate`. Needed where there are lanes and no sharded server, since
        neither mesh nor program say how many.
      steps: how many steps a run of the program takes.

    Returns:
      The program's collectives. Prints as a table.

    Raises:
      ValueError: where more travels, naming the collectives; or where one stands under a condition
        that the data decide, or in a loop of unknown length: workers that disagree on it hang; for
        a number of workers that does not fit the mesh.
    """
    check_distributed(tx)
    names = _axes.names(axis_name)
    on_mesh = names[:-1] if names and names[-1] not in mesh.axis_names else names
    found = collective_bytes(compiled, mesh, on_mesh or axis_name)
    for row in found.rows:
        if row.crossing != 0 and (row.conditional or row.executions is None):
            raise ValueError(
                f"The {row.kind} at {row.source or row.op_name} runs only if the data say so: "
                "workers that decide differently wait for each other for ever. Communicate outside "
                "of `lax.cond` and `lax.while_loop`."
            )
    devices = math.prod(mesh.shape[name] for name in on_mesh)
    lanes = _lanes(tx, devices, num_workers, on_mesh != names)
    expected = steps * traffic(tx, params, lanes * devices, lanes=lanes).sent
    if found.sent_per_worker > expected + steps * _SMALL:
        largest = sorted(found.rows, key=lambda row: row.sent_per_worker, reverse=True)[:5]
        listed = "; ".join(
            f"{row.kind} of {row.operand_bytes:,} bytes, {row.executions} times, at "
            f"{row.source or row.op_name or 'unknown source'}"
            for row in largest
        )
        sender = "A worker" if lanes == 1 else f"A device of {lanes} workers"
        raise ValueError(
            f"{sender} sends {found.sent_per_worker:,} bytes in a run of this program, and its "
            f"messages are {expected:,.0f}. Is a gradient averaged outside of the optimizer, are "
            "arrays split over the workers that should be whole, or has a device more workers than "
            f"`axis_name` and `num_workers` say? The largest: {listed}."
        )
    return found


def _lanes(tx, devices, num_workers, named):
    """How many workers there are on each of `devices`."""
    if num_workers is None and tx.topology.owners > 1:
        num_workers = tx.topology.owners
    if num_workers is None and not named:
        num_workers = devices
    if num_workers is None or num_workers < 1 or num_workers % devices:
        raise ValueError(
            f"`num_workers` must be a multiple of {devices}, the places of the mesh along the axes "
            f"of the workers, got {num_workers}."
        )
    return num_workers // devices
