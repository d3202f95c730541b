"""Which blobs the rows speak of, and how a row and its blob come to be at the same time as a sweep."""

from collections.abc import Collection

from sqlalchemy import func, select, union_all
from sqlalchemy.orm import Session

from service.store.tables import Artifact, Checkpoint, Dataset, Model


def unreferenced(session: Session, keys: Collection[str]) -> set[str]:
    """Those of the keys that no row speaks of; the row of a deleted upload speaks of nothing."""
    spoken_of = union_all(
        *(select(table.blob_key).where(table.blob_key.in_(keys)) for table in (Checkpoint, Artifact)),
        *(
            select(table.blob_key).where(table.blob_key.in_(keys), table.deleted_at.is_(None))
            for table in (Model, Dataset)
        ),
    )
    return set(keys) - set(session.execute(spoken_of).scalars())


def hold_blobs(session: Session, keys: Collection[str]) -> None:
    """Keep other transactions off these keys until this one ends.

    Whoever writes a row of content that may be stored already holds its key and looks whether the bytes are still
    there; the sweep holds it while it looks for rows and deletes. So one of them always sees what the other did.
    On SQLite a transaction that writes is alone from its beginning.
    """
    connection = session.connection()  # begins, if nothing was said yet
    if connection.dialect.name == "postgresql":
        for key in sorted(keys):
            session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(key, 0))))
