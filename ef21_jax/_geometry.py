"""What a compressor asks of a norm, and the bounds on α that follow from the answers.

α depends on the norm: E‖C(x) − x‖² <= (1 − α)‖x‖² (paper M, Definition 1). With ‖·‖ the norm of a
layer this is the family B(α), with its dual B_*(α), with the Euclidean norm B_2(α). A norm says
three things of itself, and `None` stands for the Euclidean norm of a whole leaf.
"""

import math
from typing import Protocol


class Geometry(Protocol):
    """A norm on each matrix (the last two axes) of a leaf, as far as a compressor needs to know.

    A third attribute may be there: `mixed`, (p, q, axis) for ℓ_{p,q}, the ℓq norm of the ℓp norms
    along `axis` (−1 or −2), up to a factor. All entries alike are p = q, whatever the axis.

    Attributes:
      absolute: it depends on magnitudes alone, and never falls when one grows.
      schatten: p, where it is ℓp of the singular values, up to a factor.
    """

    @property
    def absolute(self) -> bool: ...

    @property
    def schatten(self) -> float | None: ...


def mixed_exponents(norm: Geometry | None) -> tuple[float, float, int] | None:
    """(p, q, axis) of an ℓ_{p,q} norm; (2, 2, −1) is the Euclidean one."""
    if norm is None or norm.schatten == 2:
        return 2.0, 2.0, -1
    return getattr(norm, "mixed", None)


def entry_exponent(norm: Geometry | None) -> float | None:
    """p, where the norm is ℓp of the entries."""
    exponents = mixed_exponents(norm)
    return exponents[0] if exponents is not None and exponents[0] == exponents[1] else None


def schatten_exponent(norm: Geometry | None) -> float | None:
    """p, where the norm is ℓp of the singular values."""
    return 2.0 if norm is None else norm.schatten


def is_stack(shape: tuple[int, ...]) -> bool:
    """Whether a leaf holds several matrices, each of which a norm sees on its own."""
    return math.prod(shape[:-2]) != 1


def squared(kept: float, power: float) -> float | None:
    """1 − (1 − kept)^power, where that is positive.

    Where all but a share of Σ|·|^p is kept, this is α, with power 2/p.
    """
    alpha = kept if power == 1 or kept == 1 else 1 - (1 - kept) ** power
    return alpha if alpha > 0 else None


def from_euclidean(alpha: float, shape: tuple[int, ...], norm: Geometry | None) -> float | None:
    """The α in `norm` of what has this one, in the Euclidean norm, for each matrix of `shape`.

    Paper M, Section D: 1 − (1 − α) (ρ̄ / ρ)², with ρ ‖·‖ <= ‖·‖_2 <= ρ̄ ‖·‖. For Schatten-p norms
    of rank r that square is r^|1 − 2/p|: one for p = 2, and else mostly too large.
    """
    p = schatten_exponent(norm)
    if p is None:
        return alpha if entry_exponent(norm) == 2 else None
    rank = min(shape[-2:]) if len(shape) >= 2 else 1
    bound = alpha if p == 2 else 1 - (1 - alpha) * max(1, rank) ** abs(1 - 2 / p)
    return bound if bound > 0 else None
