"""What a theorem asks of its constants, by name: `positive(L0=L0, L1=L1)`.

A constant is a number, or a sequence of constants: one a layer, one a worker. Of a sequence the
error names the entry, `L_workers[2]`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any


Constant = float | Sequence[Any]


def positive(**constants: Constant) -> None:
    """Raises a ValueError unless every constant is a finite number above zero."""
    _check(constants, lambda x: x > 0, "positive and finite")


def nonnegative(**constants: Constant) -> None:
    """Raises a ValueError unless every constant is a finite number, zero or above."""
    _check(constants, lambda x: x >= 0, "finite and not negative")


def finite(**constants: Constant) -> None:
    """Raises a ValueError unless every constant is a finite number."""
    _check(constants, lambda x: True, "finite")


def share(**constants: Constant) -> None:
    """Raises a ValueError unless every constant lies in (0, 1]."""
    _check(constants, lambda x: 0 < x <= 1, "in (0, 1]")


def equivalent(**constants: tuple[float, float]) -> None:
    """Raises a ValueError unless every constant is a pair (ρ_lower, ρ_upper), 0 < lower <= upper.

    `norm.equivalence(shape)` gives one.
    """
    for name, pair in constants.items():
        if not (len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf):
            raise ValueError(
                f"`{name}` must be a pair (lower, upper) with 0 < lower <= upper, as "
                f"`norm.equivalence(shape)` gives it, got {pair}."
            )


def lined_up(what: str, **constants: Sequence[Any]) -> None:
    """Raises a ValueError unless all have one entry for each `what`, a layer or a worker."""
    lengths = {name: len(constant) for name, constant in constants.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
        raise ValueError(f"Give one entry a {what} throughout: {counts}.")


def _check(constants, holds, what):
    for name, constant in constants.items():
        for entry, value in _entries(name, constant):
            if not (math.isfinite(value) and holds(value)):
                raise ValueError(f"`{entry}` must be {what}, got {value}.")


def _entries(name: str, constant: Constant) -> Iterator[tuple[str, float]]:
    if not isinstance(constant, Sequence):
        yield name, constant
        return
    if not constant:
        raise ValueError(f"`{name}` must not be empty: it has one entry a layer or a worker.")
    for i, part in enumerate(constant):
        yield from _entries(f"{name}[{i}]", part)
