"""Whether a compiled program sends what the ledger says, and nothing else."""

from typing import Any

import optax
from jax.sharding import AbstractMesh, Mesh

from .. import _axes
from .._axes import AxisName
from .._distributed import Distributed
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
    steps: int = 1,
) -> CollectiveLedger:
    """Verifies that a compiled training step sends the messages of `tx` and no more.

    What counts is what leaves a worker: all that its devices send to those of other workers. A
    kilobyte a step is allowed beside the messages, for a mean loss and the like.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`, or the text of its HLO.
      tx: one of our optimizers, or `distribute` itself; of a chain, that part.
      params: arrays or `jax.ShapeDtypeStruct`s.
      mesh: that of the program.
      axis_name: the workers' axis of the mesh, or axes.
      steps: how many steps a run of the program takes.

    Returns:
      The program's collectives. Prints as a table.

    Raises:
      ValueError: where more travels, naming the collectives; or where one stands under a condition
        that the data decide, or in a loop of unknown length: workers that disagree on it hang.
    """
    found = collective_bytes(compiled, mesh, axis_name)
    for row in found.rows:
        if row.crossing != 0 and (row.conditional or row.executions is None):
            raise ValueError(
                f"The {row.kind} at {row.source or row.op_name} runs only if the data say so: "
                "workers that decide differently wait for each other for ever. Communicate outside "
                "of `lax.cond` and `lax.while_loop`."
            )
    workers = 1
    for name in _axes.names(axis_name):
        workers *= mesh.shape[name]
    expected = steps * traffic(tx, params, workers).sent
    if found.sent_per_worker > expected + steps * _SMALL:
        largest = sorted(found.rows, key=lambda row: row.sent_per_worker, reverse=True)[:5]
        listed = "; ".join(
            f"{row.kind} of {row.operand_bytes:,} bytes, {row.executions} times, at "
            f"{row.source or row.op_name or 'unknown source'}"
            for row in largest
        )
        raise ValueError(
            f"A worker sends {found.sent_per_worker:,} bytes in a run of this program, and its "
            f"messages are {expected:,.0f}. Is a gradient averaged outside of the optimizer, or "
            f"are arrays split over the workers that should be whole? The largest: {listed}."
        )
    return found
