"""The worker inside `rankpress serve`: Celery's own, unmodified, on a thread and on a broker in memory."""

import contextlib
import threading
import time
from collections.abc import Sequence

import structlog
from celery.worker import WorkController
from celery.worker import state as celery_state

from service.bell import broker_queue
from service.services import Services
from service.settings import QUEUES
from service.store.leases import release_all_leases
from worker.row import WorkerRow
from worker.slots import Slots
from worker.supervisor import CHILD_COMMAND, Supervisor
from worker.tasks import install_tasks

START_SECONDS = 30.0
STOP_SECONDS = 10.0
_POLL_SECONDS = 0.1

log = structlog.get_logger(__name__)


class EmbeddedWorker:
    """A component of the API's process; the caller holds the lock of the data directory.

    Because of that lock no other process can own a lease or a scratch directory, so `start` takes them all back.
    """

    def __init__(self, services: Services, *, child_command: Sequence[str] = CHILD_COMMAND) -> None:
        self._services = services
        self._slots = Slots(services.settings)
        self._row = WorkerRow(services.database, services.settings, self._slots)
        self._supervisor = Supervisor(
            services.settings,
            services.database,
            services.blobs,
            self._slots,
            self._row.worker_id,
            child_command=child_command,
        )
        install_tasks(services.bell.app, self._supervisor)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        """Put back what an earlier process left running, and begin to work."""
        self._supervisor.open(alone=True)
        with self._services.database.write() as session:
            released = release_all_leases(session)
        for job_id, state in released.items():
            log.warning("lease_released", job_id=job_id, state=state)
        self._row.start()
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            raise RuntimeError(f"expected the embedded worker to be ready in {START_SECONDS:g} seconds; it is not")
        self._services.bell.ring(QUEUES[0], self._slots.count)  # jobs may have waited for this start

    def stop(self) -> None:
        """End the running children, give their jobs back uncounted, and stop Celery; prompt and in order."""
        self._supervisor.drain(min(self._services.settings.drain_grace_seconds, STOP_SECONDS / 2))
        celery_state.should_stop = 0  # the exit code; Celery's own way to be asked from another thread
        until = time.monotonic() + STOP_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            self._services.bell.ring(QUEUES[0])  # wakes the consumer, which looks every 2 s
            self._thread.join(_POLL_SECONDS)
        if self._thread.is_alive():
            log.error("worker_not_stopped", seconds=STOP_SECONDS)
        celery_state.should_stop = None
        self._row.stop()
        if not self._thread.is_alive():
            self._supervisor.close()

    def _work(self) -> None:
        settings = self._services.settings
        app = self._services.bell.app
        app.set_default()  # the pool's threads look their task up in the process's default app
        controller = WorkController(
            app=app,
            hostname=f"{self._row.worker_id}@embedded",
            pool_cls="threads",
            concurrency=self._slots.count,
            queues=[broker_queue(queue) for queue in self._slots.queues],
            loglevel=settings.log_level,
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
            ready_callback=lambda _consumer: self._ready.set(),
        )
        with contextlib.suppress(SystemExit):
            controller.start()
