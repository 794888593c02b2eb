"""What travels in a step: exact bytes, by leaf and direction, from the message arrays.

`bytes_per_step` counts the messages by one convention, `side_by_side` by all three. `traffic` says
what a worker's network carries of them, which depends on how many there are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from ._conventions import (
    PaperConvention as PaperConvention,
    information_bits as information_bits,
    log2_binomial as log2_binomial,
)
from ._distributed import Distributed, check_distributed
from ._messages import is_message, wire_bits
from ._settings import path_name
from ._tables import shape_name, table


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf's bytes in one step, for one worker."""

    path: str
    shape: tuple[int, ...]
    dense: int  # as float32 (float64 for that)
    up: int  # worker -> server
    down: int  # server -> worker


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Bytes of one step, for one worker. Prints as a table.

    `up` is what a worker sends: the arrays of its messages as they are gathered, or the dense
    array where an all-reduce carries it (which moves up to twice that, depending on the ring).
    `down` is the one broadcast that the server owes each worker.
    """

    rows: tuple[Row, ...]

    @property
    def dense(self) -> int:
        """Bytes of the uncompressed gradient."""
        return sum(row.dense for row in self.rows)

    @property
    def up(self) -> int:
        """Bytes a worker sends."""
        return sum(row.up for row in self.rows)

    @property
    def down(self) -> int:
        """Bytes a worker is sent."""
        return sum(row.down for row in self.rows)

    def __str__(self):
        rows = [
            (r.path, shape_name(r.shape), f"{r.dense:,}", f"{r.up:,}", f"{r.down:,}")
            for r in self.rows
        ]
        total = ("total", "", f"{self.dense:,}", f"{self.up:,}", f"{self.down:,}")
        return table(("path", "shape", "dense", "up", "down"), [*rows, total], right=3)


CONVENTIONS: dict[str, Callable[[Any], int]] = {
    "wire": wire_bits,
    "paper": PaperConvention(),
    "information": information_bits,
}


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The same step by each of `CONVENTIONS`. Prints as a table."""

    ledgers: dict[str, Ledger]

    def __getitem__(self, convention: str) -> Ledger:
        return self.ledgers[convention]

    def __str__(self):
        names, ledgers = list(self.ledgers), list(self.ledgers.values())
        head = [f"{way} {name}" for way in ("up", "down") for name in names]
        rows = [
            (of[0].path, shape_name(of[0].shape), *_numbers(of))
            for of in zip(*(ledger.rows for ledger in ledgers), strict=True)
        ]
        total = ("total", "", *_numbers(ledgers))
        return table(("path", "shape", "dense", *head), [*rows, total], right=1 + len(head))


def _numbers(parts):
    counts = (parts[0].dense, *(part.up for part in parts), *(part.down for part in parts))
    return [f"{count:,}" for count in counts]


def side_by_side(tx: Distributed, params: optax.Params) -> SideBySide:
    """The ledgers of `tx` by wire, paper and information. Arguments as of `bytes_per_step`."""
    return SideBySide(
        {name: bytes_per_step(tx, params, convention=c) for name, c in CONVENTIONS.items()}
    )


def bytes_per_step(
    tx: Distributed, params: optax.Params, *, convention: Callable[[Any], int] = wire_bits
) -> Ledger:
    """The ledger of `tx`, one of our optimizers or `distribute` itself.

    Args:
      tx: not wrapped: where it is a part of an `optax.chain`, give the part.
      params: arrays or `jax.ShapeDtypeStruct`s.
      convention: from a message to bits: `ef21_jax.wire_bits`, `PaperConvention()` or
        `information_bits`. Bytes are rounded up, leaf by leaf.

    Raises:
      ValueError: for a transformation that is not made by `distribute`.
    """
    check_distributed(tx)
    up, down = (jax.tree.leaves(side, is_leaf=is_message) for side in tx.messages(params))
    rows = (
        Row(
            path=path_name(path),
            shape=tuple(leaf.shape),
            dense=leaf.size * max(4, leaf.dtype.itemsize),
            up=-(-convention(sent) // 8),
            down=-(-convention(received) // 8),
        )
        for (path, leaf), sent, received in zip(
            jax.tree.leaves_with_path(params), up, down, strict=True
        )
    )
    return Ledger(tuple(rows))


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
