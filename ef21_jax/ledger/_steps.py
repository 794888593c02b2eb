"""The messages of a step, by leaf and direction: exact bytes, from the message arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from .._conventions import PaperConvention, information_bits
from .._distributed import Distributed, check_distributed
from .._messages import is_message, wire_bits
from .._settings import path_name
from .._tables import shape_name, table


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
