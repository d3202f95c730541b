"""Pages of uploaded files, newest first."""

from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store.tables import Dataset, Model

Row = TypeVar("Row", Model, Dataset)


def list_models(
    session: Session, owner: str, *, name: str | None = None, cursor: str | None = None, limit: int = 50
) -> tuple[list[Model], str | None]:
    """A page of the owner's models, and the cursor of the next page (None on the last)."""
    return _page(session, Model, owner, name, cursor, limit)


def list_datasets(
    session: Session, owner: str, *, name: str | None = None, cursor: str | None = None, limit: int = 50
) -> tuple[list[Dataset], str | None]:
    """A page of the owner's datasets, and the cursor of the next page (None on the last)."""
    return _page(session, Dataset, owner, name, cursor, limit)


def _page(
    session: Session, table: type[Row], owner: str, name: str | None, cursor: str | None, limit: int
) -> tuple[list[Row], str | None]:
    query = (
        select(table).where(table.owner == owner, table.deleted_at.is_(None)).order_by(table.id.desc()).limit(limit + 1)
    )
    if name is not None:
        query = query.where(table.name == name)
    if cursor is not None:
        query = query.where(table.id < cursor)
    rows = list(session.scalars(query))
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None
