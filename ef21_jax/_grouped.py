"""An optimizer that keeps its state with equal layers stacked."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import _placement, _topologies
from ._compressors import Compressor, Identity
from ._distributed import Distributed
from ._grouping import Grouping
from ._layers import CompressEach, NormEach
from ._messages import Stacked
from ._norms import Norm
from ._settings import Setting, per_leaf
from ._topologies import Gather, Topology


Kinded = tuple[Setting, type]


def grouped(
    assemble: Callable[..., Distributed], topology: Topology = Gather(), **settings: Kinded
) -> Distributed:
    """The optimizer that `assemble` makes, run on layers that are stacked by `Grouping`.

    The same updates, leaf by leaf, from a program whose size is the number of shapes, not of
    layers. Leaves are stacked where all settings, shape and dtype are equal.

    Args:
      assemble: from `topology`, and from the settings by name, to an optimizer by `distribute`.
      topology: of a sharded one, layers whose number its workers do not divide are cut into a piece
        for each, where their norm takes every entry by itself.
      settings: each a pair, the setting for a tree like the parameters, and what it is of: a
        `Compressor`, a `Norm`, or a class of hashable values.

    Raises:
      ValueError: as `assemble` does; when first given parameters, for settings that do not fit.
    """
    # An error at once.
    assembled = assemble(
        topology=topology, **{name: setting for name, (setting, _) in settings.items()}
    )

    def of(tree) -> tuple[Grouping, Distributed]:
        chosen = {n: per_leaf(setting, tree, kind) for n, (setting, kind) in settings.items()}
        of_leaves = list(zip(*chosen.values(), strict=True)) or [()] * len(jax.tree.leaves(tree))
        grouping = grouping_of(tree, of_leaves, topology)
        stacked = {
            name: {
                group: _each(value, _numbers(grouping, group))
                for group, value in grouping.choose(values).items()
            }
            for name, values in chosen.items()
        }
        return grouping, assemble(topology=topology, **stacked)

    def init(params):
        grouping, inner = of(params)
        return inner.init(grouping.stack(params))

    def update(updates, state, params=None, **extra_args):
        grouping, inner = of(updates if params is None else params)
        inner.check_gradients(updates)  # a stack is a worker's own as soon as one of its layers is
        stacked = None if params is None else grouping.stack(params)
        steps, state = inner.update(grouping.stack(updates), state, stacked, **extra_args)
        return grouping.unstack(steps, state.count), state

    def messages(params):
        grouping, inner = of(params)
        sides = inner.messages(grouping.stack(params))
        return tuple(_leaf_messages(side, grouping) for side in sides)

    def traffic(params):
        grouping, inner = of(params)
        return inner.traffic(grouping.stack(params))

    def unstack(stacked, like):
        grouping, _ = of(like)
        return grouping.unstack(_topologies.join(stacked, grouping.stack(like)))

    return Distributed.of(
        init,
        update,
        messages=messages,
        traffic=traffic,
        topology=topology,
        check_gradients=assembled.check_gradients,
        stack=_placement.left_to_the_compiler(lambda tree: of(tree)[0].stack(tree)),
        unstack=_placement.left_to_the_compiler(unstack),
    )


def grouping_of(tree: Any, settings: Sequence[tuple[Any, ...]], topology: Topology) -> Grouping:
    """How `grouped` stacks `tree`. `settings`: of each leaf all that it has, in order."""

    def pieces(setting, group):
        owners = topology.owners
        divided = group.layers % owners == 0
        by_entries = any(isinstance(value, Norm) and value.entrywise for value in setting)
        can_be_cut = len(group.shape) > 1 and group.shape[0] >= owners
        return owners if by_entries and can_be_cut and not divided else 1

    return Grouping.of(tree, settings, pieces)


def _numbers(grouping, group):
    """A number for each layer: of the leaf, if that is in one piece."""
    members, leaves = grouping.groups[group], grouping.treedef.num_leaves
    return tuple(i + piece * leaves for i in members.numbers for piece in range(members.pieces))


def _each(value, numbers):
    if isinstance(value, Norm):
        return NormEach(value)
    if isinstance(value, Compressor) and value != Identity():
        return CompressEach(value, numbers)
    return value


def _leaf_messages(side, grouping):
    """The tree of each leaf's own message, as shapes, from those of the groups."""

    def of_leaf(node, group):
        def take(node):
            return jax.tree.map(lambda leaf: leaf[: group.pieces], node)

        def unstacked(node):
            return jax.tree.map(lambda leaf: leaf[0], node)

        node = jax.eval_shape(take if group.pieces > 1 else unstacked, node)
        return node.layers if isinstance(node, Stacked) and group.pieces == 1 else node

    return grouping.unflatten(
        {
            name: [of_leaf(side[name], group)] * len(group.numbers)
            for name, group in grouping.groups.items()
        }
    )
