"""The worker's own row: kept alive from a thread of its own, so that a silent worker can be told from an idle one."""

import os
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version

import structlog
from sqlalchemy.orm import Session

from service.bell import Bell
from service.contract.ids import WORKER, new_id
from service.settings import Settings
from service.store.attempts import count_claimable
from service.store.session import DATABASE_AWAY, Database
from service.store.workers import beat_worker, register_worker, retire_worker
from worker.slots import Slots

log = structlog.get_logger(__name__)


class WorkerRow:
    """Registers the worker, beats, and notices when the worker has become deaf.

    A consumer can stop consuming while its process lives (known of Celery on Redis after a reconnect): jobs wait, a
    slot is free, and no bell arrives. With a bell that reaches the broker all the same, `on_deaf` is called once that
    has lasted `worker_deaf_seconds`.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        slots: Slots,
        *,
        bell: Bell | None = None,
        on_deaf: Callable[[], None] | None = None,
    ) -> None:
        self.worker_id = new_id(WORKER)
        self._database = database
        self._settings = settings
        self._slots = slots
        self._bell = bell
        self._on_deaf = on_deaf
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._registered = False

    def start(self) -> None:
        """Register the worker and keep it known."""
        self._beat()
        self._thread = threading.Thread(target=self._run, name="worker-row", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Say that the worker has stopped in good order."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        try:
            with self._database.write() as session:
                retire_worker(session, self.worker_id)
        except DATABASE_AWAY as error:
            log.warning("worker_not_retired", worker_id=self.worker_id, error=str(error))

    def _run(self) -> None:
        while not self._stopped.wait(self._settings.heartbeat_seconds):
            try:
                self._beat()
                deaf = self._deaf()
            except Exception:
                log.exception("worker_row_failed", worker_id=self.worker_id)  # a row that is silent is gone
                continue
            if deaf and self._on_deaf is not None:
                log.error("worker_deaf", worker_id=self.worker_id, seconds=self._settings.worker_deaf_seconds)
                self._on_deaf()

    def _beat(self) -> None:
        try:
            with self._database.write() as session:
                if not (self._registered and beat_worker(session, self.worker_id, self._slots.busy)):
                    self._register(session)
            self._registered = True
        except DATABASE_AWAY as error:
            log.warning("worker_beat_failed", worker_id=self.worker_id, error=str(error))

    def _register(self, session: Session) -> None:
        register_worker(
            session,
            self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=self._slots.queues,
            slots=self._slots.count,
            version=version("rankpress"),
            devices={"cuda": [gpu.facts() for gpu in self._slots.gpus]},
        )

    def _deaf(self) -> bool:
        """Whether a job that a free slot here could run has waited for long, although bells can be heard."""
        if self._bell is None or not self._job_waits_for_a_slot() or not self._broker_answers():
            self._waiting_since = None
            return False
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since >= self._settings.worker_deaf_seconds

    def _job_waits_for_a_slot(self) -> bool:
        free = {queue: self._slots.memory_bytes_free(queue) for queue in self._slots.queues}
        try:
            with self._database.read() as session:
                return any(
                    bytes_free is not None and count_claimable(session, queue, bytes_free)
                    for queue, bytes_free in free.items()
                )
        except DATABASE_AWAY:
            return False

    def _broker_answers(self) -> bool:
        return self._bell is not None and self._bell.queue_depth(self._slots.queues[0]) is not None
