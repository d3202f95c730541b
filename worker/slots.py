"""How many children run here at once, and what each may use: one GPU, or a share of the cores."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from service.settings import QUEUES, Settings
from worker.gpus import Gpu, visible_gpus


@dataclass(frozen=True)
class Slot:
    """What one child may use."""

    number: int
    thread_count: int
    memory_bytes_max: int
    gpu: Gpu | None


class Slots:
    """The slots of this process; an attempt takes one for as long as it runs.

    The first slots have a GPU each, while there are GPUs; the others compute on the CPU.
    """

    def __init__(self, settings: Settings, gpus: Sequence[Gpu] | None = None) -> None:
        found = list(visible_gpus() if gpus is None else gpus)
        self.queues = _queues(settings, found)
        self.gpus = found if "gpu" in self.queues else []
        self.count = settings.slots or max(len(self.gpus), 1)
        self._thread_count = settings.threads_per_child(self.count)
        self._memory_bytes = settings.memory_per_child_bytes(self.count)
        self._free = set(range(self.count))
        self._changed = threading.Lock()

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        with self._changed:
            return self.count - len(self._free)

    @contextmanager
    def take(self, queue: str) -> Iterator[Slot | None]:
        """Take a free slot for a job of the queue, or None: with a GPU for "gpu", and for "cpu" one without if it can.

        An embedded worker without a GPU takes jobs for one too: their child says what is missing.
        """
        with self._changed:
            number = self._best(queue)
            if number is not None:
                self._free.remove(number)
        if number is None:
            yield None
            return
        try:
            gpu = self.gpus[number] if number < len(self.gpus) else None
            yield Slot(number, self._thread_count, self._memory_bytes, gpu)
        finally:
            with self._changed:
                self._free.add(number)

    def _best(self, queue: str) -> int | None:
        if queue == "gpu" and self.gpus:
            return min((number for number in self._free if number < len(self.gpus)), default=None)
        return max(self._free, default=None)


def _queues(settings: Settings, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    if settings.worker_queues:
        return tuple(settings.worker_queues.split(","))
    return QUEUES if settings.embedded or gpus else ("cpu",)
