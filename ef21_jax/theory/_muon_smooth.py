"""EF21-Muon on smooth functions, exact gradients (paper M): Theorems 3 and 14.

Steps are X_i ← X_i − γ_i G_i^♯, `sharp_step` with learning rate γ_i. Gradients are smooth from a
norm to its dual: ‖∇f(X) − ∇f(Y)‖_* <= L ‖X − Y‖ (Assumption 3). Theorem 14 has constants
for each layer i, ‖∇_i f(X) − ∇_i f(Y)‖_* <= L_i ‖X_i − Y_i‖ for all X and Y (Assumption 6): read as
it stands, the layers do not interact. Theorem 3 is that with a single layer.

`L_workers` holds the L_j of the f_j, a tuple of n, or a tuple of n for each layer. Of them the
theorems need n and L̃, the root of the mean square. `gap` is f(X^0) − f*.

α_P is the contraction of the downlink in the norm, α_D that of the uplink in the dual norm where
gradients are exact, in the Euclidean norm where they are noisy: `compressor.contraction`.
"""

import dataclasses
import math
from collections.abc import Sequence

import optax

from ._checks import lined_up, nonnegative, positive, share
from ._layers import each, mean, mean_square, of_one_layer, over_mean, plus


class StepSizes:
    """Steps for layers."""

    gamma: tuple[float, ...]

    def step_size(self) -> tuple[optax.Schedule, ...]:
        """γ_i as schedules, one a layer."""
        return tuple(map(optax.constant_schedule, self.gamma))

    @property
    def weights(self) -> tuple[float, ...]:
        """γ_i / mean_l γ_l, of the layers in the left side."""
        return over_mean(self.gamma)


class StepSize:
    """Steps for a single layer."""

    layered: StepSizes

    @property
    def gamma(self) -> float:
        """γ."""
        return self.layered.gamma[0]

    def step_size(self) -> optax.Schedule:
        """γ as a schedule."""
        return optax.constant_schedule(self.gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem14(StepSizes):
    """Exact gradients, layer by layer (p. 40): Algorithm 2 with γ_i <= 1 / (2 L_i + 2 √ζ_i).

    ζ_i = (4 / α_D²) (12 + 66 / α_P²) L̃_i², from the proof: of the printed step size, the root is
    one of 12 + 66 / α_P² alone, without L̃_i. Uplink in B_*(α_D), downlink in B(α_P).

    Attributes:
      scale: γ over the largest that is allowed.

    Raises:
      ValueError: for constants out of range, or of differing numbers of layers or workers.
    """

    L: Sequence[float]
    L_workers: Sequence[Sequence[float]]
    gap: float
    alpha_D: float
    alpha_P: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check(self)
        lined_up("layer", L=self.L, L_workers=self.L_workers)
        lined_up("worker", **each(L_workers=self.L_workers))

    @property
    def gamma(self) -> tuple[float, ...]:
        """γ_i."""
        factor = 4 / self.alpha_D * math.sqrt(12 + 66 / self.alpha_P**2)
        return tuple(
            self.scale / (2 * L + factor * math.sqrt(mean_square(workers)))
            for L, workers in zip(self.L, self.L_workers, strict=True)
        )

    def lyapunov(
        self,
        gap: float,
        *,
        estimates: Sequence[float] | None = None,
        models: Sequence[float] | None = None,
    ) -> float:
        """Ψ^k, which falls by Σ_i γ_i ‖∇_i f(X^k)‖_*² / 4 or more in a step, in expectation.

        Args:
          gap: f(X^k) − f*.
          estimates: mean_j ‖∇_i f_j(X^k) − G_ij^k‖_*², one a layer. None: zero.
          models: ‖X_i^k − W_i^k‖², one a layer. None: zero.
        """
        of_models = 66 / self.alpha_D**2 * (2 / self.alpha_P - 1)
        factors = [6 * gamma / self.alpha_D for gamma in self.gamma]
        total = plus(gap, factors, estimates)
        factors = [
            of_models * gamma * mean_square(workers)
            for gamma, workers in zip(self.gamma, self.L_workers, strict=True)
        ]
        return plus(total, factors, models)

    def bound(self, iterations: int, psi: float | None = None) -> float:
        """Of mean_{k<K} Σ_i weights_i E‖∇_i f(X^k)‖_*².

        Args:
          iterations: K.
          psi: Ψ^0. None: that of G_j^0 = ∇f_j(X^0), W^0 = X^0 (`warm_start`), the gap.
        """
        positive(iterations=iterations)
        psi = self.gap if psi is None else psi
        return 4 * psi / (iterations * mean(self.gamma))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem3(StepSize):
    """Exact gradients (p. 7): Algorithm 2, started exactly, with one layer of Theorem 14.

    γ <= 1 / (2L + (4/α_D) √(12 + 66/α_P²) L̃). L̃ is printed within the last term of the root. It
    belongs outside, as the proof of Theorem 14 has it, and as a step size is in units of 1/L.

    Attributes:
      scale: γ over the largest that is allowed.

    Raises:
      ValueError: for constants out of range.
    """

    L: float
    L_workers: Sequence[float]
    gap: float
    alpha_D: float
    alpha_P: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check(self)

    @property
    def layered(self) -> Theorem14:
        """The same of one layer."""
        return Theorem14(**of_one_layer(self, "L", "L_workers"))

    def bound(self, iterations: int) -> float:
        """Of mean_{k<K} E‖∇f(X^k)‖_*²: 4 gap / (K γ)."""
        return self.layered.bound(iterations)


def check(theorem):
    """Raises a ValueError for the constants that all of these theorems have."""
    positive(L=theorem.L, L_workers=theorem.L_workers)
    nonnegative(gap=theorem.gap)
    share(alpha_D=theorem.alpha_D, alpha_P=theorem.alpha_P, scale=theorem.scale)
