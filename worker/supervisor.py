"""Claims jobs and sees each attempt to its end; the same in the embedded mode and on many machines."""

import errno
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import structlog
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from service.bell import Bell
from service.blobs.errors import BlobStoreAwayError
from service.blobs.store import BlobStore
from service.contract.errors import ErrorCode, Problem, ProblemError
from service.contract.marks import mark
from service.contract.states import AttemptOutcome, JobState
from service.settings import Settings
from service.store import attempts
from service.store.attempts import Claim, backoff_seconds
from service.store.events import told_before
from service.store.session import DATABASE_AWAY, Database
from worker.attempt import JobAttempt
from worker.cache import BlobCache
from worker.child import ChannelBrokenError
from worker.endings import Canceled, Crashed, Deferred, Done, Drained, Ending, Failed, LeaseLostError
from worker.lease import Lease
from worker.scratch import Scratch
from worker.slots import Slot, Slots
from worker.stage import Drain

CHILD_COMMAND = (sys.executable, "-m", "worker.runner")

UNCOUNTED = frozenset({AttemptOutcome.DRAINED, AttemptOutcome.DEFERRED})
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS})
DEFERRED_AS_TRY = 3  # a job whose surroundings are away waits as after its third try, and as often as need be

log = structlog.get_logger(__name__)


