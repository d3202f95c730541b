"""How many children run here at once, and what each may use: one GPU, or a share of the cores."""

import threading
from collections.abc import Collection, Iterator, Sequence
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
        self.count = settings.slots or (max(len(found), 1) if "gpu" in self.queues else 1)
        self.gpus = found[: self.count] if "gpu" in self.queues else []
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
    def take(self, queue: str, beyond: Collection[int] = ()) -> Iterator[Slot | None]:
        """Take a free slot for a job of the queue, but none of those numbers, or None if there is none.

        For "gpu" it is the one with the least GPU; for "cpu" one without a GPU if it can.

        An embedded worker without a GPU takes jobs for one too: their child says what is missing.
        """
        with self._changed:
            number = self._best(queue, beyond)
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

    def memory_bytes_free(self, queue: str) -> int | None:
        """What a job of the queue may ask of a GPU now: the most that a free slot has; None where no slot is free."""
        with self._changed:
            free = [number for number in self._free if queue == "cpu" or not self.gpus or number < len(self.gpus)]
            return max((self._memory_bytes_of(number) for number in free), default=None)

    def _best(self, queue: str, beyond: Collection[int]) -> int | None:
        free = self._free.difference(beyond)
        if queue == "gpu" and self.gpus:
            with_gpu = (number for number in free if number < len(self.gpus))
            return min(with_gpu, key=lambda number: (self._memory_bytes_of(number), number), default=None)
        return max(free, default=None)

    def _memory_bytes_of(self, number: int) -> int:
        return (self.gpus[number].memory_bytes or 0) if number < len(self.gpus) else 0


def _queues(settings: Settings, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    if settings.worker_queues:
        return tuple(settings.worker_queues.split(","))
    return QUEUES if settings.embedded or gpus else ("cpu",)
