"""CIFAR-10: fetched once, or taken from a folder; checked each time.

The download, 170 MB, goes to the user's cache (`pooch.os_cache`). Nothing is fetched that is not
asked for. A folder may hold, and the first of these is taken:

- `cifar-10-python.tar.gz`, as Krizhevsky has it on his page,
- what it unpacks to, `cifar-10-batches-py`, or be that folder itself,
- a subset of 10,000 training and 2,000 test images, without loss: `cifar10_12k_delta.npy.xz`, which
  holds differences of neighbours and colours since they compress better, `cifar10_12k_labels.npy`.
"""

import dataclasses
import hashlib
import io
import lzma
import pathlib
import pickle
import tarfile

import numpy as np
import pooch


URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
TARBALL = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
SUBSET = ("cifar10_12k_delta.npy.xz", "cifar10_12k_labels.npy")
SUBSET_TEST = 2000  # the last ones

# MD5 where the source has it so. A pickle can run anything: none is opened before it is checked.
DIGESTS = {
    TARBALL: "md5:c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
    "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
    "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "md5:40351d587109b95175f43aff81a1287e",
    SUBSET[0]: "sha256:785d7a6fa0592552c255d9316540a291840e5de3f67f31b8318e73bd28732122",
    SUBSET[1]: "sha256:636c9ce116f1974a96cb1bd293fdecfc78c81d9ffb2ef756adf219aad3393d70",
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images (n, 32, 32, 3) uint8, RGB, and labels 0 to 9, (n,) int32; NumPy arrays."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    def describe(self):
        """Enough to tell two sets apart in a record."""
        parts = (self.train, self.train_labels, self.test, self.test_labels)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        sizes = {"train": len(self.train), "test": len(self.test)}
        return {"name": "CIFAR-10", "sha256": digest.hexdigest()[:16]} | sizes


def load(data_dir=None) -> Images:
    """All images, in the order of the files.

    Args:
      data_dir: a folder with one of the three forms; None: download, or the cache.

    Raises:
      ValueError: for a folder with none of them, or with a part of one; a file of another checksum;
        or a download that fails.
    """
    if data_dir is None:
        return _of_tarball(_download())
    folder = pathlib.Path(data_dir)
    if (folder / TARBALL).is_file():
        return _of_tarball(folder / TARBALL)
    unpacked = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if (unpacked / TRAIN[0]).is_file():
        return _of_batches(lambda name: _checked(unpacked / name))
    if (folder / SUBSET[0]).is_file():
        return _of_subset(*(_checked(folder / name) for name in SUBSET))
    raise ValueError(
        f"There is no CIFAR-10 in {str(folder)!r}: --data-dir takes a folder with {TARBALL}, with "
        f"{FOLDER}, or with {' and '.join(SUBSET)}."
    )


def decode(differences):
    """The subset's images, (n, 32, 32, 3) uint8 RGB, from (n, 3, 32, 32) uint8.

    The planes are R − G, G and B − G, each the differences along rows and columns, modulo 256.
    """
    planes = np.cumsum(np.cumsum(differences, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    planes[:, 0] += planes[:, 1]
    planes[:, 2] += planes[:, 1]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _of_tarball(path):
    with tarfile.open(fileobj=io.BytesIO(_checked(path))) as archive:
        return _of_batches(lambda name: archive.extractfile(f"{FOLDER}/{name}").read())


def _of_batches(read):
    parts = (_batches(read, names) for names in (TRAIN, TEST))
    return Images(*(array for part in parts for array in part))


def _batches(read, names):
    batches = [pickle.loads(read(name), encoding="bytes") for name in names]
    planes = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(batch[b"labels"], np.int32) for batch in batches])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _of_subset(images, labels):
    images = decode(np.load(io.BytesIO(lzma.decompress(images))))
    labels = np.load(io.BytesIO(labels)).astype(np.int32)
    cut = len(images) - SUBSET_TEST
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:])


def _checked(path):
    """The file's bytes."""
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}: this form of CIFAR-10 is not complete.")
    content = path.read_bytes()
    algorithm, expected = DIGESTS[path.name].split(":")
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(
            f"{str(path)!r} has the {algorithm} {found}, not {expected}: remove it, and get "
            f"CIFAR-10 anew from {URL}."
        )
    return content


def _download():
    try:
        return pathlib.Path(pooch.retrieve(URL, known_hash=DIGESTS[TARBALL], fname=TARBALL))
    except (OSError, ValueError) as error:  # pooch has a ValueError for another checksum
        raise ValueError(
            f"Could not fetch {URL}: {error} Get the file in another way and pass its folder with "
            "--data-dir."
        ) from error