class Supervisor:
    """Runs one job for each call of `run_next`; safe to call from as many threads as there are slots."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        blobs: BlobStore,
        slots: Slots,
        worker_id: str,
        *,
        child_command: Sequence[str] = CHILD_COMMAND,
        bell: Bell | None = None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._blobs = blobs
        self._slots = slots
        self._worker_id = worker_id
        self._child_command = child_command
        self._bell = bell
        self._drain = Drain()
        self._scratch = Scratch(settings.scratch_dir, worker_id)
        self._cache = BlobCache(blobs, settings.cache_dir, settings.cache_bytes)

    def open(self, *, alone: bool) -> None:
        """Take the scratch directory, before the first job; `alone` where no other worker can live on this data."""
        self._scratch.open(alone=alone)

    def close(self) -> None:
        """Give the scratch directory back, after the last job."""
        self._scratch.close()

    def run_next(self) -> bool:
        """Claim the best job of a queue served here and see its attempt to the end; False when there was none.

        The calling thread starts the children and must live until this returns: they die with it.
        """
        return any(self._run_from(queue) for queue in self._slots.queues)

    def _run_from(self, queue: str) -> bool:
        tried: set[int] = set()
        while True:
            with self._slots.take(queue, tried) as slot:
                if slot is None or self._drain:
                    return False
                claimed_at = time.monotonic()
                claim = self._claim(queue, slot)
                if claim is not None:
                    with bound_contextvars(job_id=claim.job_id, epoch=claim.epoch):  # on each line of this thread
                        mark("after_claim")
                        self._supervise(claim, slot, claimed_at)
                    return True
                if slot.gpu is None:
                    return False
                tried.add(slot.number)  # what waits may want a larger GPU, which another slot has

    def drain(self, grace_seconds: float | None = None) -> None:
        """Claim nothing more; running children may save themselves; their jobs go back to the queue uncounted."""
        self._drain.ask(self._settings.drain_grace_seconds if grace_seconds is None else grace_seconds)

    def _claim(self, queue: str, slot: Slot) -> Claim | None:
        try:
            with self._database.write() as session:
                claimed = attempts.claim(
                    session,
                    queue=queue,
                    worker_id=self._worker_id,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    lease_seconds=self._settings.lease_seconds,
                    gpu=None if slot.gpu is None else slot.gpu.uuid,
                    gpu_memory_bytes=self._memory_claimed(slot),
                )
        except DATABASE_AWAY as error:
            log.warning("claim_failed", queue=queue, error=str(error))
            return None
        return claimed if claimed is None or claimed.epoch == 1 else replace(claimed, told=self._told(claimed))

    def _told(self, claim: Claim) -> frozenset[str]:
        try:
            with self._database.read() as session:
                return told_before(session, claim.job_id)
        except DATABASE_AWAY as error:
            log.warning("history_not_read", job_id=claim.job_id, error=str(error))
            return frozenset()

    def _memory_claimed(self, slot: Slot) -> int:
        """What a job may ask of this slot's GPU; where one process is all there is, its child says what is missing."""
        if self._settings.embedded:
            return 2**63 - 1
        return 0 if slot.gpu is None else slot.gpu.memory_bytes or 0

    def _supervise(self, claim: Claim, slot: Slot, claimed_at: float) -> None:
        lease = Lease(self._database, self._settings, claim, claimed_at)
        log.info(
            "attempt_started", attempt=claim.attempt, slot=slot.number, gpu=None if slot.gpu is None else slot.gpu.uuid
        )
        try:
            ending = self._run(claim, lease, slot, claimed_at)
            if not isinstance(ending, Done):
                lease.write(lambda session: self._end(session, claim, ending))
            if isinstance(ending, Drained) and self._bell is not None:
                self._bell.ring(claim.queue)  # another worker can have it at once
            log.info("attempt_ended", ending=type(ending).__name__, detail=_detail(ending))
        except LeaseLostError as error:
            log.warning("lease_lost", reason=str(error))
            lease.let_go(lambda session: self._give_back(session, claim))
        except Exception:
            # Its lease runs out and the job goes on.
            log.exception("attempt_not_ended")
        finally:
            lease.fence.close()

    def _run(self, claim: Claim, lease: Lease, slot: Slot, claimed_at: float) -> Ending:
        attempt = JobAttempt(
            claim,
            lease,
            self._blobs,
            self._cache,
            self._settings,
            slot,
            self._drain,
            self._child_command,
            claimed_at,
            self._scratch.attempt(claim.job_id, claim.epoch),
        )
        try:
            return attempt.run()
        except LeaseLostError:
            raise
        except Exception as error:  # noqa: BLE001 - it is logged there, or said in the attempt's row
            return _ending_of(error)

    def _end(self, session: Session, claim: Claim, ending: Ending) -> bool:
        """Write how the attempt ended; False when it is not the live one."""
        if isinstance(ending, Failed) and ending.permanent:
            return attempts.finish_failed(session, claim.job_id, claim.epoch, ending.problem)
        if isinstance(ending, Canceled):
            return attempts.finish_canceled(session, claim.job_id, claim.epoch)
        problem = ending.problem if isinstance(ending, Failed) else None
        return self._requeue(session, claim, _outcome_of(ending), _detail(ending), problem) is not None

    def _give_back(self, session: Session, claim: Claim) -> bool:
        """Free a job whose lease this attempt has let run out, if no other attempt has it yet."""
        detail = "the worker could not confirm its lease in time and ended its child"
        return self._requeue(session, claim, AttemptOutcome.LOST, detail) is not None

    def _requeue(
        self,
        session: Session,
        claim: Claim,
        outcome: AttemptOutcome,
        detail: str | None,
        problem: Problem | None = None,
    ) -> JobState | None:
        counted = outcome not in UNCOUNTED
        tries = claim.attempt if counted else DEFERRED_AS_TRY
        delay = backoff_seconds(tries, self._settings.retry_base_seconds, self._settings.retry_cap_seconds)
        return attempts.requeue(
            session,
            claim.job_id,
            claim.epoch,
            outcome=outcome,
            delay_seconds=0.0 if outcome is AttemptOutcome.DRAINED else delay,
            counted=counted,
            detail=detail,
            problem=problem,
        )


def _ending_of(error: Exception) -> Ending:
    """What an attempt comes to that met an error outside of its child."""
    if isinstance(error, ChannelBrokenError):
        return Crashed(str(error))
    if isinstance(error, BlobStoreAwayError):
        return Deferred(f"the blob store is away: {error}")
    if isinstance(error, ProblemError) and error.code == ErrorCode.STORAGE_FULL:
        return Deferred(error.detail)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return Deferred(f"this machine's disk, or a folder mounted here, failed: {error}")
    log.error("attempt_failed", exc_info=error)
    return Crashed(f"the worker met an error of its own: {type(error).__name__}: {error}")


def _outcome_of(ending: Ending) -> AttemptOutcome:
    """How an attempt ended whose job goes back to the queue."""
    if isinstance(ending, Drained):
        return AttemptOutcome.DRAINED
    return AttemptOutcome.DEFERRED if isinstance(ending, Deferred) else AttemptOutcome.CRASHED


def _detail(ending: Ending) -> str | None:
    if isinstance(ending, Failed):
        return ending.problem.detail
    return ending.detail if isinstance(ending, Crashed | Deferred) else None
