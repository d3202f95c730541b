"""The sweeper: what brings every accepted job to its end although messages, workers and services get lost.

It runs in every API process, without a leader: each rule is a conditional change of rows, so running it twice at
once, or seldom, is harmless.
"""

import random
import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.orm import Session

from service.bell import Bell
from service.blobs.store import BlobStore
from service.orphans import delete_dropped, delete_orphans, settled_seconds
from service.settings import QUEUES, Settings
from service.store.attempts import count_claimable
from service.store.checkpoints import drop_finished_checkpoints
from service.store.deadlines import fail_unbegun, fail_used_up
from service.store.deletion import Deleted, drop_unnamed
from service.store.idempotency import forget_old_keys
from service.store.leases import cancel_flagged, close_lost_attempts, expire_leases, move_stranded
from service.store.retention import drop_old_artifacts, drop_old_datasets, drop_old_jobs, drop_old_models
from service.store.session import Database
from service.store.workers import forget_gone_workers, idle_slots, mark_gone_workers

JITTER = 0.2  # so that several services do not sweep in step
HOUSEKEEPING_SECONDS = 600.0
BATCHES_AT_ONCE = 50  # of one rule of retention in one sweep

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
            self.overdue_jobs,
            self.lost_attempts,
            self.gone_workers,
            self.finished_checkpoints,
            self.stranded_jobs,
            self.waiting_jobs,
        ]
        now = time.monotonic()
        if now >= self._next_housekeeping:
            self._next_housekeeping = now + HOUSEKEEPING_SECONDS
            rules += [
                self.old_jobs,
                self.old_artifacts,
                self.old_models,
                self.old_datasets,
                self.unnamed_uploads,
                self.old_workers,
                self.old_idempotency_keys,
                self.orphan_blobs,
            ]
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

    def overdue_jobs(self) -> int:
        """Fail the waiting jobs that did not begin in time, or whose attempts have used up their time."""
        with self.database.write() as session:
            failed = [*fail_unbegun(session), *fail_used_up(session)]
        for job_id in failed:
            log.warning("deadline_passed", job_id=job_id)
        return len(failed)

    def lost_attempts(self) -> int:
        """Close attempts whose job has moved on."""
        with self.database.write() as session:
            return close_lost_attempts(session)

    def gone_workers(self) -> int:
        """Note the workers that are silent."""
        with self.database.write() as session:
            return mark_gone_workers(session, self.settings.worker_gone_seconds)

    def finished_checkpoints(self) -> int:
        """Delete the checkpoints of jobs that have succeeded, and of those that no retry is expected of any more."""
        with self.database.write() as session:
            keys = drop_finished_checkpoints(session, keep_seconds=self.settings.checkpoint_keep_seconds)
        for key in keys:
            self.blobs.delete(key)
        return len(keys)

    def stranded_jobs(self) -> int:
        """Move waiting jobs, that any device may run, to a queue that a worker serves."""
        with self.database.write() as session:
            return move_stranded(session)

    def waiting_jobs(self) -> int:
        """Ring again when jobs could be claimed and no bell waits."""
        rung = 0
        for queue in QUEUES:
            with self.database.read() as session:
                waiting = count_claimable(session, queue)
                idle = idle_slots(session, queue)
            depth = self.bell.queue_depth(queue) if waiting else None
            if depth == 0:
                bells = min(waiting, max(1, idle))
                rung += bells if self.bell.ring(queue, bells) else 0
            elif waiting and depth is None:
                break  # one that hangs takes seconds to say nothing: the next sweep asks again
        return rung

    def old_jobs(self) -> int:
        """Delete jobs that ended long ago, with their history, checkpoints and artifacts."""
        return self._drop_old(drop_old_jobs, self.settings.job_keep_seconds)

    def old_artifacts(self) -> int:
        """Delete artifacts that were made long ago."""
        return self._drop_old(drop_old_artifacts, self.settings.artifact_keep_seconds)

    def old_models(self) -> int:
        """Delete models that have not been used for long."""
        return self._drop_old(drop_old_models, self.settings.model_keep_seconds)

    def old_datasets(self) -> int:
        """Delete datasets that have not been used for long."""
        return self._drop_old(drop_old_datasets, self.settings.dataset_keep_seconds)

    def unnamed_uploads(self) -> int:
        """Delete the rows of deleted models and datasets whose last job is gone."""
        with self.database.write() as session:
            return drop_unnamed(session)

    def old_workers(self) -> int:
        """Forget the workers that have been gone for long."""
        with self.database.write() as session:
            return forget_gone_workers(session, self.settings.worker_keep_seconds)

    def _drop_old(self, drop: Callable[[Session, float], tuple[int, Deleted]], keep_seconds: float | None) -> int:
        if keep_seconds is None:
            return 0
        total = 0
        for _ in range(BATCHES_AT_ONCE):
            with self.database.write() as session:
                count, deleted = drop(session, keep_seconds)
            if not count:
                break
            total += count
            delete_dropped(self.database, self.blobs, deleted.keys, settled_seconds(self.settings))
        return total

    def orphan_blobs(self) -> int:
        """Delete files that no row speaks of and that are older than any upload could take."""
        age = self.settings.orphan_seconds
        swept = self.blobs.sweep_staging(age)
        return swept + delete_orphans(self.database, self.blobs, self.blobs.keys_older_than(age), age)

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
