"""Which blobs the rows speak of."""

from collections.abc import Collection

from sqlalchemy import select, union_all
from sqlalchemy.orm import Session

from service.store.tables import Artifact, Checkpoint, Dataset, Model


def unreferenced(session: Session, keys: Collection[str]) -> set[str]:
    """Those of the keys that no row speaks of."""
    tables = (Model, Dataset, Checkpoint, Artifact)
    spoken_of = union_all(*(select(table.blob_key).where(table.blob_key.in_(keys)) for table in tables))
    return set(keys) - set(session.execute(spoken_of).scalars())
