"""Files of tokens as of FineWeb10B: `fineweb_train_000001.bin`, ..., `fineweb_val_000000.bin`.

A file is 256 little-endian int32, of which the first three are 20240520, 1 and the number of
tokens, and then the tokens as uint16: GPT-2's, 50256 in front of each document. Files are
mapped, not read: a step touches its own tokens alone. To have FineWeb10B,

    hf download kjj0/fineweb10B-gpt2 --repo-type dataset --local-dir fineweb10B
"""

import dataclasses
import functools
import itertools
import pathlib

import numpy as np

from experiments import records


MAGIC, VERSION, HEADER = 20240520, 1, 1024  # the last in bytes
_TEST_EVERY = 20  # of a single file, the last 20th is for testing


@dataclasses.dataclass(frozen=True)
class Shards:
    """Token files to train on, in order, and tokens to test on; all uint16."""

    train: tuple[np.ndarray, ...]
    test: np.ndarray
    name: str

    vocab_size = 50_257

    def batches(self, steps, workers, num_workers, *, seed, size, length):
        """As the papers' loaders read: in order, each step the next tokens, worker after worker.

        Of a file's last tokens, those that are too few for all workers are left out; after the
        last file comes the first again. `seed` has no part in it.

        Returns:
          (workers, steps, size, length + 1) uint16. Sequences follow each other without overlap,
          but for the last token, which is the next one's first.

        Raises:
          ValueError: where a file has too few tokens for one step, or a token is none of GPT-2's.
        """
        del seed
        rounds = self._rounds(num_workers * size * length)
        found = [
            self._sequences(*_locate(rounds, step), worker, num_workers, size, length)
            for worker in workers
            for step in steps
        ]
        return _checked(np.stack(found), self).reshape(len(workers), len(steps), size, length + 1)

    def held_out(self, size, length):
        """(size, length + 1) uint16: the first sequences of the tokens to test on."""
        if self.test.size <= size * length:
            raise ValueError(
                f"{self.name!r} has {self.test.size:,} tokens to test on, and {size} sequences of "
                f"{length} take {size * length + 1:,}: lower --eval-sequences."
            )
        return _checked(_cut(self.test, 0, size, length), self)

    def describe(self):
        """Enough to tell two folders apart in a record."""
        tokens = [shard.size for shard in self.train]
        return {
            "name": self.name,
            "files": len(tokens),
            "train_tokens": sum(tokens),
            "test_tokens": self.test.size,
        }

    def _rounds(self, tokens):
        """How many steps each file has, if a step takes `tokens`."""
        rounds = [(shard.size - 1) // tokens for shard in self.train]
        if not all(rounds):
            least = min(shard.size for shard in self.train)
            raise ValueError(
                f"A file of {self.name!r} has {least:,} tokens, and a step takes {tokens + 1:,}: "
                "lower the batch size, the length or the number of workers."
            )
        return rounds

    def _sequences(self, file, turn, worker, num_workers, size, length):
        start = (turn * num_workers + worker) * size * length
        return _cut(self.train[file], start, size, length)


def load(path: pathlib.Path) -> Shards:
    """The files of a folder, those with `val` in their names for testing; or a single file.

    Raises:
      ValueError: where there is no such file, or one that is cut short or is of another kind.
    """
    if not path.is_dir():
        tokens = _tokens(path)
        cut = tokens.size - tokens.size // _TEST_EVERY
        return Shards((tokens[:cut],), tokens[cut:], path.name)
    names = sorted(path.glob("*.bin"))
    test = [name for name in names if "val" in name.name]
    train = [name for name in names if name not in test]
    if not test or not train:
        raise ValueError(
            f"The folder {str(path)!r} has {len(train)} token files to train on and {len(test)} "
            "with `val` in their names to test on: one of each is needed, as in "
            "fineweb_train_000001.bin and fineweb_val_000000.bin."
        )
    return Shards(tuple(map(_tokens, train)), _tokens(test[0]), path.name)


def write(path: pathlib.Path, tokens: np.ndarray) -> None:
    """Writes a token file, e.g. of text that was tokenized elsewhere."""
    header = np.zeros(HEADER // 4, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with records.replacing(path) as temporary:
        temporary.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def _tokens(path):
    """The tokens of a file, mapped."""
    if not path.is_file():
        raise ValueError(f"There is no token file {str(path)!r}.")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=min(HEADER, size) // 4)
    if header.size < HEADER // 4 or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(
            f"{str(path)!r} is no file of tokens: it should begin with {MAGIC} and {VERSION}, and "
            f"begins with {header[:2].tolist()}."
        )
    if size != HEADER + 2 * int(header[2]):
        raise ValueError(
            f"{str(path)!r} says that it has {header[2]:,} tokens, and has "
            f"{(size - HEADER) / 2:,.1f}: it was not copied whole."
        )
    return np.memmap(path, "<u2", mode="r", offset=HEADER)


def _cut(tokens, start, size, length):
    """(size, length + 1): sequences one after the other, each with the token that follows."""
    own = np.asarray(tokens[start : start + size * length + 1])
    return np.lib.stride_tricks.sliding_window_view(own, length + 1)[::length]


def _locate(rounds, step):
    """The file of a step, and which turn of that file it is."""
    ends = _ends(tuple(rounds))
    step %= ends[-1]
    file = int(np.searchsorted(ends, step, side="right"))
    return file, step - (ends[file] - rounds[file])


@functools.cache
def _ends(rounds):
    return list(itertools.accumulate(rounds))


def _checked(batch, shards):
    if batch.max() >= shards.vocab_size:
        raise ValueError(
            f"{shards.name!r} has a token {batch.max()}, and GPT-2's are below "
            f"{shards.vocab_size:,}: its files were made with another vocabulary."
        )
    return batch
