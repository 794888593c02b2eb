"""The polynomial of paper N, Appendix F.1: no constant L, but L0 and L1.

    f(x) = (λ / 24) Σ_i x_i⁴ + λ Σ_i x_i² / (1 + x_i²)

It is not convex near |x_i| = 1, and its only stationary point is 0, where f is least and zero.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from experiments.problems.logistic import nonconvex_penalty


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """One worker. L0 and L1 are given, and λ is what makes them right, as in the paper.

    ‖∇²f‖ ≤ L0 + L1 ‖∇f‖ with L0 = 9 λ d² / (2 L1²) + 2 λ, for any L1 > 0. There is slack: the
    spectral norm of a diagonal matrix is bounded by the sum of its entries, and the regularizer's
    part of the gradient by zero.

    Raises:
      ValueError: for constants that are not positive.
    """

    L0: float = 4.0
    L1: float = 1.0
    dimension: int = 4  # d

    def __post_init__(self):
        for name in ("L0", "L1", "dimension"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    @staticmethod
    def loss(x, worker):
        """f; `worker` has λ."""
        return worker["penalty"] * (jnp.sum(x**4) / 24 + nonconvex_penalty(x))

    @property
    def workers(self):
        """A leaf (1,)."""
        return {"penalty": np.array([self.penalty])}

    @property
    def penalty(self) -> float:
        """λ = L0 / (9 d² / (2 L1²) + 2)."""
        return self.L0 / (9 * self.dimension**2 / (2 * self.L1**2) + 2)

    def start(self, seed: int) -> np.ndarray:
        """x⁰, each entry from N(20, 1)."""
        return np.random.default_rng(seed).normal(20.0, 1.0, size=self.dimension)

    def L(self, reach: float) -> float:
        """λ √d D² / 2 + 2 λ: of f where every |x_i| is at most the reach D.

        The paper takes D = 20 of every start from N(20, 1), half of whose entries lie beyond.
        """
        return self.penalty * (math.sqrt(self.dimension) * reach**2 / 2 + 2)

    @property
    def lower_bound(self) -> float:
        """Zero, which f has at zero."""
        return 0.0
