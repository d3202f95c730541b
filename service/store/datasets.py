"""Uploaded sets of inputs, with or without targets."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.contract.ids import DATASET, new_id
from service.contract.resources import DatasetResource
from service.store.session import insert_if_absent
from service.store.tables import Dataset


def upsert_dataset(
    session: Session,
    owner: str,
    name: str | None,
    format: str,  # noqa: A002
    sha256: str,
    bytes: int,  # noqa: A002
    blob_key: str,
) -> Dataset:
    """The owner's dataset with this content: the one that is there (with its first name), or a new one."""
    values = {
        "id": new_id(DATASET),
        "owner": owner,
        "name": name,
        "format": format,
        "sha256": sha256,
        "bytes": bytes,
        "blob_key": blob_key,
    }
    insert_if_absent(session, Dataset, values)
    return session.scalars(select(Dataset).where(Dataset.owner == owner, Dataset.sha256 == sha256)).one()


def get_dataset(session: Session, dataset_id: str, owner: str | None) -> Dataset | None:
    """The dataset's row, if it is the owner's; `owner=None` reads for the service itself."""
    query = select(Dataset).where(Dataset.id == dataset_id)
    if owner is not None:
        query = query.where(Dataset.owner == owner)
    return session.scalars(query).one_or_none()


def dataset_resource(row: Dataset) -> DatasetResource:
    """The dataset as it stands on the wire."""
    return DatasetResource(
        id=row.id, name=row.name, format=row.format, bytes=row.bytes, sha256=row.sha256, created_at=row.created_at
    )
