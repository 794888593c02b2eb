"""EF21-Muon on smooth functions, noisy gradients (paper M): Theorems 5 and 19, Corollaries 1, 2.

Steps, smoothness and constants are those of `_muon_smooth`; Theorem 5 is Corollary 1 with a single
layer.
"""

import dataclasses
import math
from collections.abc import Sequence

import optax

from ._checks import equivalent, lined_up, nonnegative, positive, share
from ._layers import each, fields, mean, mean_square, of_one_layer, plus
from ._muon_smooth import StepSize, StepSizes, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noisy(StepSizes):
    """Algorithm 3 with any β_i in (0, 1] and γ_i <= 1 / (2 L_i + 2 √ζ_i)."""

    L: Sequence[float]
    L_workers: Sequence[Sequence[float]]
    gap: float
    sigma: Sequence[float]
    rho: Sequence[tuple[float, float]]
    alpha_D: float
    beta: Sequence[float]
    alpha_P: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check(self)
        nonnegative(sigma=self.sigma)
        equivalent(**each(rho=self.rho))
        share(beta=self.beta)
        lined_up(
            "layer",
            L=self.L,
            L_workers=self.L_workers,
            sigma=self.sigma,
            rho=self.rho,
            beta=self.beta,
        )
        lined_up("worker", **each(L_workers=self.L_workers))

    @property
    def workers(self) -> int:
        """n."""
        return len(self.L_workers[0])

    @property
    def momentum(self) -> tuple[float, ...]:
        """1 − β_i: the `momentum` of `ef21_muon`, the `decay` of `worker_momentum`."""
        return tuple(1 - beta for beta in self.beta)

    @property
    def gamma(self) -> tuple[float, ...]:
        """γ_i."""
        D, P = self.alpha_D, self.alpha_P
        gammas = []
        for L, workers, (low, high), beta in zip(
            self.L, self.L_workers, self.rho, self.beta, strict=True
        ):
            of_mean = 12 / beta**2 + 24 * (beta + 2) / P**2
            of_each = 36 * (beta**2 + 4) / D**2 + 144 * beta**2 * (2 * beta + 5) / (P * D) ** 2
            zeta = (high / low) ** 2 * (of_mean * L**2 + of_each * mean_square(workers))
            gammas.append(self.scale / (2 * L + 2 * math.sqrt(zeta)))
        return tuple(gammas)

    def _bound(self, iterations, psi):
        positive(iterations=iterations)
        D, n, gammas = self.alpha_D, self.workers, self.gamma
        noise = sum(
            (1 / n + (1 - D) * beta / D + 12 * beta**2 / D**2) * (sigma * high) ** 2 * beta * gamma
            for sigma, (_, high), beta, gamma in zip(
                self.sigma, self.rho, self.beta, gammas, strict=True
            )
        )
        return (4 * psi / iterations + 24 * noise) / mean(gammas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem19(_Noisy):
    """Noisy gradients, layer by layer (p. 47): Algorithm 3, any β_i, γ_i <= 1 / (2 L_i + 2 √ζ_i).

        ζ_i = (ρ̄_i / ρ_i)² (12 L_i² / β_i² + 24 (β_i + 2) L_i² / α_P²
              + 36 (β_i² + 4) L̃_i² / α_D² + 144 β_i² (2 β_i + 5) L̃_i² / (α_P α_D)²)

    with the ratio of both ρ, as in Theorem 5 and Remarks 22, 23; our copy of the paper has ρ̄_i/β_i
    in the statement, and the end of the proof has neither. Uplink in B_2(α_D), downlink in B(α_P).

    Attributes:
      sigma: σ_i, E‖∇_i f_j(X; ξ) − ∇_i f_j(X)‖_2² <= σ_i² (Assumption 10), one a layer.
      rho: `norm.equivalence(shape)`, one a layer.
      beta: β_i, the weight of the new gradient, one a layer.
      scale: γ over the largest that is allowed.

    Raises:
      ValueError: for constants out of range, or of differing numbers of layers or workers.
    """

    def lyapunov(
        self,
        gap: float,
        *,
        momenta: Sequence[float] | None = None,
        worker_momenta: Sequence[float] | None = None,
        estimates: Sequence[float] | None = None,
        models: Sequence[float] | None = None,
    ) -> float:
        """Ψ^k of the proof; Ψ^0 of the theorem where W^0 = X^0.

        Args:
          gap: E f(X^k) − f*.
          momenta: E‖∇_i f(X^k) − M_i^k‖_2², one a layer, with M the mean. None: zero.
          worker_momenta: mean_j E‖∇_i f_j(X^k) − M_ij^k‖_2². None: zero.
          estimates: mean_j E‖M_ij^k − G_ij^k‖_2². None: zero.
          models: E‖X_i^k − W_i^k‖². None: zero.
        """
        D, P = self.alpha_D, self.alpha_P
        layers = list(zip(self.L, self.L_workers, self.rho, self.beta, self.gamma, strict=True))
        total = gap
        for errors, factor in (
            (momenta, lambda beta: 1 / beta),
            (worker_momenta, lambda beta: 12 * beta / D**2),
            (estimates, lambda beta: 1 / D),
        ):
            factors = [6 * high**2 * factor(beta) * g for *_, (_, high), beta, g in layers]
            total = plus(total, factors, errors)
        factors = [
            6
            * (high / low) ** 2
            * (2 / P - 1)
            * ((b + 2) * L**2 + 6 * b**2 * (2 * b + 5) / D**2 * mean_square(workers))
            * g
            for L, workers, (low, high), b, g in layers
        ]
        return plus(total, factors, models)

    def bound(self, iterations: int, psi: float) -> float:
        """Of mean_{k<K} Σ_i weights_i E‖∇_i f(X^k)‖_*² (equation 15); `psi` is Ψ^0."""
        return self._bound(iterations, psi)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corollary1(_Noisy):
    """Theorem 19 from G_j^0 = M_j^0 = ∇f_j(X^0; ξ_j^0), W^0 = X^0 (p. 47).

    Printed with σ_i / (√n β_i) and σ_i in the term of order 1/K, where its proof bounds
    E‖∇f − M‖ by σ/√n. But Ψ^0 has the squares, so here it is σ_i² / (n β_i) and σ_i². (As printed
    it would not scale with the units of f.)

    Attributes and errors are those of Theorem 19.
    """

    def bound(self, iterations: int) -> float:
        """Of mean_{k<K} Σ_i weights_i E‖∇_i f(X^k)‖_*²."""
        psi = self.gap + sum(
            6 * high**2 * (1 / (self.workers * beta) + 12 * beta / self.alpha_D**2) * g * sigma**2
            for sigma, (_, high), beta, g in zip(
                self.sigma, self.rho, self.beta, self.gamma, strict=True
            )
        )
        return self._bound(iterations, psi)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem5(StepSize):
    """Noisy gradients (p. 8): Corollary 1 with a single layer, where γ, ζ and the bound are.

    Printed with σ and √n where the squares belong, as Corollary 1.

    Attributes:
      sigma: E‖∇f_j(X; ξ) − ∇f_j(X)‖_2² <= σ² (Assumption 5).
      rho: `norm.equivalence(shape)`.
      beta: the weight of the new gradient.
      scale: γ over the largest that is allowed.

    Raises:
      ValueError: for constants out of range.
    """

    L: float
    L_workers: Sequence[float]
    gap: float
    sigma: float
    rho: tuple[float, float]
    alpha_D: float
    beta: float
    alpha_P: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check(self)
        nonnegative(sigma=self.sigma)
        equivalent(rho=self.rho)
        share(beta=self.beta)

    @property
    def layered(self) -> Corollary1:
        """The same of one layer."""
        return Corollary1(**of_one_layer(self, "L", "L_workers", "sigma", "rho", "beta"))

    @property
    def momentum(self) -> float:
        """1 − β: the `momentum` of `ef21_muon`, the `decay` of `worker_momentum`."""
        return 1 - self.beta

    def bound(self, iterations: int) -> float:
        """Of mean_{k<K} E‖∇f(X^k)‖_*²."""
        return self.layered.bound(iterations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corollary2:
    """Theorem 5 with the β that makes its bound O(K^(−1/2)) (p. 48).

        β = min(1, (δ L n / s)^(1/2), (δ L α_D / s)^(1/3), (δ L α_D² / s)^(1/4)),  s = ρ² σ² K

    with ρ the lower one, and δ the gap, as after Theorem 5; the corollary writes Ψ^0, which itself
    depends on β. Its γ is printed as 1 / (√(2ζ) + 2L), more than Theorem 19 allows: here it is
    1 / (2√ζ + 2L), as after Theorem 5.

    Attributes and errors are those of Theorem 5.
    """

    L: float
    L_workers: Sequence[float]
    gap: float
    sigma: float
    rho: tuple[float, float]
    alpha_D: float
    alpha_P: float = 1.0
    scale: float = 1.0

    def __post_init__(self):
        check(self)
        positive(gap=self.gap)  # or β would be zero
        nonnegative(sigma=self.sigma)
        equivalent(rho=self.rho)

    def beta(self, iterations: int) -> float:
        """β for K iterations."""
        positive(iterations=iterations)
        s = (self.rho[0] * self.sigma) ** 2 * iterations
        if s == 0:
            return 1.0
        level, n, D = self.gap * self.L / s, len(self.L_workers), self.alpha_D
        return min(1.0, (level * n) ** (1 / 2), (level * D) ** (1 / 3), (level * D**2) ** (1 / 4))

    def at(self, iterations: int) -> Theorem5:
        """Theorem 5 for K iterations."""
        return Theorem5(**fields(self), beta=self.beta(iterations))

    def momentum(self, iterations: int) -> float:
        """1 − β."""
        return self.at(iterations).momentum

    def step_size(self, iterations: int) -> optax.Schedule:
        """γ as a schedule."""
        return self.at(iterations).step_size()

    def bound(self, iterations: int) -> float:
        """Of mean_{k<K} E‖∇f(X^k)‖_*²: that of Theorem 5, constants and all."""
        return self.at(iterations).bound(iterations)

    def order(self, iterations: int) -> float:
        """The sum under the O of the corollary, which has no constant.

        Its last term has ρ̄^(8/3) over the square of the lower ρ, as in the statement, and as (17)
        gives it; after Theorem 5 and in the proof the two have changed places.
        """
        positive(iterations=iterations)
        low, high = self.rho
        level, sigma, n = self.gap / (low**2 * iterations), self.sigma, len(self.L_workers)
        root = math.sqrt(mean_square(self.L_workers))
        return (
            level * high**2 * root / (self.alpha_P * self.alpha_D)
            + (level * high**4 * sigma**2 * self.L / n) ** (1 / 2)
            + (level * high**3 * sigma * self.L / math.sqrt(self.alpha_D)) ** (2 / 3)
            + (level * high ** (8 / 3) * sigma ** (2 / 3) * self.L / self.alpha_D ** (2 / 3))
            ** (3 / 4)
        )
