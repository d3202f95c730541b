"""What every list takes."""

from typing import Annotated

from fastapi import Query

_BIGGEST = 2**63 - 1  # what a database's integer holds

Limit = Annotated[
    int | None, Query(ge=1, le=_BIGGEST, description="How many at most; the service's own bound holds above it.")
]
Cursor = Annotated[str | None, Query(max_length=100, description="The next_cursor of the page before.")]
NameFilter = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$", description="Only of this name.")]
After = Annotated[int, Query(ge=0, le=_BIGGEST, description="Only events after this number.")]


def bounded(limit: int | None, default: int, maximum: int) -> int:
    """The page size to use."""
    return min(limit or default, maximum)
