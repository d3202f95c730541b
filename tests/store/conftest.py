"""Every store test runs on SQLite and on PostgreSQL."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from submissions import claim_job, empty, submit_job

from service.store.attempts import Claim
from service.store.migration import migrate
from service.store.session import Database


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
