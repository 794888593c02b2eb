"""Layers of equal settings and shape, stacked and treated by one batched call.

A model has many layers and few shapes. Tracing and compiling a kernel once a shape, not once a
layer, is what keeps a program of a hundred layers small.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def map_grouped(
    function: Callable[..., Any], settings: Sequence[Hashable], items: Sequence[Any]
) -> list[Any]:
    """`[function(setting, item) for ...]`, with equal settings and shapes run as one vmap.

    Args:
      function: of a setting, which is static, and an item, a pytree of arrays.
      settings: one for each item. Equal ones may share a call.
      items: pytrees of arrays; those of equal structure, shapes and dtypes may share a call.

    Returns:
      The results in the order of the items. Each is what `function` gives for its item alone, up
      to the order of floating additions.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (setting, item) in enumerate(zip(settings, items, strict=True)):
        leaves, treedef = jax.tree.flatten(item)
        kind = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        groups.setdefault((setting, treedef, kind), []).append(i)

    results: list[Any] = [None] * len(items)
    for (setting, _, kind), members in groups.items():
        if len(members) == 1 or not kind:  # a vmap needs an array to map over
            for i in members:
                results[i] = function(setting, items[i])
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(items[i] for i in members))
        batched = jax.vmap(lambda item, setting=setting: function(setting, item))(stacked)
        for row, i in enumerate(members):
            results[i] = jax.tree.map(lambda leaf, row=row: leaf[row], batched)
    return results
