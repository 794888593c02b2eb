"""Where tokens come from: text as bytes, or files of tokens; one interface for both.

A corpus gives batches as a function of seed, step and worker, so that a run that is stopped can go
on, and that a process reads only what its own workers train on.
"""

import pathlib
from typing import Any, Protocol

import numpy as np

from experiments.data import shards, text


class Corpus(Protocol):
    """What training needs to know of its data."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token there can be."""

    def batches(
        self, steps: range, workers: range, num_workers: int, *, seed: int, size: int, length: int
    ) -> np.ndarray:
        """(workers, steps, size, length + 1) of an unsigned integer type."""

    def held_out(self, size: int, length: int) -> np.ndarray:
        """(size, length + 1): of the text for testing, always the same."""

    def describe(self) -> dict[str, Any]:
        """Enough to tell two corpora apart in a record."""


def load(path: str | pathlib.Path | None = None) -> Corpus:
    """A folder of token files, or one of them (`*.bin`), or any other file as bytes.

    Of a text compressed as `*.xz`, `*.gz` or `*.bz2`, those of the text.

    None: the sources of Python's standard library, which need no download.

    Raises:
      ValueError: where there is nothing of the kind, or a file is not what its name says.
    """
    if path is None:
        return text.standard_library()
    path = pathlib.Path(path)
    if path.is_dir() or path.suffix == ".bin":
        return shards.load(path)
    return text.single_file(path)
