"""Normalized EF21 under generalized smoothness, and EF21 beside it (paper N).

Both theorems are about the iterates x⁰, …, x^K: K + 1 rounds, of which the last one's step is not
looked at. Both bound the smallest expected ‖∇f(x^k)‖, Euclidean, among them.
"""

import dataclasses
import math

from ._checks import nonnegative, positive, share


@dataclasses.dataclass(frozen=True)
class NormalizedEF21:
    """Paper N, Theorem 1: ‖v‖-normalized steps of length γ = γ0 / √(K + 1), any γ0 > 0.

    Every f_i is symmetric (L0, L1)-smooth (Assumption 3), e.g. ‖∇²f_i‖ ≤ L0 + L1 ‖∇f_i‖.

    The printed theorem has γ0 b where its own proof (last line of D.1) has γ0 b exp(L1 γ0). We
    keep the exponential: without it the statement is not what is proved. Lemma 7 as printed lacks
    exp(L1 γ) too, and its proof has it.

    Where L1 γ0 is not small the first term is astronomical, `inf` in floats, although the method
    may do well: with γ0 of `moderate_gamma0` both exponentials stay below √2.

    Attributes:
      L0, L1: of every worker's function. L1 = 0 is traditional smoothness.
      alpha: of the compressor, E‖C(x) − x‖² ≤ (1 − α)‖x‖².
      gamma0: γ0.
      delta_inf: δ = f^inf − mean_i f_i^inf, how far the workers disagree. With a lower bound in
        the place of every infimum the proof stands, so δ = 0 where zero is below all of them.

    Raises:
      ValueError: for constants out of range.
    """

    L0: float
    L1: float
    alpha: float
    gamma0: float = 1.0
    delta_inf: float = 0.0

    def __post_init__(self):
        positive(L0=self.L0, gamma0=self.gamma0)
        nonnegative(L1=self.L1, delta_inf=self.delta_inf)
        share(alpha=self.alpha)

    def step_size(self, iterations: int) -> float:
        """γ = γ0 / √(K + 1), the same in every round: K must be known beforehand."""
        nonnegative(iterations=iterations)
        return self.gamma0 / math.sqrt(iterations + 1)

    @property
    def c0(self) -> float:
        """c L0, with c = 1/2 + 2 √(1 − α) / (1 − √(1 − α))."""
        return _c(self.alpha) * self.L0

    @property
    def c1(self) -> float:
        """c L1. The constant step 1 / (2 c1) is what Appendix F.1 runs beside Theorem 1's."""
        return _c(self.alpha) * self.L1

    @property
    def b(self) -> float:
        """2 c0 + 8 L1 c1 δ."""
        return 2 * self.c0 + 8 * self.L1 * self.c1 * self.delta_inf

    def lyapunov(self, iterations: int, *, gap: float, distance: float) -> float:
        """V^k = f(x^k) − f^inf + 2γ / (1 − √(1 − α)) · mean_i ‖∇f_i(x^k) − v_i^k‖.

        Args:
          iterations: K, which sets γ.
          gap: f(x^k) − f^inf.
          distance: mean_i ‖∇f_i(x^k) − v_i^k‖, with v_i^k after round k's message.
        """
        nonnegative(gap=gap, distance=distance)
        return gap + 2 * self.step_size(iterations) / _theta(self.alpha) * distance

    def bound(self, iterations: int, *, gap: float, distance: float) -> float:
        """[V⁰ exp(8 c1 L1 exp(L1 γ0) γ0²) / γ0 + γ0 b exp(L1 γ0)] / √(K + 1).

        Arguments are those of `lyapunov` at k = 0.
        """
        start = self.lyapunov(iterations, gap=gap, distance=distance)
        beyond = _exp(self.L1 * self.gamma0)
        growth = _exp(8 * self.c1 * self.L1 * beyond * self.gamma0**2)
        first = start * growth / self.gamma0 if start else 0.0  # 0 · inf is no number
        return (first + self.gamma0 * self.b * beyond) / math.sqrt(iterations + 1)


def moderate_gamma0(L1: float, alpha: float) -> float:
    """γ0 = 1 / (8 c L1), after Theorem 1 of paper N, where c is as in `NormalizedEF21.c0`.

    The bound is then at most (32 c L1 V⁰ + L0 / L1 + 2 L1 δ) / √(K + 1).

    Raises:
      ValueError: for constants out of range.
    """
    positive(L1=L1)
    share(alpha=alpha)
    return 1 / (8 * _c(alpha) * L1)


@dataclasses.dataclass(frozen=True)
class EF21:
    """Richtárik, Sokolov, Fatkhullin 2021, Theorem 1, as paper N (end of section 3, 4.1) has it.

    Steps x ← x − γ v with γ = 1 / (L + L~ √(β / θ)), where θ = 1 − √(1 − α) and
    β = (1 − α) / θ. Paper N states the bound for exact first estimates; we keep the original's
    second term, which is that of any.

    Attributes:
      L: Lipschitz constant of ∇f.
      L_tilde: L~, root of the mean over the workers of L_i².
      alpha: of the compressor.

    Raises:
      ValueError: for constants out of range.
    """

    L: float
    L_tilde: float
    alpha: float

    def __post_init__(self):
        positive(L=self.L, L_tilde=self.L_tilde)
        share(alpha=self.alpha)

    @property
    def step_size(self) -> float:
        """γ = 1 / (L + L~ √(β / θ)), the same for every K."""
        ratio = math.sqrt(1 - self.alpha) / _theta(self.alpha)  # √(β / θ)
        return 1 / (self.L + self.L_tilde * ratio)

    def lyapunov(self, *, gap: float, squared_distance: float) -> float:
        """Ψ^k = f(x^k) − f^inf + γ / (2θ) · mean_i ‖∇f_i(x^k) − v_i^k‖².

        Args:
          gap: f(x^k) − f^inf.
          squared_distance: mean_i ‖∇f_i(x^k) − v_i^k‖², with v_i^k after round k's message.
        """
        nonnegative(gap=gap, squared_distance=squared_distance)
        return gap + self.step_size / (2 * _theta(self.alpha)) * squared_distance

    def bound(self, iterations: int, *, gap: float, squared_distance: float) -> float:
        """√(2 Ψ⁰ / (γ (K + 1))), the root of the original's bound on the mean of ‖∇f(x^k)‖².

        Arguments are those of `lyapunov` at k = 0.
        """
        nonnegative(iterations=iterations)
        start = self.lyapunov(gap=gap, squared_distance=squared_distance)
        return math.sqrt(2 * start / (self.step_size * (iterations + 1)))


def _theta(alpha):
    """1 − √(1 − α), without the cancellation at small α."""
    return alpha / (1 + math.sqrt(1 - alpha))


def _c(alpha):
    return 0.5 + 2 * math.sqrt(1 - alpha) / _theta(alpha)


def _exp(x):
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
