"""Text as bytes, on the device: a batch is a pure function of (seed, step, worker).

Nothing is downloaded. The default text is Python's own standard library, which is on every machine
that can run this; its bytes depend on the Python version, so its digest is recorded.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np


_SKIPPED = {
    *("dist-packages", "site-packages"),  # not Python's own, and other on every machine
    *("idle_test", "test", "tests"),  # not everywhere installed
    *("encodings", "pydoc_data"),  # tables
}
_TEST_EVERY = 20  # every 20th file, or the last 20th of a single file, is for testing
_STREAM = 20_240_520  # keeps these keys apart from those of the model and of the compressors


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and test text, uint8 arrays of one axis, and where they came from."""

    train: jax.Array
    test: jax.Array
    name: str
    digest: str  # the first 16 hex digits of the SHA-256 of both

    def describe(self):
        """Enough to tell two texts apart in a record."""
        sizes = {"train_bytes": self.train.size, "test_bytes": self.test.size}
        return {"name": self.name, "sha256": self.digest} | sizes


def load(path=None) -> Corpus:
    """Reads the file at `path`, or the standard library's sources where it is None."""
    return _standard_library() if path is None else _single_file(pathlib.Path(path))


def shards(corpus, num_workers, length):
    """The training text cut into one contiguous part a worker, (num_workers, size)."""
    size = corpus.train.size // num_workers
    if min(size, corpus.test.size) <= length:
        raise ValueError(
            f"The text {corpus.name!r} gives each of {num_workers} workers {size} bytes to train "
            f"on and leaves {corpus.test.size} for testing, which must be more than the sequence "
            f"length {length}: take a longer text, fewer workers or a shorter sequence."
        )
    return corpus.train[: size * num_workers].reshape(num_workers, size)


def training_batch(shard, worker, step, *, seed, batch_size, length):
    """(batch_size, length + 1) int32: random windows of a worker's own part, another each step."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
    starts = _random_starts(jax.random.fold_in(key, worker), shard, batch_size, length)
    return windows(shard, starts, length)


def held_out_batch(corpus, batch_size, length):
    """(batch_size, length + 1) int32: windows evenly spread over the test text, always the same."""
    starts = np.linspace(0, corpus.test.size - length - 1, batch_size).astype(np.int32)
    return windows(corpus.test, jnp.asarray(starts), length)


def windows(text, starts, length):
    """length + 1 bytes from each start: inputs and, one later, targets."""
    cut = jax.vmap(lambda start: jax.lax.dynamic_slice(text, (start,), (length + 1,)))
    return cut(starts).astype(jnp.int32)


def _random_starts(key, shard, batch_size, length):
    return jax.random.randint(key, (batch_size,), 0, shard.size - length)


def _standard_library():
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
    return _corpus(b"\n".join(train), b"\n".join(test), "the standard library")


def _single_file(path):
    if not path.is_file():
        raise ValueError(f"There is no text file {str(path)!r}: --text takes the path of one file.")
    text = path.read_bytes()
    cut = len(text) - len(text) // _TEST_EVERY
    return _corpus(text[:cut], text[cut:], path.name)


def _corpus(train, test, name):
    digest = hashlib.sha256(train + test).hexdigest()[:16]
    return Corpus(_bytes(train), _bytes(test), name, digest)


def _bytes(text):
    return jnp.asarray(np.frombuffer(text, np.uint8))
