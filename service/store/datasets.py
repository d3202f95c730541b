"""Uploaded sets of inputs, with or without targets."""

from sqlalchemy.orm import Session

from service.contract.ids import DATASET, new_id
from service.contract.resources import DatasetResource
from service.store import uploads
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
    """The owner's dataset with this content: the one that is there (deleted ones too), or a new one."""
    values = {
        "id": new_id(DATASET),
        "owner": owner,
        "name": name,
        "format": format,
        "sha256": sha256,
        "bytes": bytes,
        "blob_key": blob_key,
    }
    return uploads.upsert(session, Dataset, values)


def get_dataset(session: Session, dataset_id: str, owner: str | None, *, lock: bool = False) -> Dataset | None:
    """The dataset's row, if it is the owner's and not deleted; `owner=None` reads for the service itself.

    With `lock` it cannot be deleted until the transaction ends.
    """
    return uploads.get(session, Dataset, dataset_id, owner, lock=lock)


def dataset_resource(row: Dataset) -> DatasetResource:
    """The dataset as it stands on the wire."""
    return DatasetResource(
        id=row.id, name=row.name, format=row.format, bytes=row.bytes, sha256=row.sha256, created_at=row.created_at
    )
