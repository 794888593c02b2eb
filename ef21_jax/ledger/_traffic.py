"""What a worker's network carries of the messages, which depends on how many workers there are.

Where several workers are lanes of a device, it is the device that sends: the messages of all of
them, but one for all where messages are added up.
"""

import dataclasses

import optax

from .._distributed import Distributed, check_distributed
from .._tables import table


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one step on one worker's network. Prints as a table.

    Attributes:
      num_workers: n.
      brought: what the worker, or the device that has several, brings to the collectives, by their
        kind.
      lanes: workers on a device.
    """

    num_workers: int
    brought: dict[str, int]
    lanes: int = 1

    @property
    def sent(self) -> float:
        """What the worker sends, of which it receives as much, by the usual ring algorithms."""
        return sum(self._sent(kind) for kind in self.brought)

    def _sent(self, kind):
        n = self.num_workers // self.lanes  # that take part
        times = {
            "all-gather": n - 1,  # its own, and those of all others but one
            "all-to-all": (n - 1) / n,
            "reduce-scatter": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
        }
        return times[kind] * self.brought[kind]

    def __str__(self):
        rows = [
            (kind, f"{size:,}", f"{self._sent(kind):,.0f}") for kind, size in self.brought.items()
        ]
        on_each = f", {self.lanes} on a device" if self.lanes > 1 else ""
        total = (f"total, {self.num_workers} workers{on_each}", "", f"{self.sent:,.0f}")
        return table(("collective", "brought", "sent"), [*rows, total], right=2)


_ADDED_UP = ("all-reduce", "reduce-scatter")


def traffic(
    tx: Distributed, params: optax.Params, num_workers: int | None = None, *, lanes: int = 1
) -> Traffic:
    """What the network of one of `num_workers` carries in a step of `tx`.

    Layers that a sharded server lacks to divide them are sent too, as zeros, and counted.

    Args:
      tx: one of our optimizers, or `distribute` itself, with an axis of workers.
      params: arrays or `jax.ShapeDtypeStruct`s.
      num_workers: not needed for a sharded server.
      lanes: how many of the workers are lanes of one device, whose network it is then.

    Raises:
      ValueError: for a transformation that is not made by `distribute`; without a number of workers
        that fits the topology; for lanes that do not divide it.
    """
    check_distributed(tx)
    owners = tx.topology.owners
    n = owners if num_workers is None and owners > 1 else num_workers
    if n is None or n < 1 or owners not in (1, n):
        raise ValueError(f"`num_workers` must be a number that fits {tx.topology}, got {n}.")
    if lanes < 1 or n % lanes:
        raise ValueError(f"`lanes` must divide the {n} workers, got {lanes}.")
    brought = {
        kind: size if kind in _ADDED_UP else lanes * size
        for kind, size in tx.traffic(params).items()
    }
    return Traffic(n, brought, lanes)
