"""Holds a run against its theorem: the measured left side, and the promised right side, at every K.

Both theorems of paper N bound the smallest ‖∇f(x^k)‖ among x⁰, …, x^K. Each run here is of a
deterministic compressor, so nothing is left to expectation.
"""

import math

import numpy as np

import ef21_jax as ef21
from ef21_jax import theory
from experiments import descent


def of_ef21(problem, alpha, path):
    """EF21's step size is one for all K, so one run has the left side at every K.

    Args:
      problem: with constants L, L_workers and a lower bound of f.
      alpha: of the uplink.
      path: by `descent.path` at the theorem's step size; leaves (starts, K + 1).
    """
    measured = np.sqrt(np.minimum.accumulate(path["squared_gradient"], axis=1))
    ks = np.arange(measured.shape[1])
    promised = []
    for loss, squares in zip(path["loss"][:, 0], path["squared_distance"][:, 0], strict=True):
        theorem = ef21_of(problem, alpha, loss - problem.lower_bound)
        psi = theorem.lyapunov(theorem.gap, estimates=squares)
        promised.append([theorem.bound(int(K), psi) for K in ks])
    return _record("EF21", measured, np.array(promised), ks, theorem.gamma)


def of_normalized(problem, alpha, starts, iterations, *, uplink, gamma0=None):
    """The step size depends on K, so every K of a grid up to `iterations` is a run of its own.

    First estimates are zero, so that both parts of V⁰ count.

    Args:
      problem: with constants L0, L1 and a lower bound of f and of every f_i.
      alpha: of the uplink.
      starts: (starts, d).
      iterations: the largest K.
      uplink: the workers' compressor.
      gamma0: None: that of `theory.moderate_gamma0`, with which the bound is of this world.
    """
    gamma0 = theory.moderate_gamma0(problem.L1, alpha) if gamma0 is None else gamma0
    ks = np.unique(np.geomspace(1, iterations, 7).round().astype(int))
    start, K = descent.lanes(np.arange(len(starts)), ks)
    steps = gamma0 / np.sqrt(K + 1)
    path = descent.path(
        ef21.normalized_ef21, problem, starts[start], steps, int(ks[-1]), uplink=uplink
    )
    best = np.minimum.accumulate(path["squared_gradient"], axis=1)
    measured = np.sqrt(best[np.arange(len(K)), K])
    promised = []
    for k, loss, distance in zip(K, path["loss"][:, 0], path["distance"][:, 0], strict=True):
        theorem = normalized_of(problem, alpha, gamma0, loss - problem.lower_bound)
        psi = theorem.lyapunov(int(k), theorem.gap, estimates=distance)
        promised.append(theorem.bound(int(k), psi))
    shape = len(starts), len(ks)
    return _record(
        "normalized EF21", measured.reshape(shape), np.reshape(promised, shape), ks, gamma0
    )


def ef21_of(problem, alpha, gap=0.0):
    """The theorem with the problem's constants."""
    return theory.EF21(L=problem.L, L_workers=problem.L_workers, gap=gap, alpha=alpha)


def normalized_of(problem, alpha, gamma0, gap=0.0):
    """The theorem with the problem's constants; its lower bound is one of every f_i."""
    return theory.NormalizedEF21(L0=problem.L0, L1=problem.L1, gap=gap, alpha=alpha, gamma0=gamma0)


def _record(theorem, measured, promised, ks, size):
    """Shapes (starts, len(ks)). `violations` counts starts and K; of all K few are kept."""
    shares = measured / promised
    if not np.all(np.isfinite(promised)):
        raise ValueError(f"{theorem}: a bound overflows, there is nothing to hold against it.")
    few = np.unique(np.geomspace(1, len(ks), 12).round().astype(int)) - 1
    return {
        "bound": theorem,
        "size": size,
        "k": ks[few].tolist(),
        "measured": [float(f"{x:.6g}") for x in np.max(measured, axis=0)[few]],
        "promised": [float(f"{x:.6g}") for x in np.min(promised, axis=0)[few]],
        "largest_share": float(np.max(shares)),
        # A NaN is no proof of anything, so it counts.
        "violations": int(math.prod(shares.shape) - np.sum(shares <= 1)),
    }
