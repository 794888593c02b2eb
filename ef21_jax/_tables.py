"""How settings and tables look in plain text."""

import dataclasses
from typing import Any


def brief(value: Any) -> str:
    """The repr of a dataclass, without what is as by default: `TopK(0.1, exact=True)`."""
    shown = [
        repr(held) if field.default is dataclasses.MISSING else f"{field.name}={held!r}"
        for field in dataclasses.fields(value)
        if (held := getattr(value, field.name)) != field.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def shape_name(shape: tuple[int, ...]) -> str:
    """`768×3072`."""
    return "×".join(map(str, shape)) or "()"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], right: int) -> str:
    """Columns under a head; the last `right` of them are set flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells):
        return "  ".join(
            cell.rjust(width) if i >= len(head) - right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(head), line(tuple("─" * width for width in widths)), *map(line, rows)])
