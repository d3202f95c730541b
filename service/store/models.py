"""Uploaded TorchScript files."""

from sqlalchemy.orm import Session

from service.contract.ids import MODEL, new_id
from service.contract.resources import ModelResource
from service.store import uploads
from service.store.tables import Model


def upsert_model(
    session: Session,
    owner: str,
    name: str | None,
    sha256: str,
    bytes: int,  # noqa: A002
    blob_key: str,
) -> Model:
    """The owner's model with this content: the one that is there (deleted ones too), or a new one."""
    values = {"id": new_id(MODEL), "owner": owner, "name": name, "sha256": sha256, "bytes": bytes, "blob_key": blob_key}
    return uploads.upsert(session, Model, values)


def get_model(session: Session, model_id: str, owner: str | None, *, lock: bool = False) -> Model | None:
    """The model's row, if it is the owner's and not deleted; `owner=None` reads for the service itself.

    With `lock` it cannot be deleted until the transaction ends.
    """
    return uploads.get(session, Model, model_id, owner, lock=lock)


def model_resource(row: Model) -> ModelResource:
    """The model as it stands on the wire."""
    return ModelResource(id=row.id, name=row.name, bytes=row.bytes, sha256=row.sha256, created_at=row.created_at)
