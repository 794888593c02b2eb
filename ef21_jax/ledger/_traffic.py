"""What a worker's network carries of the messages, which depends on how many workers there are."""

import dataclasses

import optax

from .._distributed import Distributed, check_distributed
from .._tables import table


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one step on one worker's network. Prints as a table.

    Attributes:
      num_workers: n.
      brought: what the worker brings to the collectives, by their kind.
    """

    num_workers: int
    brought: dict[str, int]

    @property
    def sent(self) -> float:
        """What the worker sends, of which it receives as much, by the usual ring algorithms."""
        return sum(self._sent(kind) for kind in self.brought)

    def _sent(self, kind):
        n = self.num_workers
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
        total = (f"total, {self.num_workers} workers", "", f"{self.sent:,.0f}")
        return table(("collective", "brought", "sent"), [*rows, total], right=2)


def traffic(tx: Distributed, params: optax.Params, num_workers: int | None = None) -> Traffic:
    """What the network of one of `num_workers` carries in a step of `tx`.

    Layers that a sharded server lacks to divide them are sent too, as zeros, and counted.

    Args:
      tx: one of our optimizers, or `distribute` itself, with an axis of workers.
      params: arrays or `jax.ShapeDtypeStruct`s.
      num_workers: not needed for a sharded server.

    Raises:
      ValueError: for a transformation that is not made by `distribute`; without a number of workers
        that fits the topology.
    """
    check_distributed(tx)
    owners = tx.topology.owners
    n = owners if num_workers is None and owners > 1 else num_workers
    if n is None or n < 1 or owners not in (1, n):
        raise ValueError(f"`num_workers` must be a number that fits {tx.topology}, got {n}.")
    return Traffic(n, tx.traffic(params))
