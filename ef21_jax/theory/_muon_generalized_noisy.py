"""EF21-Muon on (L0, L1)-smooth functions, noisy gradients (paper M): Theorems 6, 24, Corollary 3.

Steps, smoothness and constants are those of `_muon_generalized`; Theorem 6 is Corollary 3 with a
single layer.
"""

import dataclasses
import math
from collections.abc import Sequence

import optax

from ._checks import equivalent, lined_up, nonnegative, positive
from ._layers import each, mean, of_one_layer, over_mean, plus
from ._muon_generalized import Radii, check, of_workers
from ._numbers import cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noisy(Radii):
    """Algorithm 3 with β = (K + 1)^(−1/2) and t_i = η_i / (K + 1)^(3/4)."""

    L0: Sequence[float]
    L1: Sequence[float]
    L0_workers: Sequence[Sequence[float]]
    L1_workers: Sequence[Sequence[float]]
    gap: float
    worker_gaps: Sequence[float]
    sigma: Sequence[float]
    rho: Sequence[tuple[float, float]]
    alpha_D: float
    eta: Sequence[float] | None = None

    def __post_init__(self):
        check(self)
        nonnegative(sigma=self.sigma)
        equivalent(**each(rho=self.rho))
        by_layer = {"L0": self.L0, "L1": self.L1, "sigma": self.sigma, "rho": self.rho}
        if self.eta is not None:
            positive(eta=self.eta)
            by_layer["eta"] = self.eta
        lined_up("layer", **by_layer, **of_workers(self))
        lined_up("worker", worker_gaps=self.worker_gaps, **each(**of_workers(self)))

    @property
    def workers(self) -> int:
        """n."""
        return len(self.worker_gaps)

    def beta(self, iterations: int) -> float:
        """β, of all layers."""
        positive(iterations=iterations)
        return 1 / math.sqrt(iterations + 1)

    def momentum(self, iterations: int) -> float:
        """1 − β: the `momentum` of `ef21_muon`, the `decay` of `worker_momentum`."""
        return 1 - self.beta(iterations)

    def largest_eta(self, iterations: int) -> tuple[float, ...]:
        """The largest η_i that is allowed for K iterations.

        η² <= min(√(K+1) / (6 L1²), √(K+1) ρ / (24 θ ρ̄ L1max²), ρ / (24 ρ̄ L1max²), 1), with
        θ = √(1−α_D) / (1 − √(1−α_D)). The second is printed with 1/√(K+1) for √(K+1). The proof
        needs what stands here, and the other would leave a first term that does not vanish.
        """
        positive(iterations=iterations)
        root, lost = math.sqrt(iterations + 1), cost(self.alpha_D)
        etas = []
        for L1, workers, (low, high) in zip(self.L1, self.L1_workers, self.rho, strict=True):
            squares = [1.0, root / (6 * L1**2), low / (24 * high * max(workers) ** 2)]
            if lost:
                squares.append(root * low / (24 * lost * high * max(workers) ** 2))
            etas.append(math.sqrt(min(squares)))
        return tuple(etas)

    def etas(self, iterations: int) -> tuple[float, ...]:
        """η_i for K iterations: `eta`, or the largest.

        Raises:
          ValueError: where `eta` is larger than allowed.
        """
        largest = self.largest_eta(iterations)
        if self.eta is None:
            return largest
        for i, (eta, most) in enumerate(zip(self.eta, largest, strict=True)):
            if eta > most:
                raise ValueError(
                    f"`eta[{i}]` must be at most {most} for {iterations} iterations, got {eta}. "
                    "None takes the largest."
                )
        return tuple(self.eta)

    def radii(self, iterations):
        return [eta / (iterations + 1) ** 0.75 for eta in self.etas(iterations)]

    def weights(self, iterations: int) -> tuple[float, ...]:
        """η_i / mean_l η_l, of the layers in the left side."""
        return over_mean(self.etas(iterations))

    def _bound(self, iterations, psi, momenta):
        etas, lost = self.etas(iterations), cost(self.alpha_D)
        quarter = (iterations + 1) ** 0.25
        total = 3 * psi / quarter
        spread = 0.0
        for eta, L0, L0_workers, L1_workers, sigma, (low, high), momentum in zip(
            etas,
            self.L0,
            self.L0_workers,
            self.L1_workers,
            self.sigma,
            self.rho,
            momenta,
            strict=True,
        ):
            total += 6 / quarter**2 * eta * high * momentum
            spread = max(spread, eta**2 * high / low * max(L1_workers) ** 2)
            of_mean = 4 * high / low * (1 / quarter + lost / quarter**3) * mean(L0_workers)
            total += eta**2 * (L0 / quarter**3 + of_mean)
            of_noise = 4 * lost / quarter**2 + 2 / (math.sqrt(self.workers) * quarter)
            total += eta * high * sigma * of_noise
        total += (8 / quarter + 8 * lost / quarter**3) * spread * mean(self.worker_gaps)
        return total / mean(etas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem24(_Noisy):
    """Noisy gradients, layer by layer (p. 53): β = (K + 1)^(−1/2), t_i = η_i / (K + 1)^(3/4).

    Uplink in B_2(α_D). `largest_eta` says how η_i is restricted.

    Attributes:
      sigma: σ_i, E‖∇_i f_j(X; ξ) − ∇_i f_j(X)‖_2² <= σ_i² (Assumption 10), one a layer.
      rho: `norm.equivalence(shape)`, one a layer.
      eta: η_i, one a layer. None: the largest allowed.

    Raises:
      ValueError: for constants out of range, or of differing numbers of layers or workers.
    """

    def lyapunov(
        self,
        iterations: int,
        gap: float,
        *,
        estimates: Sequence[float] | None = None,
        worker_momenta: Sequence[float] | None = None,
    ) -> float:
        """Ψ^k.

        Args:
          iterations: K, on which the radii depend.
          gap: E f(X^k) − f*.
          estimates: mean_j E‖M_ij^k − G_ij^k‖_2, one a layer. None: zero.
          worker_momenta: mean_j E‖∇_i f_j(X^k) − M_ij^k‖_2, one a layer. None: zero.
        """
        root = math.sqrt(1 - self.alpha_D)
        factors = [
            2 * t * high / (1 - root)
            for t, (_, high) in zip(self.radii(iterations), self.rho, strict=True)
        ]
        total = plus(gap, factors, estimates)
        return plus(total, [root * factor for factor in factors], worker_momenta)

    def bound(self, iterations: int, psi: float, momenta: Sequence[float]) -> float:
        """Of min_{k<=K} Σ_i weights_i E‖∇_i f(X^k)‖_*.

        Args:
          iterations: K. The minimum is over the K + 1 iterates X^0, …, X^K.
          psi: Ψ^0.
          momenta: E‖∇_i f(X^0) − M_i^0‖_2, one a layer, with M the mean.
        """
        return self._bound(iterations, psi, momenta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corollary3(_Noisy):
    """Theorem 24 from M_j^0 = ∇f_j(X^0; ξ_j^0), G_j^0 = C_j(M_j^0) (p. 54), as `ef21` starts.

    Its proof bounds E‖M_j^0 − G_j^0‖ by √(1−α_D) E‖∇f_j(X^0; ξ)‖, and that by √(1−α_D) σ, which
    leaves out ‖∇f_j(X^0)‖. It is put back here, a term of order 1/K; with zero for
    `start_gradients` the bound is the printed one, which holds for G_j^0 = M_j^0 (`warm_start`).

    Attributes:
      start_gradients: mean_j ‖∇_i f_j(X^0)‖_2, one a layer.

    The other attributes and the errors are those of Theorem 24.
    """

    start_gradients: Sequence[float]

    def __post_init__(self):
        super().__post_init__()
        nonnegative(start_gradients=self.start_gradients)
        lined_up("layer", L0=self.L0, start_gradients=self.start_gradients)

    def bound(self, iterations: int) -> float:
        """Of min_{k<=K} Σ_i weights_i E‖∇_i f(X^k)‖_*, over the K + 1 iterates X^0, …, X^K."""
        lost = cost(self.alpha_D)
        psi = self.gap + sum(
            2 * lost * t * high * (2 * sigma + gradient)
            for t, (_, high), sigma, gradient in zip(
                self.radii(iterations), self.rho, self.sigma, self.start_gradients, strict=True
            )
        )
        momenta = [sigma / math.sqrt(self.workers) for sigma in self.sigma]
        return self._bound(iterations, psi, momenta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem6:
    """Noisy gradients (p. 8): Corollary 3 with a single layer, and its terms merged upwards.

    β = (K + 1)^(−1/2) and t = η / (K + 1)^(3/4), η as in `Theorem24.largest_eta`. The bound has the
    term 6 θ ρ̄ ‖∇f_j(X^0)‖_2 / (K + 1) that Corollary 3 lacks.

    Attributes:
      sigma: E‖∇f_j(X; ξ) − ∇f_j(X)‖_2² <= σ² (Assumption 5).
      rho: `norm.equivalence(shape)`.
      start_gradient: mean_j ‖∇f_j(X^0)‖_2. Zero gives the printed bound, for G_j^0 = M_j^0.
      eta: η. None: the largest allowed.

    Raises:
      ValueError: for constants out of range, or of differing numbers of workers.
    """

    L0: float
    L1: float
    L0_workers: Sequence[float]
    L1_workers: Sequence[float]
    gap: float
    worker_gaps: Sequence[float]
    sigma: float
    rho: tuple[float, float]
    alpha_D: float
    start_gradient: float
    eta: float | None = None

    def __post_init__(self):
        check(self)
        nonnegative(sigma=self.sigma, start_gradient=self.start_gradient)
        equivalent(rho=self.rho)
        if self.eta is not None:
            positive(eta=self.eta)
        lined_up("worker", worker_gaps=self.worker_gaps, **of_workers(self))

    @property
    def layered(self) -> Corollary3:
        """The same of one layer."""
        names = ("L0", "L1", "L0_workers", "L1_workers", "sigma", "rho")
        constants = of_one_layer(self, *names)
        constants["start_gradients"] = (constants.pop("start_gradient"),)
        constants["eta"] = None if self.eta is None else (self.eta,)
        return Corollary3(**constants)

    def beta(self, iterations: int) -> float:
        """β."""
        return self.layered.beta(iterations)

    def momentum(self, iterations: int) -> float:
        """1 − β: the `momentum` of `ef21_muon`, the `decay` of `worker_momentum`."""
        return self.layered.momentum(iterations)

    def radius(self, iterations: int) -> optax.Schedule:
        """t as a schedule.

        Raises:
          ValueError: where `eta` is larger than allowed.
        """
        return self.layered.radius(iterations)[0]

    def bound(self, iterations: int) -> float:
        """Of min_{k<=K} E‖∇f(X^k)‖_*, over the K + 1 iterates X^0, …, X^K."""
        (eta,), lost = self.layered.etas(iterations), cost(self.alpha_D)
        low, high = self.rho
        quarter, n = (iterations + 1) ** 0.25, len(self.worker_gaps)
        spread = max(self.L1_workers) ** 2 * mean(self.worker_gaps) + mean(self.L0_workers)
        return (
            3 * self.gap / (eta * quarter)
            + eta * self.L0 / quarter**3
            + 16 * lost * high * self.sigma / quarter**2
            + 8 * high * self.sigma / (math.sqrt(n) * quarter)
            + eta * high / low * (8 / quarter + 8 * lost / quarter**3) * spread
            + 6 * lost * high * self.start_gradient / quarter**4
        )
