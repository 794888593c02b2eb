"""Three workers on which compressed descent without feedback diverges.

Beznosikov, Horváth, Richtárik, Safaryan, "On Biased Compression for Distributed Learning",
Example 1: with a = (−3, 2, 2), (2, −3, 2), (2, 2, −3)

    f_i(x) = ⟨a_i, x⟩² + ¼ ‖x‖²

From x = (t, t, t) every gradient is t/2 (9, 9, 9) with −11 in the place of the −3, which is what
Top-1 keeps. The mean of the messages is −11t/6 (1, 1, 1), so a step of length γ takes x away from
the minimum at 0, to (1 + 11γ/6) x, whatever γ > 0.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Counterexample:
    """Strongly convex, n = d = 3. The constants are eigenvalues, hence exact."""

    @staticmethod
    def loss(x, worker):
        """f_i; `worker` is a_i, of shape (3,)."""
        return jnp.square(jnp.dot(worker, x)) + jnp.sum(jnp.square(x)) / 4

    @property
    def workers(self):
        """A leaf (3, 3)."""
        return np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])

    dimension = 3

    def start(self, seed: int) -> np.ndarray:
        """For seed 0 the example's own, (1, 1, 1), else each entry from N(0, 1)."""
        return np.random.default_rng(seed).normal(size=3) if seed else np.ones(3)

    def growth(self, step_size: float) -> float:
        """1 + 11γ/6: how many times longer x is after a step without feedback."""
        return 1 + 11 * step_size / 6

    @property
    def L(self) -> float:
        """103/6. The mean of 2 a aᵀ is (50 I − 16 · 11ᵀ) / 3; at right angles to 1 it is 50/3."""
        return 50 / 3 + 1 / 2

    @property
    def mu(self) -> float:
        """7/6, the eigenvalue at (1, 1, 1)."""
        return 2 / 3 + 1 / 2

    @property
    def L_workers(self) -> tuple[float, ...]:
        """69/2 = 2 ‖a_i‖² + 1/2, of every worker."""
        return (2 * 17 + 1 / 2,) * 3

    @property
    def L0(self) -> float:
        """69/2: a function with a Lipschitz gradient is (L0, 0)-smooth."""
        return self.L_workers[0]

    L1 = 0.0

    @property
    def lower_bound(self) -> float:
        """Zero, which f and every f_i have at zero."""
        return 0.0
