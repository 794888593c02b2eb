"""Norms in NumPy, with what a compressor may know of them, to hold every claimed α to."""

import dataclasses
import math

import numpy as np


def length(x, p, axis):
    """ℓp along an axis, without over- or underflow."""
    size = np.max(np.abs(x), axis=axis, keepdims=True, initial=0.0)
    unit = x / np.where(size > 0, size, 1)
    size = np.squeeze(size, axis)
    if p == math.inf:
        return size
    return size * np.sum(np.abs(unit) ** p, axis=axis) ** (1 / p)


@dataclasses.dataclass(frozen=True)
class Schatten:
    """ℓp of the singular values."""

    p: float
    absolute = False

    @property
    def schatten(self):
        return self.p

    def norm(self, x):
        size = np.max(np.abs(x), axis=(-2, -1), keepdims=True)
        unit = x / np.where(size > 0, size, 1)
        return length(np.linalg.svd(unit, compute_uv=False), self.p, -1) * size[..., 0, 0]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """ℓq of the ℓp along `axis`."""

    p: float
    q: float
    axis: int = -1
    absolute = True

    @property
    def schatten(self):
        return 2.0 if self.p == self.q == 2 else None

    @property
    def mixed(self):
        return self.p, self.q, self.axis

    def norm(self, x):
        return length(length(x, self.p, self.axis), self.q, -1)


@dataclasses.dataclass(frozen=True)
class Absolute:
    """An absolute norm that is none of the others: half of ℓ1 beside the largest entry."""

    absolute = True
    schatten = None

    def norm(self, x):
        return np.maximum(Mixed(1, 1).norm(x) / 2, Mixed(math.inf, math.inf).norm(x))


@dataclasses.dataclass(frozen=True)
class Arbitrary:
    """A norm of which nothing is known: an operator norm plus ℓ2 of the sums of rows."""

    absolute = False
    schatten = None

    def norm(self, x):
        return Schatten(math.inf).norm(x) + length(np.sum(x, axis=-1), 2, -1)


GEOMETRIES = (
    *(Schatten(p) for p in (1, 1.5, 2, 4, math.inf)),
    *(Mixed(p, p) for p in (1, 1.5, 3, math.inf)),
    *(Mixed(p, q, axis) for p, q in ((2, 1), (1, 2), (1.5, 3), (3, 1.5)) for axis in (-1, -2)),
    *(Mixed(p, math.inf) for p in (1, 2)),
    Absolute(),
    Arbitrary(),
)
