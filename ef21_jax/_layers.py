"""A compressor and a norm for layers that are stacked along a leading axis: each by itself."""

import dataclasses

from ._compressors import Compressor
from ._grouping import each_layer, one_by_one
from ._messages import Stacked
from ._norms import Norm


@dataclasses.dataclass(frozen=True)
class CompressEach(Compressor):
    """`compressor` for each layer, which are the leaves `numbers` of the tree that was stacked.

    `compress` takes an array of keys, one for each layer: those that the leaves would have had.
    """

    compressor: Compressor
    numbers: tuple[int, ...]

    @property
    def shared(self):  # type: ignore
        return self.compressor.shared

    def compress(self, x, key):
        return Stacked(each_layer(self.compressor.compress, x, key))

    def contraction(self, shape, norm=None):
        return self.compressor.contraction(shape[1:], norm)


@dataclasses.dataclass(frozen=True)
class NormEach(Norm):
    """`base` of each layer."""

    base: Norm

    def norm(self, x):
        return each_layer(self.base.norm, x)

    def dual(self, g):
        return each_layer(self.base.dual, g)

    def lmo(self, g):
        return one_by_one(self.base.lmo, g)

    def sharp(self, g):
        return one_by_one(self.base.sharp, g)

    def equivalence(self, shape):
        return self.base.equivalence(shape[1:])
