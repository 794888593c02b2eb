"""Per-leaf settings: one value, a prefix tree of values, or a function of the tree.

Compressors and norms are settings. They are no pytrees themselves, so a tree of them can stand
beside the parameters, or be a prefix of them, as `in_axes` is.
"""

from collections.abc import Callable
from typing import Any

import jax


Setting = Any | Callable[[Any], Any]


def path_name(path: tuple) -> str:
    """The name of a leaf, `blocks/0/mlp/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the only leaf)"


def per_leaf(setting: Setting, tree: Any, kind: type) -> list:
    """One `kind` for each leaf of `tree`, in order.

    Args:
      setting: a `kind`, a prefix tree of them, or a function from `tree` to one of these.
      tree: the tree whose leaves are to be set.
      kind: what each must be, e.g. `Compressor`.

    Raises:
      ValueError: where `setting` is no prefix of `tree`, or holds something else than `kind`.
    """
    if not jax.tree.leaves(tree):
        return []  # `optax.tree.map_params` looks at what `init` makes of such a tree
    if callable(setting) and not isinstance(setting, kind | type):
        setting = setting(tree)
    values = jax.tree.leaves(jax.tree.broadcast(setting, tree))
    for (path, _), value in zip(jax.tree.leaves_with_path(tree), values, strict=True):
        if not isinstance(value, kind):
            raise ValueError(
                f"{path_name(path)}: expected a {kind.__name__}, got {value!r}. Pass one "
                f"{kind.__name__}, or a tree of them that is a prefix of the parameters."
            )
    return values


def is_zero(x: Any) -> bool:
    """Whether `x` is zero for sure: a traced or a scheduled value may become something else."""
    return isinstance(x, int | float) and x == 0
