"""Text as bytes: a batch is a pure function of (seed, step, worker).

Nothing is downloaded. The default text is Python's own standard library, which is on every machine
that can run this; its bytes depend on the Python version, so its digest is recorded.
"""

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import pathlib
import sysconfig
import zlib

import numpy as np


_SKIPPED = {
    *("dist-packages", "site-packages"),  # not Python's own, and other on every machine
    *("idle_test", "test", "tests"),  # not everywhere installed
    *("encodings", "pydoc_data"),  # tables
}
_COMPRESSED = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_TEST_EVERY = 20  # every 20th file, or the last 20th of a single file, is for testing


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and test text, uint8 arrays of one axis, and where they came from."""

    train: np.ndarray
    test: np.ndarray
    name: str
    digest: str  # the first 16 hex digits of the SHA-256 of both

    vocab_size = 256

    def batches(self, steps, workers, num_workers, *, seed, size, length):
        """Random windows of each worker's own part of the text, others in each step.

        Returns:
          (workers, steps, size, length + 1) uint8: inputs and, one later, targets.

        Raises:
          ValueError: where a worker's part is not longer than a window.
        """
        part = self.train.size // num_workers
        if min(part, self.test.size) <= length:
            raise ValueError(
                f"The text {self.name!r} gives each of {num_workers} workers {part} bytes to train "
                f"on and leaves {self.test.size} for testing, which must be more than the sequence "
                f"length {length}: take a longer text, fewer workers or a shorter sequence."
            )
        starts = [
            worker * part
            + np.random.default_rng((seed, worker, step)).integers(part - length, size=size)
            for worker in workers
            for step in steps
        ]
        return self._windows(self.train, np.concatenate(starts), length).reshape(
            len(workers), len(steps), size, length + 1
        )

    def held_out(self, size, length):
        """(size, length + 1) uint8: windows evenly spread over the test text, always the same."""
        starts = np.linspace(0, self.test.size - length - 1, size).astype(np.int64)
        return self._windows(self.test, starts, length)

    def describe(self):
        """Enough to tell two texts apart in a record."""
        sizes = {"train_bytes": self.train.size, "test_bytes": self.test.size}
        return {"name": self.name, "sha256": self.digest} | sizes

    @staticmethod
    def _windows(text, starts, length):
        return text[starts[:, None] + np.arange(length + 1)]


def standard_library() -> Text:
    """The sources of Python's standard library."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = [path for path in paths if not _SKIPPED & set(path.parts)]
    paths.sort(key=lambda path: path.parts)  # an order that no file system has a say in
    if len(paths) < _TEST_EVERY:
        raise ValueError(
            f"Found {len(paths)} source files of the standard library, which is too few to train "
            f"on (is it in a zip?): pass a text of your own with --text FILE."
        )
    texts = [(root / path).read_bytes() for path in paths]
    test = texts[_TEST_EVERY - 1 :: _TEST_EVERY]
    train = [text for i, text in enumerate(texts, start=1) if i % _TEST_EVERY]
    return _text(b"\n".join(train), b"\n".join(test), "the standard library")


def single_file(path: pathlib.Path) -> Text:
    """A file's bytes, the last 20th of them for testing; of a compressed one what it holds."""
    if not path.is_file():
        raise ValueError(
            f"There is no text file {str(path)!r}: --text takes the path of one file, or of a "
            "folder of token files."
        )
    name = path.stem if path.suffix in _COMPRESSED else path.name
    if name.endswith(".bin"):
        raise ValueError(
            f"{str(path)!r} are tokens, which are mapped and not read: unpack the file."
        )
    with _COMPRESSED.get(path.suffix, open)(path, "rb") as file:
        try:
            text = file.read()
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(
                f"{str(path)!r} cannot be read: {error}. Get the file anew."
            ) from error
    cut = len(text) - len(text) // _TEST_EVERY
    return _text(text[:cut], text[cut:], name)


def _text(train, test, name):
    digest = hashlib.sha256(train + test).hexdigest()[:16]
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8), name, digest)
