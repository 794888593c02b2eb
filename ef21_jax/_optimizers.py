"""The methods, each an assembly of the pieces.

Learning rates are floats or optax schedules. An LMO step has length learning rate × scale in the
layer's norm, whatever the gradient's size: the radius t of the papers.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._axes import AxisName
from ._compressors import Compressor, Identity
from ._defaults import DEFAULT_EXTRAPOLATION, DEFAULT_UPLINK
from ._distributed import Distributed, distribute
from ._feedback import check_decay, ef14, ef21, ef21_p, no_feedback, worker_momentum
from ._grouped import grouped
from ._norms import Norm
from ._placement import here
from ._polar import unit_scale
from ._routing import MUON_RULES, SCION_RULES, Rule, claim, compressors_by, norms_by
from ._settings import Setting, is_zero, per_leaf
from ._topologies import Gather, Topology


def lmo_step(
    norms: Setting,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The step t · LMO(G), to be added to the parameters (paper M, equation 2).

    Args:
      norms: a norm, a prefix tree of norms, or a function from the tree to one of these.
        `Scaled(norm, s)` makes steps s times as long.
      learning_rate: the radius t, in units of the norm, or a schedule for it.
      weight_decay: decoupled: the step also takes learning_rate · weight_decay · params off.
    """

    direction = _of_each(norms, lambda norm, g: norm.lmo(g))
    return _step(direction, learning_rate, weight_decay)


