"""The worker of the many-machine mode: `celery --app worker.app worker`."""

from typing import Any

import structlog
from celery import Celery, signals

from service.bell import make_celery
from service.blobs.store import BlobStore
from service.settings import Settings
from service.store.session import Database
from worker.slots import Slots, WorkerRow
from worker.supervisor import CHILD_COMMAND, Supervisor
from worker.tasks import install_tasks

log = structlog.get_logger(__name__)


def create_worker(settings: Settings, *, child_command: tuple[str, ...] = CHILD_COMMAND) -> Celery:
    """A Celery app whose worker runs this service's jobs; nothing is contacted before it starts.

    Its pool is threads, as in the embedded mode: a supervising thread computes nothing, and one process sees every
    stop. When it is asked to stop, running jobs go back to the queue with their checkpoints.
    """
    app = make_celery(settings)
    app.conf.update(worker_pool="threads", worker_concurrency=settings.slots)
    database = Database(settings.resolved_database_url)
    in_files = settings.resolved_blob_url.startswith("file:")  # those are staged beside where they end
    blobs = BlobStore(settings.resolved_blob_url, staging_dir=None if in_files else settings.data_dir / "staging")
    slots = Slots(settings)
    row = WorkerRow(database, settings, slots)
    supervisor = Supervisor(settings, database, blobs, slots, row.worker_id, child_command=child_command)
    install_tasks(app, supervisor, settings.queue)

    def ready(**_: Any) -> None:
        row.start()

    def stopping(**_: Any) -> None:
        supervisor.drain()

    def stopped(**_: Any) -> None:
        row.stop()
        database.dispose()

    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(stopping, weak=False)
    signals.worker_shutdown.connect(stopped, weak=False)
    return app


def __getattr__(name: str) -> Celery:
    """Make `app` when Celery's command asks for it, with the settings of that moment."""
    if name == "app":
        app = create_worker(Settings())
        globals()["app"] = app
        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
