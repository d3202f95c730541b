"""Every check of `rankpress doctor`, in an order in which each one's ground has been looked at before."""

from collections.abc import Iterator, Sequence

from service.checks import machine, shared
from service.checks.finding import Finding, Status, skipped
from service.settings import DATABASE_FILE, Settings
from service.store.session import Database

_NEEDS_DATABASE = ("schema", "clock", "keys", "workers")


def examine(settings: Settings, gpus: Sequence[machine.SeenGpu] | None) -> Iterator[Finding]:
    """Look at everything that a service with these settings stands on."""
    if settings.embedded and not settings.database_url and not (settings.data_dir / DATABASE_FILE).exists():
        for name in ("database", "blobs"):
            yield skipped(name, f"nothing is in {settings.data_dir} yet: the first `rankpress serve` makes it")
    else:
        yield from _examine_database(settings)
        yield shared.check_blobs(settings)
    yield shared.check_broker(settings)
    yield from machine.check_disks(settings)
    yield machine.check_memory(settings, gpus or [])
    yield machine.check_gpu(settings, gpus, machine.installed_torch())


def _examine_database(settings: Settings) -> Iterator[Finding]:
    database = Database(settings.resolved_database_url, timeout_seconds=settings.database_timeout_seconds)
    try:
        answer = shared.check_database(database)
        yield answer
        schema = shared.check_schema(settings, database) if answer.status is Status.OK else None
        if schema is None:
            yield from (skipped(name, "the database does not answer") for name in _NEEDS_DATABASE)
            return
        yield schema
        yield shared.check_clock(database)
        if schema.status is Status.OK:
            yield shared.check_keys(settings, database)
            yield shared.check_workers(settings, database)
        else:
            yield from (skipped(name, "the schema is another one") for name in ("keys", "workers"))
    finally:
        database.dispose()
