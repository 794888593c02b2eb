"""Which layer gets which norm, radius and compressor.

A rule claims leaves by the pattern of their path and their number of axes; the first that fits
wins. A leaf that none claims is an error that names it: a matrix on the wrong norm trains badly
and says nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from ._compressors import Compressor, Identity
from ._defaults import DEFAULT_UPLINK
from ._dtypes import widen
from ._grouped import grouping_of
from ._matrix_norms import Spectral
from ._messages import wire_bits
from ._norms import RMS, Norm, Scaled, Shaped, Sign
from ._settings import Setting, path_name, per_leaf
from ._tables import shape_name, table
from ._topologies import Gather, Topology


# A policy gives the factor of a layer's radius that depends on its shape (fan_in, fan_out).
ScalePolicy = Callable[[int, int], float]


def constant(fan_in: int, fan_out: int) -> float:
    """1: the radius does not depend on the shape."""
    del fan_in, fan_out
    return 1.0


def scion_scale(fan_in: int, fan_out: int) -> float:
    """√(fan_out / fan_in): steps of equal RMS → RMS operator norm (Pethick et al. 2025)."""
    return math.sqrt(fan_out / fan_in)


def muon_scale(fan_in: int, fan_out: int) -> float:
    """√max(1, fan_out / fan_in) (Jordan 2024)."""
    return math.sqrt(max(1.0, fan_out / fan_in))


def moonlight_scale(fan_in: int, fan_out: int) -> float:
    """0.2 √max(fan_in, fan_out): spectral steps with entries of RMS 0.2, as AdamW's have.

    Of a full-rank step (Liu et al. 2025, Moonlight, arXiv:2502.16982).
    """
    return 0.2 * math.sqrt(max(fan_in, fan_out))


def one_over_fan_in(fan_in: int, fan_out: int) -> float:
    """1 / fan_in: the head, of which every logit is a sum of fan_in terms (Scion's Sign)."""
    del fan_out
    return 1 / fan_in


def one_over_fan_out(fan_in: int, fan_out: int) -> float:
    """1 / fan_out: an embedding (vocabulary, features), above all one tied to the head."""
    del fan_in
    return 1 / fan_out


@dataclasses.dataclass(frozen=True)
class Rule:
    """Claims leaves, and says how they are treated.

    Attributes:
      role: the name of the role, for the table.
      norm: of the layer.
      path: a regular expression, searched (case ignored) in the leaf's path, `blocks/0/q/kernel`.
      ndims: the numbers of axes it claims.
      scale: radius = learning rate × scale × policy(fan_in, fan_out), in units of the norm.
      policy: see `ScalePolicy`. Fans are those of the matrices that `dims` and `splits` find, or
        the last two axes; a vector has (1, 1).
      compress: whether such leaves are compressed. If not they are sent as they are.
      dims: the axes of a leaf that is no plain matrix (..., fan_in, fan_out): a convolution, heads.
        Each matrix in it is treated by itself. See `Shaped`, which also has a table of them.
      splits: how many matrices lie side by side in the outputs: 3 for a fused (in, 3 · out).

    Raises:
      ValueError: for a path that is no regular expression, a scale that is not positive, or
        `splits` below 1.
    """

    role: str
    norm: Norm
    path: str = ""
    ndims: tuple[int, ...] = (2,)
    scale: float = 1.0
    policy: ScalePolicy = constant
    compress: bool = True
    dims: optax.contrib.MuonDimensionNumbers | None = None
    splits: int = 1

    def __post_init__(self):
        if not isinstance(self.norm, Norm):
            raise ValueError(f"Rule {self.role!r}: expected a norm, got {self.norm!r}.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Rule {self.role!r}: `scale` must be positive, got {self.scale}.")
        if self.splits < 1:
            raise ValueError(f"Rule {self.role!r}: `splits` must be at least 1, got {self.splits}.")
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"Rule {self.role!r}: `path` {self.path!r} is no regular expression: {error}."
            ) from error

    def claims(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether the leaf at `path` with `shape` is this rule's."""
        return len(shape) in self.ndims and bool(re.search(self.path, path, re.IGNORECASE))

    def norm_for(self, shape: tuple[int, ...]) -> Norm:
        """The norm whose unit ball is the step at learning rate one."""
        norm = self.norm
        if self.dims is not None or self.splits > 1:
            dims = optax.contrib.MuonDimensionNumbers(-2, -1) if self.dims is None else self.dims
            norm = Shaped(norm, *dims, splits=self.splits)
            try:
                shape = norm.matrix_shape(shape)
            except ValueError as error:
                raise ValueError(f"Rule {self.role!r}: {error}") from error
        fan_in, fan_out = shape[-2:] if len(shape) >= 2 else (1, 1)
        scale = self.scale * self.policy(max(1, fan_in), max(1, fan_out))
        return norm if scale == 1 else Scaled(norm, scale)


_EMBEDDING = r"(^|/)(\w*embed\w*|wte|wpe)(/|$)"
_HEAD = r"(^|/)(lm_head|head|logits|unembed\w*)(/|$)"
_KERNEL = r"(^|/)(kernel|weights?|w\d*)(/value)?$"

SCION_RULES: tuple[Rule, ...] = (
    Rule("vector", RMS(), ndims=(0, 1), scale=50.0, compress=False),
    Rule("head", Sign(), _HEAD, scale=3000.0, policy=one_over_fan_in),
    Rule("embedding", Sign(), _EMBEDDING, scale=3000.0, policy=one_over_fan_out),
    Rule("hidden", Spectral(), _KERNEL, scale=50.0, policy=scion_scale),
)
"""Paper M, Table 4, with the shape factors of the Scion code: Spectral 50 for hidden kernels, Sign
3000 for embeddings and heads. For names as Flax (Linen, NNX) and plain dicts use them. Matrices
only: stacks, attention tensors and convolutions have more axes, and want a rule of their own, with
`ndims` and `dims`."""

MUON_RULES: tuple[Rule, ...] = (
    Rule("adam", RMS(), ndims=(0, 1), compress=False),
    Rule("adam", Sign(), f"{_HEAD}|{_EMBEDDING}"),
    Rule("hidden", Spectral(), _KERNEL, policy=muon_scale),
)
"""Jordan (2024): Spectral for hidden kernels; what has the role "adam" is left to AdamW."""


def with_norm(rules: tuple[Rule, ...], role: str, norm: Norm) -> tuple[Rule, ...]:
    """`rules` with `norm` for the layers of `role`; all else stays, scales too.

    With `Spectral(dtype=jnp.bfloat16)` for "hidden" the oracle multiplies in bfloat16.

    Raises:
      ValueError: if no rule has that role, or `norm` is no norm.
    """
    roles = [rule.role for rule in rules]
    if role not in roles:
        raise ValueError(
            f"No rule has the role {role!r}, whose norm was to be {norm!r}. The rules are: "
            f"{', '.join(roles) or '(none)'}."
        )
    return tuple(
        dataclasses.replace(rule, norm=norm) if rule.role == role else rule for rule in rules
    )


def claim(rules: tuple[Rule, ...], tree: Any) -> list[Rule]:
    """The rule for each leaf of `tree`, in order.

    Raises:
      ValueError: naming every leaf that no rule claims.
    """
    claimed, orphans = [], []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        rule = next((rule for rule in rules if rule.claims(name, leaf.shape)), None)
        claimed.append(rule)
        if rule is None:
            orphans.append(f"{name} {tuple(leaf.shape)}")
    if orphans:
        raise ValueError(
            f"No rule claims {', '.join(orphans)}. Put one in front: rules=(Rule('hidden', "
            f"Spectral(), path={orphans[0].split()[0]!r}, ndims=...), *SCION_RULES). The rules "
            f"were: {', '.join(rule.role for rule in rules) or '(none)'}."
        )
    return claimed


def norms_by(rules: tuple[Rule, ...]) -> Callable[[Any], Any]:
    """A setting: the tree of norms that `rules` give a tree."""

    def norms(tree):
        leaves = jax.tree.leaves_with_path(tree)
        found = [
            _norm_for(rule, path, leaf)
            for rule, (path, leaf) in zip(claim(rules, tree), leaves, strict=True)
        ]
        return jax.tree.structure(tree).unflatten(found)

    return norms


def _norm_for(rule, path, leaf):
    try:
        return rule.norm_for(leaf.shape)
    except ValueError as error:
        raise ValueError(f"{path_name(path)}: {error}") from error


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class ByRole:
    """A compressor for each role: `ByRole(hidden=RankK(0.25), embedding=BlockTopK())`.

    An `uplink` or `downlink`, of `ef21_muon` and `routes`. Leaves whose rule does not say
    `compress` are sent as they are.

    Raises:
      ValueError: for what is no compressor; where it is used, for a role of no rule that says
        `compress`, and for a leaf whose role it does not name.
    """

    compressors: tuple[tuple[str, Compressor], ...]

    def __init__(self, **compressors: Compressor):
        for role, compressor in compressors.items():
            if not isinstance(compressor, Compressor):
                raise ValueError(f"Role {role!r}: expected a Compressor, got {compressor!r}.")
        object.__setattr__(self, "compressors", tuple(compressors.items()))

    def __repr__(self):
        return f"ByRole({', '.join(f'{role}={c!r}' for role, c in self.compressors)})"


def compressors_by(rules: tuple[Rule, ...], setting: Setting) -> Setting:
    """A setting: one compressor where the rules allow it, else Identity; or as `ByRole` says.

    A tree, or a function, stays as it is.
    """
    if not isinstance(setting, Compressor | ByRole):
        return setting

    def compressors(tree):
        claimed = claim(rules, tree)
        if isinstance(setting, ByRole):
            of_role = _of_roles(setting, rules, claimed, tree)
        else:
            of_role = {rule.role: setting for rule in rules}
        found = [of_role[rule.role] if rule.compress else Identity() for rule in claimed]
        return jax.tree.structure(tree).unflatten(found)

    return compressors


def _of_roles(setting, rules, claimed, tree):
    """What a `ByRole` holds, all of which is used, and nothing missing."""
    roles = dict.fromkeys(rule.role for rule in rules if rule.compress)
    of_role = dict(setting.compressors)
    for role in of_role:
        if role not in roles:
            raise ValueError(
                f"{setting!r}: no rule that says `compress` has the role {role!r}. The roles are: "
                f"{', '.join(roles) or '(none)'}."
            )
    for rule, (path, _) in zip(claimed, jax.tree.leaves_with_path(tree), strict=True):
        if rule.compress and rule.role not in of_role:
            raise ValueError(
                f"{path_name(path)}: {setting!r} names no compressor for its role {rule.role!r}. "
                f"Add one, `{rule.role}=...`; with `Identity()` such leaves are sent as they are."
            )
    return of_role


@dataclasses.dataclass(frozen=True)
class Route:
    """How one leaf is treated. Bytes are those of one step and one worker, as they travel.

    `server` says who takes the leaf's step.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    norm: Norm
    uplink: Compressor
    downlink: Compressor
    bytes_up: int
    bytes_down: int
    server: str = "every worker"


class Routes(tuple[Route, ...]):
    """The routes of all leaves, in order. Prints as a table."""

    def __str__(self):
        head = ("path", "shape", "role", "norm", "uplink", "downlink", "bytes up", "bytes down")
        body = [
            (r.path, shape_name(r.shape), r.role, _short(r.norm, r.shape), repr(r.uplink),
             repr(r.downlink), f"{r.bytes_up:,}", f"{r.bytes_down:,}")
            for r in self
        ]  # fmt: skip
        up, down = sum(r.bytes_up for r in self), sum(r.bytes_down for r in self)
        total = ("total", "", "", "", "", "", f"{up:,}", f"{down:,}")
        if len({r.server for r in self}) == 1:
            return table(head, [*body, total], right=2)
        # The one more column in front, since numbers stand to the right.
        shown = [(row[0], r.server, *row[1:]) for row, r in zip(body, self, strict=True)]
        return table((head[0], "server", *head[1:]), [*shown, (total[0], "", *total[1:])], right=2)


def routes(
    params: optax.Params,
    rules: tuple[Rule, ...] = SCION_RULES,
    *,
    uplink: Setting | None = None,
    downlink: Setting = Identity(),
    topology: Topology = Gather(),
) -> Routes:
    """How `ef21_muon` with the same arguments treats each leaf of `params`.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      uplink: None is `DEFAULT_UPLINK`; for `gluon`, which compresses nothing, pass `Identity()`.

    Raises:
      ValueError: naming every leaf that no rule claims.
    """
    uplink = DEFAULT_UPLINK if uplink is None else uplink
    leaves = jax.tree.leaves_with_path(params)
    roles = [rule.role for rule in claim(rules, params)]
    settings = [
        per_leaf(compressors_by(rules, uplink), params, Compressor),
        per_leaf(compressors_by(rules, downlink), params, Compressor),
        per_leaf(norms_by(rules), params, Norm),
    ]
    settings = list(zip(*settings, strict=True))
    grouping = grouping_of(params, settings, topology)
    groups = {i: group for group in grouping.groups.values() for i in group.numbers}

    def one(i):
        (path, leaf), (up, down, norm) = leaves[i], settings[i]
        return Route(
            path=path_name(path),
            shape=tuple(leaf.shape),
            role=roles[i],
            norm=norm,
            uplink=up,
            downlink=down,
            bytes_up=_bytes(up, leaf, groups[i]),
            bytes_down=_bytes(down, leaf, groups[i]),
            server=_server(groups[i], topology),
        )

    return Routes(map(one, range(len(leaves))))


def _bytes(compressor, leaf, group):
    x = widen(jax.ShapeDtypeStruct(group.layer_shape, leaf.dtype))
    message = jax.eval_shape(compressor.compress, x, jax.eval_shape(lambda: jax.random.key(0)))
    return group.pieces * (wire_bits(message) // 8)


def _server(group, topology):
    share = topology.share(group.layers)
    if share == group.layers:
        return "every worker"
    missing = share * topology.owners - group.layers
    what = f"{group.layers} layers" if group.pieces == 1 else f"{group.layers} pieces"
    return f"{what}, {share} each" + (f" ({missing} empty)" if missing else "")


def _short(norm, shape):
    if isinstance(norm, Scaled):
        return f"{norm.scale:.4g} × {_short(norm.base, shape)}"
    if isinstance(norm, Shaped):
        *batch, fan_in, fan_out = norm.matrix_shape(shape)
        return f"{norm.base!r} on {''.join(f'{b}×' for b in batch)}({fan_in}×{fan_out})"
    return repr(norm)
