"""Aligned text tables."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Columns as wide as their widest cell; those whose position is in `right` end at the same place."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["─" * width for width in widths]

    def joined(line: list[str]) -> str:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(joined(line) for line in [lines[0], rule, *lines[1:]])


def count(number: int | None) -> str:
    """A count with separators between thousands."""
    return "–" if number is None else f"{number:,}"


def percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.1f} %"
