"""The one way to the database: short sessions that read, and short sessions that write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from service.store.counters import write_counts
from service.store.time import database_time

BUSY_TIMEOUT_MS = 10_000
CONNECT_TIMEOUT_SECONDS = 5
STATEMENT_SECONDS = 10.0

# What is raised while the database is away, has no connection left, or (as an InternalError) is read-only after a
# failover or on a full disk, or has ended a transaction whose process stood still.
DATABASE_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)
_SQLITE_PRAGMAS = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",  # an accepted job survives a power cut
    "PRAGMA foreign_keys = ON",
)


class Database:
    """A database by its URL; safe to share between threads, never across a fork."""

    def __init__(self, url: str, *, timeout_seconds: float = STATEMENT_SECONDS) -> None:
        parsed = make_url(url)
        self.url = url
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        connect_args: dict[str, Any] = (
            {"timeout": BUSY_TIMEOUT_MS / 1000} if self.is_sqlite else _postgresql_arguments(timeout_seconds)
        )
        # Bursts of requests take connections for milliseconds; a broken one is found before it is used.
        self.engine: Engine = create_engine(
            parsed, connect_args=connect_args, pool_pre_ping=not self.is_sqlite, pool_size=10, max_overflow=20
        )
        self._writer = self.engine.execution_options(rankpress_writes=True)
        # PostgreSQL gives each statement a snapshot of its own, in a transaction or not: without one, a read spares
        # two trips to the server. SQLite gives one to the transaction.
        self._reader = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that writes, committed before the block is left normally and rolled back by an error.

        When the block has been left without an exception, what was written is durable.
        """
        with self._session(self._writer) as session:
            yield session
            write_counts(session)
            try:
                session.commit()
            except BaseException:
                # SQLAlchemy takes it for ended, but a refused COMMIT leaves it open: on SQLite with its lock.
                session.invalidate()
                raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a session that only reads; rows stay usable after it is closed."""
        with self._session(self._reader) as session:
            yield session

    @contextmanager
    def connect_for_ddl(self) -> Iterator[Connection]:
        """Open one transaction for a change of the schema; commits at the end."""
        with self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SET LOCAL statement_timeout = 0"))
            yield connection

    @staticmethod
    def _session(bind: Engine) -> Session:
        # Statements say what changes; rows in memory are never patched up, but read afresh.
        options = {"synchronize_session": False, "populate_existing": True}
        return Session(bind, expire_on_commit=False, autoflush=False, execution_options=options)

    def ping(self) -> bool:
        """Whether the database answers."""
        try:
            with self.read() as session:
                session.execute(select(database_time()))
        except (SQLAlchemyError, OSError):
            return False
        return True

    def dispose(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _postgresql_arguments(timeout_seconds: float) -> dict[str, Any]:
    """Bounds, so that nobody waits for ever: neither for a lock, nor on a network that says nothing any more.

    A transaction whose process was stopped holds a job's row; the server ends it after the same time.
    """
    milliseconds = int(timeout_seconds * 1000)
    return {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "options": f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={milliseconds}",
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": max(1, int(timeout_seconds / 2)),
        "keepalives_interval": max(1, int(timeout_seconds / 5)),
        "keepalives_count": 3,
    }


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: _begin_sqlite does
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A read that turns into a write gets SQLITE_BUSY at once whatever the timeout, so writers say so first.
    writes = connection.get_execution_options().get("rankpress_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
