"""Holds a run against its theorem: the measured left side, and the promised right side, at every K.

Both theorems of paper N bound the smallest ‖∇f(x^k)‖ among x⁰, …, x^K. Each run here is of a
deterministic compressor, so nothing is left to expectation.
"""

import math

import numpy as np

import ef21_jax as ef21
from ef21_jax import theory
from experiments import descent


def of_ef21(theorem, path, lower_bound):
    """Of one step size for all K, so that one run has the left side at every K.

    Args:
      theorem: `theory.EF21`.
      path: by `descent.path` at the theorem's step size; leaves (starts, K + 1).
      lower_bound: of f.
    """
    measured = np.sqrt(np.minimum.accumulate(path["squared_gradient"], axis=1))
    ks = np.arange(measured.shape[1])
    promised = [
        [
            theorem.bound(int(k), gap=loss - lower_bound, squared_distance=squared_distance)
            for k in ks
        ]
        for loss, squared_distance in zip(
            path["loss"][:, 0], path["squared_distance"][:, 0], strict=True
        )
    ]
    return _record("EF21", measured, np.array(promised), ks, theorem.step_size)


def of_normalized(problem, alpha, starts, iterations, *, uplink, gamma0=None):
    """The step size depends on K, so every K of a grid up to `iterations` is a run of its own.

    Args:
      problem: with constants L0, L1 and a lower bound of f and of every f_i.
      alpha: of the uplink.
      starts: (starts, d).
      gamma0: None: that of `theory.moderate_gamma0`, with which the bound is of this world.
    """
    gamma0 = theory.moderate_gamma0(problem.L1, alpha) if gamma0 is None else gamma0
    theorem = theory.NormalizedEF21(problem.L0, problem.L1, alpha, gamma0)
    ks = np.unique(np.geomspace(1, iterations, 7).round().astype(int))
    start, k = descent.lanes(np.arange(len(starts)), ks)
    step_sizes = [theorem.step_size(int(K)) for K in k]
    path = descent.path(
        ef21.normalized_ef21, problem, starts[start], step_sizes, int(ks[-1]), uplink=uplink
    )
    best = np.minimum.accumulate(path["squared_gradient"], axis=1)
    measured = np.sqrt(best[np.arange(len(k)), k])
    promised = [
        theorem.bound(int(K), gap=loss - problem.lower_bound, distance=distance)
        for K, loss, distance in zip(k, path["loss"][:, 0], path["distance"][:, 0], strict=True)
    ]
    shape = len(starts), len(ks)
    return _record(
        "normalized EF21", measured.reshape(shape), np.reshape(promised, shape), ks, gamma0
    )


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
