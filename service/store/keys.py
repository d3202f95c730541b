"""API keys: whose requests they speak for. Only a digest is stored."""

import hashlib

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.store.session import insert_if_absent
from service.store.tables import ApiKey
from service.store.time import database_time


def ensure_key(session: Session, key: str, owner: str, *, name: str = "configured") -> None:
    """Make this the owner's one valid key of that name; another key of the name is revoked."""
    digest = _digest(key)
    insert_if_absent(session, ApiKey, {"digest": digest, "owner": owner, "name": name})
    session.execute(update(ApiKey).where(ApiKey.digest == digest).values(owner=owner, name=name, revoked_at=None))
    others = (ApiKey.owner == owner, ApiKey.name == name, ApiKey.digest != digest, ApiKey.revoked_at.is_(None))
    session.execute(update(ApiKey).where(*others).values(revoked_at=database_time()))


def owner_of(session: Session, key: str) -> str | None:
    """Whom the key speaks for; None if it is unknown or revoked."""
    query = select(ApiKey.owner).where(ApiKey.digest == _digest(key), ApiKey.revoked_at.is_(None))
    return session.execute(query).scalar_one_or_none()


def _digest(key: str) -> str:
    return hashlib.sha256(b"rankpress-api-key:" + key.encode()).hexdigest()
