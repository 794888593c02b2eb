"""EF21-Muon on (L0, L1)-smooth functions, exact gradients (paper M): Theorems 4 and 17.

Steps are X_i ← X_i + t_i LMO(G_i), `lmo_step`, with radii that depend on the number of iterations
K, which is fixed beforehand. ‖∇f(X) − ∇f(Y)‖_* <= (L0 + L1 ‖∇f(X)‖_*) ‖X − Y‖ (Assumption 4);
Theorem 17 asks it of each layer i, of ∇_i f and ‖X_i − Y_i‖, for all X and Y (Assumption 8),
so that the layers do not interact. Theorem 4 is that with a single layer. The downlink is
lossless. L1 must be positive: a smooth function has any L1 beside L0 = L.

`L0_workers` and `L1_workers` hold the constants of the f_j, a tuple of n, or a tuple of n for each
layer. `gap` is f(X^0) − f*; `worker_gaps` holds the n numbers f* − f_j*, whose mean is not
negative.

That mean is taken with the largest of the L1 here. The paper has the L1_j inside of it, but goes
from Σ_j a_j (f_j(X) − f*) to max_j a_j Σ_j (f_j(X) − f*), which needs f_j(X) >= f*. From
f_j(X) >= f_j* follows what stands here. Where the workers share L1 it is the same.
"""

import dataclasses
import math
from collections.abc import Sequence

import optax

from ._checks import finite, lined_up, nonnegative, positive, share
from ._layers import each, mean, of_one_layer, over_mean, plus
from ._numbers import cost, exp


class Radii:
    """Radii for layers."""

    def radii(self, iterations: int) -> list[float]:
        """t_i for K iterations, one a layer."""
        raise NotImplementedError

    def radius(self, iterations: int) -> tuple[optax.Schedule, ...]:
        """t_i as schedules, one a layer."""
        return tuple(map(optax.constant_schedule, self.radii(iterations)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem17(Radii):
    """Exact gradients, layer by layer (p. 44): Algorithm 2 with t_i = η_i / √(K + 1).

    Uplink in B_*(α_D): contractive in the dual norm.

    Attributes:
      eta: η_i > 0, one a layer.

    Raises:
      ValueError: for constants out of range, or of differing numbers of layers or workers.
    """

    L0: Sequence[float]
    L1: Sequence[float]
    L0_workers: Sequence[Sequence[float]]
    L1_workers: Sequence[Sequence[float]]
    gap: float
    worker_gaps: Sequence[float]
    alpha_D: float
    eta: Sequence[float]

    def __post_init__(self):
        check(self)
        positive(eta=self.eta)
        lined_up("layer", L0=self.L0, **of_workers(self), L1=self.L1, eta=self.eta)
        lined_up("worker", worker_gaps=self.worker_gaps, **each(**of_workers(self)))

    def radii(self, iterations):
        positive(iterations=iterations)
        return [eta / math.sqrt(iterations + 1) for eta in self.eta]

    @property
    def weights(self) -> tuple[float, ...]:
        """η_i / mean_l η_l, of the layers in the left side."""
        return over_mean(self.eta)

    def lyapunov(
        self, iterations: int, gap: float, *, estimates: Sequence[float] | None = None
    ) -> float:
        """Ψ^k.

        Args:
          iterations: K, on which the radii depend.
          gap: f(X^k) − f*.
          estimates: mean_j ‖∇_i f_j(X^k) − G_ij^k‖_*, one a layer. None: zero.
        """
        scale = 2 / (1 - math.sqrt(1 - self.alpha_D))
        return plus(gap, [scale * t for t in self.radii(iterations)], estimates)

    def bound(self, iterations: int, psi: float | None = None) -> float:
        """Of min_{k<=K} Σ_i weights_i E‖∇_i f(X^k)‖_*.

        Args:
          iterations: K. The minimum is over the K + 1 iterates X^0, …, X^K.
          psi: Ψ^0. None: that of G_j^0 = ∇f_j(X^0) (`warm_start`), the gap.
        """
        positive(iterations=iterations)
        psi = self.gap if psi is None else psi
        lost = cost(self.alpha_D)
        growth, ratios, squares = 0.0, 0.0, 0.0
        for L0, L1, L0_workers, L1_workers, eta in zip(
            self.L0, self.L1, self.L0_workers, self.L1_workers, self.eta, strict=True
        ):
            C = L1 / 2 + 2 * lost * max(L1_workers)
            D = L0 / 2 + 2 * lost * mean(L0_workers)
            growth = max(growth, 4 * eta**2 * C * max(L1_workers))
            quotients = [l0 / l1 for l0, l1 in zip(L0_workers, L1_workers, strict=True)]
            ratios += eta**2 * C * mean(quotients)
            squares += eta**2 * D
        total = exp(growth) * psi + growth * mean(self.worker_gaps) + ratios + squares
        return total / (math.sqrt(iterations + 1) * mean(self.eta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theorem4:
    """Exact gradients (p. 7): Algorithm 2, started exactly, with t = η / √(K + 1).

    Attributes:
      eta: η > 0.

    Raises:
      ValueError: for constants out of range, or of differing numbers of workers.
    """

    L0: float
    L1: float
    L0_workers: Sequence[float]
    L1_workers: Sequence[float]
    gap: float
    worker_gaps: Sequence[float]
    alpha_D: float
    eta: float

    def __post_init__(self):
        check(self)
        positive(eta=self.eta)
        lined_up("worker", worker_gaps=self.worker_gaps, **of_workers(self))

    @property
    def layered(self) -> Theorem17:
        """The same of one layer."""
        return Theorem17(**of_one_layer(self, "L0", "L1", "L0_workers", "L1_workers", "eta"))

    def radius(self, iterations: int) -> optax.Schedule:
        """t as a schedule."""
        return self.layered.radius(iterations)[0]

    def bound(self, iterations: int) -> float:
        """Of min_{k<=K} E‖∇f(X^k)‖_*."""
        return self.layered.bound(iterations)


def check(theorem):
    """Raises a ValueError for the constants that all of these theorems have."""
    positive(L0=theorem.L0, L1=theorem.L1, **of_workers(theorem))
    nonnegative(gap=theorem.gap)
    finite(worker_gaps=theorem.worker_gaps)
    if mean(theorem.worker_gaps) < 0:
        raise ValueError(
            "`worker_gaps` must not be negative on average, since f* >= mean_j f_j*, got "
            f"{theorem.worker_gaps}: they are f* − f_j*."
        )
    share(alpha_D=theorem.alpha_D)


def of_workers(theorem):
    """Those constants that are one a worker, by name."""
    return {"L0_workers": theorem.L0_workers, "L1_workers": theorem.L1_workers}
