"""The schema's version: bring it to head, and tell whether it is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

import migrations
from service.store.session import Database

_LOCK_KEY = 0x52414E4B  # one number for this application's advisory lock


def migrate(database: Database, revision: str = "head") -> None:
    """Bring the schema up to a revision, in one transaction under a lock; others wait and find it done."""
    with _locked(database) as connection:
        command.upgrade(alembic_config(connection), revision)


def migrate_down(database: Database, revision: str) -> None:
    """Take the schema back to an earlier revision, `base` being the empty one."""
    with _locked(database) as connection:
        command.downgrade(alembic_config(connection), revision)


def schema_at_head(database: Database) -> bool:
    """Whether the schema is the one this code was written for."""
    return set(_revisions(database)) == set(ScriptDirectory.from_config(alembic_config(None)).get_heads())


def has_schema(database: Database) -> bool:
    """Whether there is a schema of any version."""
    return bool(_revisions(database))


def _revisions(database: Database) -> tuple[str, ...]:
    try:
        with database.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_heads()
    except (SQLAlchemyError, OSError):
        return ()


def alembic_config(connection: Connection | None) -> Config:
    """Alembic's configuration, without a file: the scripts are those of the installed package."""
    location = str(Path(next(iter(migrations.__path__))))
    config = Config()
    config.set_main_option("script_location", location.replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _locked(database: Database) -> Iterator[Connection]:
    with database.connect_for_ddl() as connection:
        if not database.is_sqlite:  # on SQLite the write transaction is the lock
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        yield connection
