"""API keys: whose requests they speak for. Only a digest is stored."""

import hashlib
from collections.abc import Sequence

from sqlalchemy import insert, select, text, update
from sqlalchemy.orm import Session

from service.store.tables import ApiKey
from service.store.time import database_time


def insert_key(session: Session, key: str, owner: str, name: str) -> None:
    """Let the key speak for the owner; `ValueError` when a key of that name lives, or this key was known before."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite's writers come one after the other anyhow
        session.execute(text("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE"))
    digest = digest_of(key)
    if session.scalar(select(ApiKey.digest).where(ApiKey.name == name, ApiKey.revoked_at.is_(None))) is not None:
        raise ValueError(f"expected a name that no valid key has; found {name!r}: take another, or revoke that key")
    if session.scalar(select(ApiKey.digest).where(ApiKey.digest == digest)) is not None:
        raise ValueError("expected a new key; found one that was known before: make another")
    session.execute(insert(ApiKey).values(digest=digest, owner=owner, name=name))


def list_keys(session: Session) -> Sequence[ApiKey]:
    """Every key that was ever made, oldest first, the revoked ones too."""
    return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.digest)).all()


def revoke_key(session: Session, name: str) -> int:
    """Refuse the key of that name from now on; returns how many valid keys had it."""
    valid = (ApiKey.name == name, ApiKey.revoked_at.is_(None))
    revoke = update(ApiKey).where(*valid).values(revoked_at=database_time()).returning(ApiKey.digest)
    return len(session.execute(revoke).all())


def owner_of_digest(session: Session, digest: str) -> str | None:
    """Whom the key with this digest speaks for; None if it is unknown or revoked."""
    query = select(ApiKey.owner).where(ApiKey.digest == digest, ApiKey.revoked_at.is_(None))
    return session.execute(query).scalar_one_or_none()


def digest_of(key: str) -> str:
    """What is stored in a key's place; the key has too many random bits for its digest to be turned back."""
    return hashlib.sha256(b"rankpress-api-key:" + key.encode()).hexdigest()
