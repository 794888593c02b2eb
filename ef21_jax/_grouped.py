"""An optimizer that keeps its state with equal layers stacked."""

from collections.abc import Callable

import jax

from ._compressors import Compressor, Identity
from ._distributed import Distributed
from ._grouping import Grouping
from ._layers import CompressEach, NormEach
from ._messages import Stacked, is_message
from ._norms import Norm
from ._settings import Setting, per_leaf


def grouped(assemble: Callable[..., Distributed], **settings: tuple[Setting, type]) -> Distributed:
    """The optimizer that `assemble` makes, run on layers that are stacked by `Grouping`.

    The same updates, leaf by leaf, from a program whose size is the number of shapes, not of
    layers. Leaves are stacked where all settings, shape and dtype are equal.

    Args:
      assemble: from the settings, by name, to an optimizer by `distribute`.
      settings: each a pair, the setting for a tree like the parameters, and what it is of: a
        `Compressor`, a `Norm`, or a class of hashable values.

    Raises:
      ValueError: as `assemble` does; when first given parameters, for settings that do not fit.
    """
    assemble(**{name: setting for name, (setting, _) in settings.items()})  # an error at once

    def of(tree) -> tuple[Grouping, Distributed]:
        chosen = {n: per_leaf(setting, tree, kind) for n, (setting, kind) in settings.items()}
        grouping = Grouping.of(tree, list(zip(*chosen.values(), strict=True)))
        stacked = {
            name: {
                group: _each(value, grouping.members[group])
                for group, value in grouping.choose(values).items()
            }
            for name, values in chosen.items()
        }
        return grouping, assemble(**stacked)

    def init(params):
        grouping, inner = of(params)
        return inner.init(grouping.stack(params))

    def update(updates, state, params=None, **extra_args):
        grouping, inner = of(updates if params is None else params)
        stacked = None if params is None else grouping.stack(params)
        steps, state = inner.update(grouping.stack(updates), state, stacked, **extra_args)
        return grouping.unstack(steps), state

    def messages(params):
        grouping, inner = of(params)
        sides = inner.messages(grouping.stack(params))
        return tuple(grouping.unstack(_layers(side, grouping)) for side in sides)

    return Distributed.of(
        init,
        update,
        messages=messages,
        stack=lambda tree: of(tree)[0].stack(tree),
        unstack=lambda stacked, like: of(like)[0].unstack(stacked),
    )


def _each(value, numbers):
    if isinstance(value, Norm):
        return NormEach(value)
    if isinstance(value, Compressor) and value != Identity():
        return CompressEach(value, numbers)
    return value


def _layers(side, grouping):
    """{group: [message of each layer]}, as shapes."""

    def layer(node):
        first = jax.eval_shape(lambda node: jax.tree.map(lambda leaf: leaf[0], node), node)
        return first.layers if isinstance(first, Stacked) else first

    if not grouping.members:
        return side
    layers = jax.tree.map(layer, side, is_leaf=is_message)
    return {name: [layers[name]] * len(numbers) for name, numbers in grouping.members.items()}