def sharp_step(
    norms: Setting, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """The step −γ G^♯, to be added to the parameters: as long as γ ‖G‖_* (paper M, equation 4).

    Steepest descent in the norm. The step of paper M's Theorems 3, 5, 14, 19, on smooth functions.

    Args:
      norms: as in `lmo_step`.
      learning_rate: γ, or a schedule for it.
    """

    return _step(_of_each(norms, lambda norm, g: -norm.sharp(g)), learning_rate)


def _of_each(norms, oracle):
    """`oracle` of each leaf's norm and the leaf."""

    def update(updates, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        chosen = per_leaf(norms, updates, Norm)
        return treedef.unflatten(oracle(norm, g) for norm, g in zip(chosen, leaves, strict=True))

    def init(params):
        per_leaf(norms, params, Norm)  # an error as early as can be
        return optax.EmptyState()

    return optax.GradientTransformation(init, optax.stateless(update).update)


def _step(direction, learning_rate, weight_decay=0.0):
    """`direction`, to be added, with decoupled weight decay, times the learning rate."""
    decay = [] if is_zero(weight_decay) else [optax.add_decayed_weights(-here(weight_decay))]
    scale = optax.scale_by_learning_rate(here(learning_rate), flip_sign=False)
    return optax.chain(direction, *decay, scale)


def normalize() -> optax.GradientTransformation:
    """G / ‖G‖, with the Euclidean norm of the whole tree; zero stays zero (paper N, line 9)."""

    def update(updates, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates
        # One vector, so that the largest entry and the norm are those of the whole tree.
        widest = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize)
        whole = jnp.concatenate([leaf.ravel().astype(widest) for leaf in leaves])
        ends = list(itertools.accumulate(leaf.size for leaf in leaves))[:-1]
        parts = jnp.split(unit_scale(whole, (0,)), ends)
        return treedef.unflatten(
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        )

    return optax.stateless(update)


def ef21_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.9,
    uplink: Setting | None = None,
    downlink: Setting = Identity(),
    extrapolation: float | jax.Array | None = None,
    rules: tuple[Rule, ...] = SCION_RULES,
    weight_decay: float | jax.Array = 0.0,
    axis_name: AxisName = None,
    mean_axis_name: AxisName = None,
    topology: Topology = Gather(),
    seed: int = 0,
) -> Distributed:
    """EF21-Muon (paper M, Algorithm 3).

    Args:
      learning_rate: the radius of a layer is learning_rate × its rule's scale, in its norm.
      momentum: the paper's 1 − β: the weight of the old momentum.
      uplink: compressor of the workers' messages, one for each role (`ByRole`), or a prefix tree of
        them. A single one is used where the rules say `compress`; vectors go as they are. None:
        `DEFAULT_UPLINK`.
      downlink: likewise of the server's. `Identity()` keeps no residual: then W = X. Where the
        server is sharded and it travels, `BlockNatural()` is a good choice.
      extrapolation: κ of `ef21`: the step is taken from G + κ mean_j R_j. None: 0, as in the paper,
        for an `uplink` of your own, and `DEFAULT_EXTRAPOLATION` with the default one, which makes
        up for much of what it delays.
      rules: the layers' norms and scales, see `routes`.
      weight_decay: decoupled, times the learning rate; acts on the server's model X.
      axis_name: the axis over which the workers are mapped; None for a single one.
      mean_axis_name: the axes of the devices within a worker, over which gradients are averaged.
      topology: `Gather()`, or `Sharded(n)` for a server that is spread over the n workers. What
        becomes of each layer then is in `routes`.
      seed: of all randomness.

    Raises:
      ValueError: for parameters out of range; when first given parameters, for a leaf that no
        rule claims; and as `distribute` does.
    """

    if extrapolation is None:
        extrapolation = DEFAULT_EXTRAPOLATION if uplink is None else 0.0
    uplink = DEFAULT_UPLINK if uplink is None else uplink

    def assemble(up, down, norms, topology):
        feedback = ef21(up, extrapolation=extrapolation)
        return distribute(
            # M_j ← (1 − β) M_j + β ∇f_j(W; ξ_j), and then R_j = C_j(M_j − G_j),  G_j ← G_j + R_j
            worker=feedback.after(worker_momentum(momentum)),
            server=optax.chain(
                feedback.server,  # G ← G + mean_j R_j, and a step from G + κ mean_j R_j
                lmo_step(norms, learning_rate, weight_decay=weight_decay),  # X ← X + t LMO(·)
            ),
            downlink=None if downlink == Identity() else ef21_p(down),  # S = C(X − W),  W ← W + S
            axis_name=axis_name,
            mean_axis_name=mean_axis_name,
            topology=topology,
            seed=seed,
        )

    return grouped(
        assemble,
        topology,
        up=(compressors_by(rules, uplink), Compressor),
        down=(compressors_by(rules, downlink), Compressor),
        norms=(norms_by(rules), Norm),
    )


def gluon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.9,
    rules: tuple[Rule, ...] = SCION_RULES,
    weight_decay: float | jax.Array = 0.0,
    axis_name: AxisName = None,
    mean_axis_name: AxisName = None,
    topology: Topology = Gather(),
) -> Distributed:
    """Gluon (Riabinin et al. 2025): LMO steps without compression, X ← X + t LMO(M).

    Gradients are averaged by a reduction; there is one momentum, at the server, since the mean of
    momenta is the momentum of means. Same steps as `ef21_muon` with Identity compressors.
    Arguments and errors are those of `ef21_muon`.
    """

    def assemble(norms, topology):
        return distribute(
            worker=optax.identity(),
            server=optax.chain(
                worker_momentum(momentum),
                lmo_step(norms, learning_rate, weight_decay=weight_decay),
            ),
            axis_name=axis_name,
            mean_axis_name=mean_axis_name,
            topology=topology,
        )

    return grouped(assemble, topology, norms=(norms_by(rules), Norm))


def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.9,
    constrained: bool = False,
    axis_name: AxisName = None,
    mean_axis_name: AxisName = None,
    topology: Topology = Gather(),
) -> Distributed:
    """Scion (Pethick et al. 2025): Gluon with Spectral hidden layers, Sign elsewhere.

    Args:
      constrained: the Frank-Wolfe form, X ← (1 − t) X + t · scale · LMO(M), which keeps every layer
        in the ball of radius scale.

    The other arguments and the errors are those of `ef21_muon`.
    """
    return gluon(
        learning_rate,
        momentum=momentum,
        rules=SCION_RULES,
        weight_decay=1.0 if constrained else 0.0,
        axis_name=axis_name,
        mean_axis_name=mean_axis_name,
        topology=topology,
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = True,
    weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    rules: tuple[Rule, ...] = MUON_RULES,
    axis_name: AxisName = None,
    mean_axis_name: AxisName = None,
    topology: Topology = Gather(),
) -> Distributed:
    """Muon (Jordan 2024): Spectral steps for hidden kernels, AdamW for all else.

    Args:
      learning_rate: in units of the spectral norm, times √max(1, fan_out / fan_in).
      momentum: of the heavy ball, which starts at zero.
      nesterov: step along the gradient plus momentum times the ball, not along the ball.
      weight_decay: of both, decoupled.
      adam_learning_rate: of AdamW. None: `learning_rate`.
      rules: leaves with the role "adam" go to AdamW.

    The other arguments and the errors are those of `ef21_muon`.
    """
    check_decay(momentum)
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate

    def methods(params: Any):
        found = ["adam" if rule.role == "adam" else "spectral" for rule in claim(rules, params)]
        return jax.tree.structure(params).unflatten(found)

    def assemble(norms, methods, topology):
        spectral = optax.chain(
            optax.trace(here(momentum), nesterov=nesterov),
            lmo_step(norms, learning_rate, weight_decay=weight_decay),
        )
        adam = optax.adamw(here(adam_rate), weight_decay=here(weight_decay))
        return distribute(
            worker=optax.identity(),
            server=optax.partition({"spectral": spectral, "adam": adam}, methods),
            axis_name=axis_name,
            mean_axis_name=mean_axis_name,
            topology=topology,
        )

    return grouped(assemble, topology, norms=(norms_by(rules), Norm), methods=(methods, str))


