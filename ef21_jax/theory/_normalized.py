"""Normalized EF21 under generalized smoothness, and EF21 beside it (paper N).

Both theorems are about the iterates x⁰, …, x^K: K + 1 rounds, of which the last one's step is not
looked at. Both bound the smallest expected ‖∇f(x^k)‖, Euclidean, among them. `gap` is
f(x⁰) − f^inf, v_i^k is worker i's estimate after round k's message.
"""

import dataclasses
import math
from collections.abc import Sequence

import optax

from ._checks import nonnegative, positive, share
from ._layers import mean_square
from ._numbers import cost, exp, theta


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedEF21:
    """Theorem 1: ‖v‖-normalized steps of length γ = γ0 / √(K + 1), any γ0 > 0 (section 3, D.1).

    Every f_i is symmetric (L0, L1)-smooth (Assumption 3), e.g. ‖∇²f_i‖ ≤ L0 + L1 ‖∇f_i‖.

    The printed theorem has γ0 b where its own proof (last line of D.1) has γ0 b exp(L1 γ0). We
    keep the exponential: without it the statement is not what is proved. Lemma 7 as printed lacks
    exp(L1 γ) too, and its proof has it.

    Where L1 γ0 is not small the first term is astronomical, `inf` in floats, although the method
    may do well: with the γ0 of `moderate_gamma0` both exponentials stay below √2.

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
    gap: float
    alpha: float
    gamma0: float = 1.0
    delta_inf: float = 0.0

    def __post_init__(self):
        positive(L0=self.L0, gamma0=self.gamma0)
        nonnegative(L1=self.L1, gap=self.gap, delta_inf=self.delta_inf)
        share(alpha=self.alpha)

    def gamma(self, iterations: int) -> float:
        """γ = γ0 / √(K + 1), the same in every round: K must be known beforehand."""
        nonnegative(iterations=iterations)
        return self.gamma0 / math.sqrt(iterations + 1)

    def step_size(self, iterations: int) -> optax.Schedule:
        """γ as a schedule."""
        return optax.constant_schedule(self.gamma(iterations))

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

    def lyapunov(self, iterations: int, gap: float, *, estimates: float = 0.0) -> float:
        """V^k.

        Args:
          iterations: K, on which γ depends.
          gap: f(x^k) − f^inf.
          estimates: mean_i ‖∇f_i(x^k) − v_i^k‖.
        """
        nonnegative(gap=gap, estimates=estimates)
        return gap + 2 * self.gamma(iterations) / theta(self.alpha) * estimates

    def bound(self, iterations: int, psi: float | None = None) -> float:
        """Of min_{k<=K} E‖∇f(x^k)‖.

        [V⁰ exp(8 c1 L1 exp(L1 γ0) γ0²) / γ0 + γ0 b exp(L1 γ0)] / √(K + 1).

        Args:
          iterations: K.
          psi: V⁰. None: that of v_i⁰ = ∇f_i(x⁰) (`warm_start`), the gap.
        """
        start = self.lyapunov(iterations, self.gap) if psi is None else psi
        nonnegative(iterations=iterations, psi=start)
        beyond = exp(self.L1 * self.gamma0)
        growth = exp(8 * self.c1 * self.L1 * beyond * self.gamma0**2)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EF21:
    """Richtárik, Sokolov, Fatkhullin 2021, Theorem 1, as paper N (sections 3, 4.1) has it.

    Steps x ← x − γ v with γ = 1 / (L + L~ √(β / θ)), where θ = 1 − √(1 − α), β = (1 − α) / θ and
    L~ is the root of the mean square of the workers' constants. Paper N states the bound for exact
    first estimates; we keep the original's second term, which is that of any.

    Attributes:
      L: Lipschitz constant of ∇f.
      L_workers: of the ∇f_i, a tuple of n.
      alpha: of the compressor.

    Raises:
      ValueError: for constants out of range.
    """

    L: float
    L_workers: Sequence[float]
    gap: float
    alpha: float

    def __post_init__(self):
        positive(L=self.L, L_workers=self.L_workers)
        nonnegative(gap=self.gap)
        share(alpha=self.alpha)

    @property
    def gamma(self) -> float:
        """γ, the same for every K."""
        # √(β / θ) is the cost.
        return 1 / (self.L + math.sqrt(mean_square(self.L_workers)) * cost(self.alpha))

    def step_size(self) -> optax.Schedule:
        """γ as a schedule."""
        return optax.constant_schedule(self.gamma)

    def lyapunov(self, gap: float, *, estimates: float = 0.0) -> float:
        """Ψ^k, which falls by γ ‖∇f(x^k)‖² / 2 or more in a step, in expectation.

        Args:
          gap: f(x^k) − f^inf.
          estimates: mean_i ‖∇f_i(x^k) − v_i^k‖², here of the squares.
        """
        nonnegative(gap=gap, estimates=estimates)
        return gap + self.gamma / (2 * theta(self.alpha)) * estimates

    def bound(self, iterations: int, psi: float | None = None) -> float:
        """Of min_{k<=K} E‖∇f(x^k)‖: √(2 Ψ⁰ / (γ (K + 1))).

        It is the root of the original's bound on the mean of E‖∇f(x^k)‖² over k <= K.

        Args:
          iterations: K.
          psi: Ψ⁰. None: that of v_i⁰ = ∇f_i(x⁰) (`warm_start`), the gap.
        """
        start = self.gap if psi is None else psi
        nonnegative(iterations=iterations, psi=start)
        return math.sqrt(2 * start / (self.gamma * (iterations + 1)))


def _c(alpha):
    return 0.5 + 2 * cost(alpha)
