"""What models and datasets have in common: one row for each content, which can be deleted and come back."""

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy import case, select
from sqlalchemy.orm import Session

from service.store.tables import Dataset, Model
from service.store.time import database_time
from service.store.upserts import insert_into

Row = TypeVar("Row", Model, Dataset)


def upsert(session: Session, table: type[Row], values: Mapping[str, Any]) -> Row:
    """The owner's row of this content: the one that is there with its first name, or a new one.

    A deleted row comes back under its id with the new name. The row is locked until the transaction ends, so that a
    deletion at the same time sees the job that is about to name it.
    """
    insert = insert_into(session, table).values(**values)
    deleted = table.deleted_at.is_not(None)
    revived = {
        "name": case((deleted, insert.excluded.name), else_=table.name),
        "created_at": case((deleted, database_time()), else_=table.created_at),
        "deleted_at": None,
    }
    statement = insert.on_conflict_do_update(index_elements=["owner", "sha256"], set_=revived).returning(table)
    return session.scalars(statement).one()


def get(session: Session, table: type[Row], row_id: str, owner: str | None, *, lock: bool = False) -> Row | None:
    """The row, if it is the owner's and not deleted; with `lock` it cannot be deleted until the transaction ends."""
    query = select(table).where(table.id == row_id, table.deleted_at.is_(None))
    if owner is not None:
        query = query.where(table.owner == owner)
    return session.scalars(query.with_for_update(read=True) if lock else query).one_or_none()
