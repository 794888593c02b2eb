"""Logistic regression with a nonconvex regularizer, one worker a sample (paper N, 4.1 and E).

    f_i(x) = log(1 + exp(−b_i ⟨a_i, x⟩)) + λ Σ_j x_j² / (1 + x_j²)

Section 4.1 prints λ / n before the regularizer, Appendix E prints λ. We take λ: the constants of
both places, and the condition for f to be nonconvex, λ > λ_min(AᵀA) / (2n), are those of λ.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def nonconvex_penalty(x):
    """Σ_j x_j² / (1 + x_j²). Its second derivatives lie in [−1/2, 2], its first in (−1, 1)."""
    return jnp.sum(jnp.square(x) / (1 + jnp.square(x)))


@dataclasses.dataclass(frozen=True)
class Logistic:
    """Samples, and λ. All constants are the paper's.

    Raises:
      ValueError: for labels other than ±1, a label too few, or a λ that is not positive.
    """

    features: np.ndarray  # A, (n, d)
    labels: np.ndarray  # b, (n,), each 1 or -1
    penalty: float = 0.1  # λ

    def __post_init__(self):
        if np.shape(self.labels) != np.shape(self.features)[:1]:
            raise ValueError(
                f"`features` of shape {np.shape(self.features)} need one label a row, got "
                f"`labels` of shape {np.shape(self.labels)}."
            )
        if not np.all(np.isin(self.labels, (-1, 1))):
            raise ValueError(f"`labels` must be 1 or -1, got {np.unique(self.labels)}.")
        if not self.penalty > 0:
            raise ValueError(f"`penalty` must be positive, got {self.penalty}.")

    @staticmethod
    def loss(x, worker):
        """f_i; `worker` has the row a_i of shape (d,), the label b_i and λ."""
        margin = worker["label"] * jnp.dot(worker["row"], x)
        return jax.nn.softplus(-margin) + worker["penalty"] * nonconvex_penalty(x)

    @property
    def workers(self):
        """Leaves (n, d), (n,), (n,)."""
        features = np.asarray(self.features, float)
        labels = np.asarray(self.labels, float)
        return {"row": features, "label": labels, "penalty": np.full_like(labels, self.penalty)}

    @property
    def dimension(self) -> int:
        return self.features.shape[1]

    def start(self, seed: int) -> np.ndarray:
        """x⁰, each entry from N(0, 1)."""
        return np.random.default_rng(seed).normal(size=self.dimension)

    @property
    def L(self) -> float:
        """Of f: ‖A‖² / (4n) + 2λ, since the logistic function's slope is at most 1/4."""
        spectral = np.linalg.norm(self.features, 2)
        return float(spectral**2 / (4 * len(self.features)) + 2 * self.penalty)

    @property
    def L_workers(self) -> tuple[float, ...]:
        """Of the f_i: ‖a_i‖² / 4 + 2λ."""
        own = np.square(self._row_lengths()) / 4 + 2 * self.penalty
        return tuple(own.tolist())

    @property
    def L0(self) -> float:
        """Of every f_i: 2λ + λ √d max ‖a_i‖, together with L1.

        With p = 1 / (1 + exp(b⟨a, x⟩)) the logistic part has the gradient −p b a and the Hessian
        p (1 − p) a aᵀ, so ‖Hessian‖ ≤ ‖a‖ ‖gradient‖, and the regularizer adds 2λ to the left and
        takes λ √d from the gradient at most.
        """
        root = np.sqrt(self.dimension)
        return float(2 * self.penalty + self.penalty * root * np.max(self._row_lengths()))

    @property
    def L1(self) -> float:
        """Of every f_i: max ‖a_i‖, see `L0`."""
        return float(np.max(self._row_lengths()))

    @property
    def lower_bound(self) -> float:
        """Zero, of f and of every f_i. Not the infimum, which has no closed form.

        The theorems need no more: in their proofs f^inf and f_i^inf stand for any lower bounds.
        """
        return 0.0

    def _row_lengths(self):
        return np.linalg.norm(self.features, axis=1)


def synthetic(seed: int, n: int = 20, d: int = 10, penalty: float = 0.1) -> Logistic:
    """The paper's generated data: features from N(0, 1), labels ±1 with equal probability."""
    rng = np.random.default_rng([seed, n, d])  # not the numbers that `start` draws
    return Logistic(rng.normal(size=(n, d)), rng.choice([-1.0, 1.0], size=n), penalty)
