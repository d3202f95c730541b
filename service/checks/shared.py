"""What all machines share: the database, the broker, the store of files, the keys, the other workers."""

import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime

import obstore.exceptions
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from service.bell import make_celery
from service.blobs.errors import BlobStoreAwayError
from service.blobs.opening import open_blobs
from service.checks.finding import Finding, failed, ok, skipped, warning
from service.checks.urls import shown_url
from service.contract.errors import ProblemError
from service.settings import QUEUES, Settings
from service.store.attempts import count_claimable
from service.store.keys import list_keys
from service.store.migration import has_schema, schema_at_head
from service.store.session import Database
from service.store.time import database_time
from service.store.workers import list_workers

CLOCK_SECONDS_MAX = 5.0
_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
_ANY_GPU_BYTES = 2**63 - 1


def check_database(database: Database) -> Finding:
    """Whether it answers."""
    shown = shown_url(database.url)
    started = time.monotonic()
    try:
        with database.read() as session:
            session.execute(select(database_time()))
    except (SQLAlchemyError, OSError) as error:
        advice = "start it, or set RANKPRESS_DATABASE_URL to where it is; nothing works without it"
        return failed("database", f"{shown} does not answer: {first_line(error)}", advice)
    server_version = database.engine.dialect.server_version_info or ()
    server = f"{database.engine.dialect.name} {'.'.join(map(str, server_version))}"
    return ok("database", f"{shown} answers ({server}, {_milliseconds(started)})")


def check_schema(settings: Settings, database: Database) -> Finding:
    """Whether the schema is this version's; an embedded service brings it there by itself."""
    if schema_at_head(database):
        return ok("schema", "at head")
    if settings.embedded:
        return warning("schema", "it is not the one of this version", "the next `rankpress serve` brings it up to date")
    if not has_schema(database):
        return failed("schema", "there is none yet", "run `rankpress migrate`")
    advice = "stop API and workers of the other version, back up, run `rankpress migrate`"
    return failed("schema", "it is not the one of this version", advice)


def check_clock(database: Database, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Finding:
    """How far this machine's clock is from the database's; leases are counted on the latter alone."""
    with database.read() as session:
        before = now()
        theirs = session.scalar(select(database_time()))
        after = now()
    if theirs is None:
        return skipped("clock", "the database told no time")
    seconds = (theirs - (before + (after - before) / 2)).total_seconds()
    found = f"{abs(seconds):.1f} s {'behind' if seconds > 0 else 'ahead of'} the database's"
    if abs(seconds) > CLOCK_SECONDS_MAX:
        return warning("clock", found, "run a time service (NTP) here and there: log lines and ages are off by this")
    return ok("clock", found)


def check_keys(settings: Settings, database: Database) -> Finding:
    """Whether there is a key that every API process takes."""
    if settings.embedded:
        return skipped("keys", "the embedded service makes its own")
    with database.read() as session:
        count = sum(key.revoked_at is None for key in list_keys(session))
    if settings.api_key is None and count == 0:
        advice = "for `rankpress serve` set RANKPRESS_API_KEY, or run `rankpress keys add NAME`; workers need none"
        return warning("keys", "no RANKPRESS_API_KEY, and no key in the database", advice)
    configured = "RANKPRESS_API_KEY, and " if settings.api_key is not None else ""
    return ok("keys", f"{configured}{count} in the database")


def check_workers(settings: Settings, database: Database) -> Finding:
    """Which queues are served, and whether jobs wait in one that is not."""
    if settings.embedded:
        return skipped("workers", "the embedded service has one inside")
    with database.read() as session:
        live = list_workers(session)
        waiting = {queue: count_claimable(session, queue, _ANY_GPU_BYTES) for queue in QUEUES}
    served = {queue: sum(queue in worker.queues for worker in live) for queue in QUEUES}
    found = ", ".join(f"{queue}: {served[queue]} live, {waiting[queue]} jobs wait" for queue in QUEUES)
    if any(waiting[queue] and not served[queue] for queue in QUEUES) or not live:
        return warning("workers", found, "start `rankpress worker --queue …` where the queue should be served")
    return ok("workers", found)


def check_this_worker(settings: Settings, database: Database) -> Finding:
    """Whether a worker of this machine has been heard of lately: what a container's health check asks."""
    host = socket.gethostname()
    with database.read() as session:
        now = session.scalar(select(database_time()))
        seen = [worker.last_seen_at for worker in list_workers(session) if worker.host == host]
    if now is None or not seen:
        return failed("worker", f"no live worker is known of {host}", "start it; its log says why it does not")
    seconds = (now - max(seen)).total_seconds()
    if seconds > settings.worker_gone_seconds:
        return failed("worker", f"last heard of {seconds:.0f} s ago", "restart it; its jobs go on elsewhere")
    return ok("worker", f"last heard of {seconds:.0f} s ago")


def check_broker(settings: Settings) -> Finding:
    """Whether it answers, and whether it may forget bells when its memory is full."""
    if settings.embedded:
        return skipped("broker", "the embedded service has its own in memory")
    shown = shown_url(settings.broker_url)
    started = time.monotonic()
    try:
        with make_celery(settings).connection_for_write(transport_options=_ONCE) as connection:
            client = getattr(connection.default_channel, "client", None)
            memory = client.info("memory") if client is not None else {}
    except Exception as error:  # noqa: BLE001 - transports raise what they like
        advice = "start it, or set RANKPRESS_BROKER_URL to where it is; until then jobs are accepted and wait"
        return failed("broker", f"{shown} does not answer: {first_line(error)}", advice)
    found = f"{shown} answers ({_milliseconds(started)})"
    policy = memory.get("maxmemory_policy", "noeviction")
    if memory.get("maxmemory", 0) and policy != "noeviction":
        return warning("broker", f"{found}; when full it evicts ({policy})", "set maxmemory-policy noeviction")
    return ok("broker", found)


def check_blobs(settings: Settings) -> Finding:
    """Whether a small file can be written, read and deleted."""
    shown = shown_url(settings.resolved_blob_url)
    started = time.monotonic()
    try:
        open_blobs(settings).check()
    except (BlobStoreAwayError, ProblemError, OSError, ValueError, obstore.exceptions.BaseError) as error:
        advice = (
            "mount the folder, make it writable for this user, or set RANKPRESS_BLOB_URL"
            if settings.resolved_blob_url.startswith("file:")
            else "see that bucket, AWS_… credentials and endpoint are right"
        )
        return failed("blobs", f"{shown}: {first_line(error).removeprefix(f'{shown}: ')}", advice)
    return ok("blobs", f"wrote, read and deleted a small file in {shown} ({_milliseconds(started)})")


def first_line(error: BaseException) -> str:
    """What an error says, without the statement or the picture of internals that follows."""
    original = getattr(error, "orig", None) or error
    return next((line.strip() for line in str(original).splitlines() if line.strip()), type(original).__name__)


def _milliseconds(started: float) -> str:
    return f"{1000 * (time.monotonic() - started):.0f} ms"
