"""What a message costs, by three ways to count.

*Wire* is what its arrays weigh, and what travels. *Paper* is what paper M counts (Table 2 and
Section G.2): 32 bits a float, 16 a power of two, 26 an index whatever the layer. *Information* is
about the least that any code needs: a set of k positions out of d is one of C(d, k).
"""

import dataclasses
import math
from typing import Any

import jax

from ._block_messages import BlockCodes, BlockSparse
from ._matrix_messages import LowRank, SignedOnes, Subspace
from ._messages import (
    PowersOfTwo,
    Sometimes,
    Sparse,
    Stacked,
    Transposed,
    is_message,
    wire_bits,
)
from ._positions import Strata, log2_binomial as log2_binomial


@dataclasses.dataclass(frozen=True)
class PaperConvention:
    """Bits as paper M counts them. What the paper does not have weighs what it does on the wire.

    Attributes:
      index_bits: of one position. The paper takes ⌈log₂⌉ of its largest layer, 50,304 × 768, for
        every layer.
      natural_bits: of one power of two. Sign and exponent of a float32 are nine; the paper's table
        has half a float.
    """

    index_bits: int = 26
    natural_bits: int = 16

    def __call__(self, messages: Any) -> int:
        """The bits of a message, an array, or a tree of them."""
        return sum(self._bits(node) for node in _nodes(messages))

    def _bits(self, node):
        match node:
            case Sparse(values, where):
                positions = 0 if isinstance(where, Strata) else where.count * self.index_bits
                return self._bits(values) + positions
            case LowRank(left, right):
                return self._bits(left) + self._bits(right)
            case PowersOfTwo(codes):
                return codes.size * self.natural_bits
            case Subspace(coefficients):
                return self._bits(coefficients)
            case SignedOnes(magnitude):  # a position and a sign for each column
                return self._bits(magnitude) + node.columns * (self.index_bits + 1)
            case Transposed(inner):
                return self._bits(inner)
            case Stacked(layers):
                return _num_layers(layers) * self._bits(_first_layer(layers))
            case Sometimes(inner, probability):
                return round(probability * self._bits(inner))
            case _:
                return wire_bits(node)


def information_bits(messages: Any) -> int:
    """Bits, rounded up a leaf, that the best code for such messages would need.

    Floats are taken as incompressible, and so are the eight bits of a power of two. What is saved
    is the positions' order, and the codes of fewer bits that are never used.
    """
    return sum(_information(node) for node in _nodes(messages))


def _information(node):
    match node:
        case Sparse(values, where):
            return _information(values) + math.ceil(where.information)
        case LowRank(left, right):
            return _information(left) + _information(right)
        case Subspace(coefficients, frequencies):
            return _information(coefficients) + math.ceil(frequencies.information)
        case SignedOnes(magnitude):
            return _information(magnitude) + math.ceil(node.information)
        case BlockSparse(values):
            return _information(values) + math.ceil(node.information)
        case BlockCodes():
            return math.ceil(node.information)
        case Transposed(inner):
            return _information(inner)
        case Stacked(layers):
            return _num_layers(layers) * _information(_first_layer(layers))
        case Sometimes(inner, probability):
            return math.ceil(probability * _information(inner) + _entropy(probability))
        case _:
            return wire_bits(node)


def _num_layers(layers):
    return jax.tree.leaves(layers)[0].shape[0]


def _first_layer(layers):
    return jax.eval_shape(lambda node: jax.tree.map(lambda leaf: leaf[0], node), layers)


def _entropy(probability):
    """Bits of one coin."""
    both = (probability, 1 - probability)
    return -sum(p * math.log2(p) for p in both if p > 0)


def _nodes(messages):
    return jax.tree.leaves(messages, is_leaf=is_message)
