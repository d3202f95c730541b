"""Uploaded TorchScript files."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.contract.ids import MODEL, new_id
from service.contract.resources import ModelResource
from service.store.session import insert_if_absent
from service.store.tables import Model


def upsert_model(
    session: Session,
    owner: str,
    name: str | None,
    sha256: str,
    bytes: int,  # noqa: A002
    blob_key: str,
) -> Model:
    """The owner's model with this content: the one that is there (with its first name), or a new one."""
    values = {"id": new_id(MODEL), "owner": owner, "name": name, "sha256": sha256, "bytes": bytes, "blob_key": blob_key}
    insert_if_absent(session, Model, values)
    return session.scalars(select(Model).where(Model.owner == owner, Model.sha256 == sha256)).one()


def get_model(session: Session, model_id: str, owner: str | None) -> Model | None:
    """The model's row, if it is the owner's; `owner=None` reads for the service itself."""
    query = select(Model).where(Model.id == model_id)
    if owner is not None:
        query = query.where(Model.owner == owner)
    return session.scalars(query).one_or_none()


def model_resource(row: Model) -> ModelResource:
    """The model as it stands on the wire."""
    return ModelResource(id=row.id, name=row.name, bytes=row.bytes, sha256=row.sha256, created_at=row.created_at)
