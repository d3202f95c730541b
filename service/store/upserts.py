"""Inserts that meet a row which is there already; both databases have them, each in its own dialect."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.store.tables import Base


def insert_into(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT in the database's own dialect, which may say what becomes of a row that is there already."""
    on_postgresql = session.get_bind().dialect.name == "postgresql"
    return postgresql.insert(table) if on_postgresql else sqlite.insert(table)


def insert_if_absent(session: Session, table: type[Base], values: Mapping[str, Any]) -> bool:
    """Insert a row unless a unique constraint already holds one like it; returns whether it was inserted."""
    statement = insert_into(session, table).values(**values).on_conflict_do_nothing()
    result = session.connection().execute(statement.returning(text("1")))
    return result.first() is not None


def add_to_rows(
    session: Session, table: type[Base], rows: Sequence[Mapping[str, Any]], keys: Sequence[str], column: str
) -> None:
    """Insert rows, or add their value of the column to that of the row which has the same keys."""
    statement = insert_into(session, table).values(list(rows))
    grown = getattr(table, column) + getattr(statement.excluded, column)
    session.execute(statement.on_conflict_do_update(index_elements=list(keys), set_={column: grown}))
