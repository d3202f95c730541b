"""How many children run here at once, what each may use, and the worker's own row."""

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.contract.ids import WORKER, new_id
from service.settings import Settings
from service.store.session import Database
from service.store.workers import beat_worker, register_worker, retire_worker
from worker.lease import DATABASE_AWAY

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Slot:
    """What one child may use."""

    number: int
    thread_count: int
    memory_bytes_max: int
    gpu: str | None  # its name for CUDA_VISIBLE_DEVICES


class Slots:
    """The slots of this process; an attempt takes one for as long as it runs."""

    def __init__(self, settings: Settings, gpus: list[str] | None = None) -> None:
        self.gpus = visible_gpus(os.environ) if gpus is None else gpus
        self.count = settings.slots
        self._thread_count = settings.threads_per_child
        self._memory_bytes = settings.memory_per_child_bytes
        self._free = list(range(settings.slots))
        self._changed = threading.Condition()

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        with self._changed:
            return self.count - len(self._free)

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """Take the lowest free slot, waiting for one if need be."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            number = self._free.pop(0)
        try:
            gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
            yield Slot(number, self._thread_count, self._memory_bytes, gpu)
        finally:
            with self._changed:
                self._free = sorted([*self._free, number])
                self._changed.notify()


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, found without torch: `CUDA_VISIBLE_DEVICES`, else what the driver lists."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in {"", "-1"}]
    try:
        return [str(number) for number, _ in enumerate(_NVIDIA_GPUS.iterdir())]
    except OSError:
        return []


class WorkerRow:
    """Keeps this worker's row alive, from its own thread, so that a silent worker can be told from an idle one."""

    def __init__(self, database: Database, settings: Settings, slots: Slots) -> None:
        self.worker_id = new_id(WORKER)
        self._database = database
        self._settings = settings
        self._slots = slots
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
            self._beat()

    def _beat(self) -> None:
        try:
            with self._database.write() as session:
                if not self._registered:
                    register_worker(
                        session,
                        self.worker_id,
                        host=socket.gethostname(),
                        pid=os.getpid(),
                        queue=self._settings.queue,
                        slots=self._slots.count,
                        devices={"cuda": self._slots.gpus},
                    )
                else:
                    beat_worker(session, self.worker_id, self._slots.busy)
            self._registered = True
        except DATABASE_AWAY as error:
            log.warning("worker_beat_failed", worker_id=self.worker_id, error=str(error))
