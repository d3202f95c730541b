"""What the service is made of, put together once and handed on."""

from dataclasses import dataclass, field

from service.bell import Bell, make_celery
from service.blobs.opening import open_blobs
from service.blobs.store import BlobStore
from service.keys_file import ensure_api_key
from service.settings import Settings
from service.store.session import Database


@dataclass(frozen=True)
class Services:
    """Everything that requests need; safe to share between threads."""

    settings: Settings
    database: Database
    blobs: BlobStore
    bell: Bell
    api_key: str | None = field(repr=False)  # None: the keys in the database alone count


def build_services(settings: Settings) -> Services:
    """Open database, blob store and bell by the settings; embedded, make the key if there is none.

    No schema is changed and no broker is contacted; a shared folder that is not there is a BlobStoreAwayError.
    `bell.app` is the Celery app that an embedded worker shares.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    api_key, _ = ensure_api_key(settings)
    return Services(
        settings=settings,
        database=Database(settings.resolved_database_url, timeout_seconds=settings.database_timeout_seconds),
        blobs=open_blobs(settings),
        bell=Bell(make_celery(settings)),
        api_key=api_key,
    )
