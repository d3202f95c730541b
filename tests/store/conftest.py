"""Every store test runs on SQLite and on PostgreSQL."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submissions import OWNER, claim_job, empty, received, submit_job

from service.bell import Bell, make_celery
from service.blobs.store import BlobStore
from service.jobs.files import store_model
from service.services import Services
from service.settings import Settings
from service.store.attempts import Claim
from service.store.migration import migrate
from service.store.session import Database
from service.store.tables import Model


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.dispose()
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[Database]:
    database = Database(postgres_url)
    migrate(database)
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database at head."""
    if request.param == "sqlite":
        path = tmp_path / "store.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        database = Database(f"sqlite:///{path}")
        yield database
        database.dispose()
        return
    database = request.getfixturevalue("migrated_postgres")
    empty(database)
    yield database


@pytest.fixture
def submit(database: Database) -> Callable[..., str]:
    return lambda **values: submit_job(database, **values)


@pytest.fixture
def take(database: Database) -> Callable[..., Claim]:
    def take_one(**values: float) -> Claim:
        claimed = claim_job(database, **values)  # type: ignore[arg-type]
        assert claimed is not None
        return claimed

    return take_one


@pytest.fixture
def services(database: Database, tmp_path: Path) -> Services:
    """The service without HTTP, on either database."""
    settings = Settings(data_dir=tmp_path, retry_base_seconds=0)
    bell = Bell(make_celery(settings))
    return Services(settings, database, BlobStore(settings.resolved_blob_url), bell, "a-key-of-sixteen-characters")


@pytest.fixture
def upload(services: Services) -> Callable[..., Model]:
    """Takes in a model as the API does."""

    def upload_content(content: bytes = b"a model", owner: str = OWNER, name: str = "net.pt") -> Model:
        write = store_model(services.blobs, received(services, content, name))
        with services.database.write() as session:
            return write(session, owner)

    return upload_content
