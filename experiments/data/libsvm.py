"""Two data sets of LIBSVM's collection: fetched once, or taken from a folder; checked each time.

The download goes to the user's cache (`pooch.os_cache`). Nothing is fetched that is not asked for.
The checksum is of the numbers, not of the file: blanks and the ways to write a number may differ.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np
import pooch
from sklearn.datasets import load_svmlight_file


URL = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of the collection, with the label that becomes 1 (the other becomes -1)."""

    file: str
    features: int
    positive: float
    sha256: str  # see `digest`


SOURCES = {
    "breast-cancer": Source(
        file="breast-cancer_scale",  # 683 rows
        features=10,
        positive=4,  # malignant
        sha256="36eaa1191b5e9b7f31b8019bad84c45e50f556bebdf029a5599d9b42cbd6feaa",
    ),
    "a1a": Source(
        file="a1a",  # 1605 rows
        features=123,
        positive=1,
        sha256="cca7c0e5fe04aa2f6c104dde66f6378f9fed581ec51dd65554f9fe3b1acf08dd",
    ),
}


def load(name, data_dir=None):
    """Features (n, d) and labels ±1, (n,), both float64 NumPy arrays.

    Args:
      name: one of `SOURCES`.
      data_dir: a folder that has the file under LIBSVM's own name; None: download, or the cache.

    Raises:
      ValueError: for an unknown name, a file that is missing, no such data or other data than
        expected, or a download that fails.
    """
    if name not in SOURCES:
        raise ValueError(f"`name` must be among {list(SOURCES)}, got {name!r}.")
    source = SOURCES[name]
    path = _download(source) if data_dir is None else _local(source, pathlib.Path(data_dir))
    features, labels = _parse(source, path)
    if digest(features, labels) != source.sha256:
        raise ValueError(
            f"{str(path)!r} does not hold the numbers of LIBSVM's {source.file}: remove it, and "
            f"get it anew from {URL + source.file}."
        )
    return features, np.where(labels == source.positive, 1.0, -1.0)


def digest(features, labels):
    """The SHA-256 of both arrays, as little-endian float64, rows first."""
    whole = np.column_stack([labels, features]).astype("<f8")
    return hashlib.sha256(whole.tobytes()).hexdigest()


def _parse(source, path):
    try:
        # The highest features of a1a occur in no row of it.
        features, labels = load_svmlight_file(
            str(path), n_features=source.features, zero_based=False
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no file of LIBSVM's format: {error}.") from error
    return features.toarray(), labels


def _download(source):
    try:
        return pooch.retrieve(URL + source.file, known_hash=None, fname=source.file)
    except OSError as error:
        raise ValueError(
            f"Could not fetch {URL + source.file}: {error}. Get the file in another way and pass "
            "its folder with --data-dir."
        ) from error


def _local(source, folder):
    path = folder / source.file
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}: --data-dir takes the folder of it.")
    return path
