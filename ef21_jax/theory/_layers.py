"""Sums over layers and workers, and a theorem on one layer as one on layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_square(values: Sequence[float]) -> float:
    return sum(value**2 for value in values) / len(values)


def over_mean(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(value / mean(values) for value in values)


def plus(total: float, factors: Sequence[float], errors: Sequence[float] | None) -> float:
    """`total` and the products; None is zero."""
    if errors is None:
        return total
    return total + sum(f * e for f, e in zip(factors, errors, strict=True))


def each(**constants: Sequence[Any]) -> Mapping[str, Any]:
    """`{"rho[0]": …, "rho[1]": …}` of `rho=(…, …)`, for errors that name the entry."""
    return {
        f"{name}[{i}]": part for name, parts in constants.items() for i, part in enumerate(parts)
    }


def fields(theorem: Any) -> dict[str, Any]:
    return {field.name: getattr(theorem, field.name) for field in dataclasses.fields(theorem)}


def of_one_layer(theorem: Any, *names: str) -> dict[str, Any]:
    """The fields of `theorem`, those of `names`, which are one a layer, as one-tuples."""
    return fields(theorem) | {name: (getattr(theorem, name),) for name in names}
