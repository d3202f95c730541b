"""The sweeper: what brings every accepted job to its end although messages, workers and services get lost.

It runs in every API process, without a leader: each rule is a conditional change of rows, so running it twice at
once, or seldom, is harmless.
"""

import random
import threading
import time
from collections.abc import Callable
from itertools import islice

import structlog

from service.bell import Bell
from service.blobs.store import BlobStore
from service.settings import QUEUES, Settings
from service.store.attempts import count_claimable
from service.store.blobs import unreferenced
from service.store.checkpoints import drop_finished_checkpoints
from service.store.idempotency import forget_old_keys
from service.store.leases import cancel_flagged, close_lost_attempts, expire_leases, move_stranded
from service.store.session import Database
from service.store.workers import idle_slots, mark_gone_workers

JITTER = 0.2  # so that several services do not sweep in step
HOUSEKEEPING_SECONDS = 600.0
_KEYS_AT_ONCE = 500

log = structlog.get_logger(__name__)


class Reconciler:
    """Runs the rules, once or in a thread of its own."""

    def __init__(self, database: Database, bell: Bell, settings: Settings, blobs: BlobStore) -> None:
        self.database = database
        self.bell = bell
        self.settings = settings
        self.blobs = blobs
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next_housekeeping = 0.0

    def start(self) -> None:
        """Sweep every `reconcile_seconds` until `stop`."""
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the thread after the rule it is at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def run_once(self) -> dict[str, int]:
        """Apply every rule once; returns how much each of them found to do. A rule that fails hinders no other."""
        rules: list[Callable[[], int]] = [
            self.expired_leases,
            self.flagged_jobs,
            self.lost_attempts,
            self.gone_workers,
            self.finished_checkpoints,
            self.stranded_jobs,
            self.waiting_jobs,
        ]
        now = time.monotonic()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + HOUSEKEEPING_SECONDS
            rules += [self.orphan_blobs, self.old_idempotency_keys]
        return {rule.__name__: self._apply(rule) for rule in rules}

    def expired_leases(self) -> int:
        """Requeue, fail or cancel the running jobs whose worker is silent."""
        settings = self.settings
        with self.database.write() as session:
            moved = expire_leases(
                session,
                grace_seconds=settings.reap_seconds - settings.lease_seconds,
                retry_base_seconds=settings.retry_base_seconds,
                retry_cap_seconds=settings.retry_cap_seconds,
            )
        for job_id, state in moved.items():
            log.warning("lease_expired", job_id=job_id, state=state)
        return len(moved)

    def flagged_jobs(self) -> int:
        """Cancel the waiting jobs that carry a cancel flag."""
        with self.database.write() as session:
            return len(cancel_flagged(session))

    def lost_attempts(self) -> int:
        """Close attempts whose job has moved on."""
        with self.database.write() as session:
            return close_lost_attempts(session)

    def gone_workers(self) -> int:
        """Note the workers that are silent."""
        with self.database.write() as session:
            return mark_gone_workers(session, self.settings.worker_gone_seconds)

    def finished_checkpoints(self) -> int:
        """Delete the checkpoints of jobs that have ended."""
        with self.database.write() as session:
            keys = drop_finished_checkpoints(session)
        for key in keys:
            self.blobs.delete(key)
        return len(keys)

    def stranded_jobs(self) -> int:
        """Move waiting jobs, that any device may run, to a queue that a worker serves."""
        with self.database.write() as session:
            return move_stranded(session)

    def waiting_jobs(self) -> int:
        """Ring again when jobs could be claimed and no bell waits."""
        return sum(self._ring_again(queue) for queue in QUEUES)

    def _ring_again(self, queue: str) -> int:
        with self.database.read() as session:
            waiting = count_claimable(session, queue)
            idle = idle_slots(session, queue)
        if waiting == 0 or self.bell.queue_depth(queue) != 0:
            return 0
        bells = min(waiting, max(1, idle))
        return bells if self.bell.ring(queue, bells) else 0

    def orphan_blobs(self) -> int:
        """Delete files that no row speaks of and that are older than any upload could take."""
        age = self.settings.orphan_seconds
        deleted = self.blobs.sweep_staging(age)
        keys = self.blobs.keys_older_than(age)
        while batch := list(islice(keys, _KEYS_AT_ONCE)):
            with self.database.read() as session:
                orphans = unreferenced(session, batch)
            # Read again: the same content may have been uploaded anew since the list was made.
            for key in orphans:
                deleted += self.blobs.delete_if_older(key, age)
        return deleted

    def old_idempotency_keys(self) -> int:
        """Forget keys that no client will send again."""
        with self.database.write() as session:
            return forget_old_keys(session, self.settings.idempotency_keep_seconds)

    def _apply(self, rule: Callable[[], int]) -> int:
        try:
            return rule()
        except Exception:
            # The database or the blob store may be away for a while: the next sweep tries again.
            log.exception("rule_failed", rule=rule.__name__)
            return 0

    def _run(self) -> None:
        while not self._stop.is_set():
            self.run_once()
            pause = self.settings.reconcile_seconds * (1 + random.uniform(-JITTER, JITTER))  # noqa: S311
            self._stop.wait(pause)
