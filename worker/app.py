"""The worker of the many-machine mode, which `rankpress worker` runs."""

import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import structlog
from celery import Celery, signals
from celery.apps.worker import Worker
from celery.exceptions import SecurityWarning
from kombu.entity import Exchange, Queue

from service.bell import Bell, broker_queue, make_celery
from service.blobs.opening import open_blobs
from service.settings import Settings
from service.store.session import Database
from worker.row import WorkerRow
from worker.slots import Slots
from worker.supervisor import CHILD_COMMAND, Supervisor
from worker.tasks import install_tasks

EXIT_DEAF = 75  # EX_TEMPFAIL: whoever started the worker starts it again

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HostedWorker:
    """A Celery app whose worker runs this service's jobs, with what belongs to it."""

    app: Celery
    slots: Slots
    row: WorkerRow


def create_worker(settings: Settings, *, child_command: tuple[str, ...] = CHILD_COMMAND) -> HostedWorker:
    """Put the worker together; nothing is contacted before it starts, but a shared folder must be there.

    Its pool is threads, as in the embedded mode: a supervising thread computes nothing, and one process sees every
    stop. When it is asked to stop, running jobs go back to the queue with their checkpoints.
    """
    app = make_celery(settings)
    database = Database(settings.resolved_database_url, timeout_seconds=settings.database_timeout_seconds)
    blobs = open_blobs(settings)
    slots = Slots(settings)
    bell = Bell(app)
    row = WorkerRow(database, settings, slots, bell=bell, on_deaf=lambda: _leave_deaf(supervisor, slots, settings))
    supervisor = Supervisor(settings, database, blobs, slots, row.worker_id, child_command=child_command, bell=bell)
    queues = [broker_queue(queue) for queue in slots.queues]
    app.conf.update(
        worker_pool="threads",
        worker_concurrency=slots.count,
        task_queues=[_queue(name) for name in queues],
    )
    install_tasks(app, supervisor)

    def ready(**_: Any) -> None:
        supervisor.open(alone=False)
        row.start()
        for queue in slots.queues:  # jobs may have waited for this start
            bell.ring(queue)

    def stopping(**_: Any) -> None:
        supervisor.drain()

    def stopped(**_: Any) -> None:
        row.stop()
        supervisor.close()
        database.dispose()

    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(stopping, weak=False)
    signals.worker_shutdown.connect(stopped, weak=False)
    return HostedWorker(app, slots, row)


def _queue(name: str) -> Any:
    """The broker's queue as the ringing side declares it."""
    exchange: Any = Exchange(name)  # type: ignore[no-untyped-call]
    return Queue(name, exchange, routing_key=name)  # type: ignore[no-untyped-call]


def run_worker(hosted: HostedWorker, settings: Settings) -> int:
    """Work until a signal asks for the end; returns the exit code.

    SIGTERM and SIGINT drain: children write a checkpoint, their jobs go back uncounted, and the process ends.
    """
    _warn_of_root()
    worker = Worker(
        app=hosted.app,
        hostname=f"{hosted.row.worker_id}@{os.uname().nodename}",
        loglevel=settings.log_level,
        quiet=True,
        without_heartbeat=True,
        without_mingle=True,
        without_gossip=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _warn_of_root() -> None:
    """Say in one line what Celery says in ten, with an option that is not there."""
    warnings.filterwarnings("ignore", category=SecurityWarning)
    if os.geteuid() == 0:
        log.warning("worker_runs_as_root", advice="run it as a user of its own: it runs what users upload")


def _leave_deaf(supervisor: Supervisor, slots: Slots, settings: Settings) -> NoReturn:
    """Give back what runs, and end: a consumer that hangs would not hear a polite request."""
    supervisor.drain()
    until = time.monotonic() + settings.drain_grace_seconds + settings.cancel_grace_seconds
    while slots.busy and time.monotonic() < until:
        time.sleep(0.1)
    sys.stderr.flush()
    os._exit(EXIT_DEAF)
