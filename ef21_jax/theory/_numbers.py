"""What compression costs in these theorems, and an exponential that may be past the floats."""

import math


def theta(alpha: float) -> float:
    """1 − √(1 − α), without the cancellation at small α."""
    return alpha / (1 + math.sqrt(1 - alpha))


def cost(alpha: float) -> float:
    """√(1 − α) / (1 − √(1 − α)): zero without compression."""
    return math.sqrt(1 - alpha) / theta(alpha)


def exp(x: float) -> float:
    """e^x, or infinity."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