def ef21_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    uplink: Setting,
    downlink: Setting = Identity(),
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """EF21 (Richtárik et al. 2021): x ← x − γ G; with a downlink, EF21-P + EF21.

    Arguments and errors are those of `ef21_muon`; every leaf is compressed.
    """
    return _euclidean(ef21, [], _descent(learning_rate), uplink, downlink, axis_name, seed)


def ef21_sgdm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.9,
    uplink: Setting,
    downlink: Setting = Identity(),
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """EF21-SGDM (Fatkhullin et al. 2023): EF21 on momenta M_j ← momentum M_j + (1 − momentum) ∇f_j.

    Arguments and errors are those of `ef21_muon`; every leaf is compressed.
    """
    before = [worker_momentum(momentum)]
    return _euclidean(ef21, before, _descent(learning_rate), uplink, downlink, axis_name, seed)


def normalized_ef21(
    learning_rate: optax.ScalarOrSchedule,
    *,
    uplink: Setting,
    downlink: Setting = Identity(),
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """Normalized EF21 (paper N, Algorithm 1): x ← x − γ v / ‖v‖, for (L0, L1)-smooth functions.

    Arguments and errors are those of `ef21_muon`; every leaf is compressed.
    """
    step = optax.chain(normalize(), _descent(learning_rate))
    return _euclidean(ef21, [], step, uplink, downlink, axis_name, seed)


def ef14_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    uplink: Setting,
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """EF14 (Seide et al. 2014; Stich et al. 2018): x ← x − mean_j C(e_j + γ ∇f_j).

    The learning rate stands before the compressor: what is withheld keeps the rate of its time.
    Arguments and errors are those of `ef21_muon`; every leaf is compressed.
    """
    before = [_descent(learning_rate)]
    return _euclidean(ef14, before, optax.identity(), uplink, Identity(), axis_name, seed)


def compressed_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    uplink: Setting,
    axis_name: AxisName = None,
    seed: int = 0,
) -> Distributed:
    """x ← x − γ mean_j C(∇f_j), without feedback. With a biased compressor it may diverge.

    The baseline that error feedback is there to mend (Beznosikov et al. 2020, Example 1).
    Arguments and errors are those of `ef21_muon`; every leaf is compressed.
    """
    step = _descent(learning_rate)
    return _euclidean(no_feedback, [], step, uplink, Identity(), axis_name, seed)


def _descent(learning_rate):
    def made():  # where it is used: there an injected rate lies as all else does
        return optax.scale_by_learning_rate(here(learning_rate))

    def update(updates, state, params=None):
        return made().update(updates, state, params)

    return optax.GradientTransformation(lambda params: made().init(params), update)


def _euclidean(mechanism, before, step, uplink, downlink, axis_name, seed):
    def assemble(up, down, topology):
        feedback = mechanism(up)
        return distribute(
            worker=feedback.after(*before),
            server=optax.chain(feedback.server, step),
            downlink=None if downlink == Identity() else ef21_p(down),
            axis_name=axis_name,
            topology=topology,
            seed=seed,
        )

    return grouped(assemble, up=(uplink, Compressor), down=(downlink, Compressor))
