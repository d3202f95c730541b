"""One attempt of a job: its directory, its files, its stages one after the other, and its artifacts."""

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import structlog

from service.blobs.errors import BlobDamagedError
from service.blobs.store import BlobStore
from service.contract.errors import ErrorCode
from service.contract.marks import mark
from service.contract.objective_spec import with_module
from service.contract.states import Phase
from service.settings import Settings
from service.store.attempts import Claim, InputFile
from service.store.checkpoints import CheckpointRow
from worker.cache import BlobCache
from worker.channel import Assignment
from worker.child import ChildProcess
from worker.endings import Canceled, Done, Drained, Ending, Failed, StopAskedError, failed, past_run_deadline
from worker.lease import Lease
from worker.relay import Relay
from worker.sandbox import child_environment
from worker.slots import Slot
from worker.stage import Drain, StageLimits, StageWatch
from worker.storing import sha256_of, store_results

StageName = Literal["learn", "emit", "verify"]
STAGES: tuple[StageName, ...] = ("learn", "emit", "verify")
_PHASE_OF_STAGE = {"emit": Phase.EMITTING, "verify": Phase.VERIFYING}

log = structlog.get_logger(__name__)


class _InputGoneError(Exception):
    """The job's model, dataset or objective cannot be had as it was uploaded."""


class JobAttempt:
    """Runs a claimed job under its lease; everything happens in the thread that calls `run`."""

    def __init__(
        self,
        claim: Claim,
        lease: Lease,
        blobs: BlobStore,
        cache: BlobCache,
        settings: Settings,
        slot: Slot,
        drain: Drain,
        child_command: Sequence[str],
        claimed_at: float,
        work_dir: Path,
    ) -> None:
        self._claim = claim
        self._lease = lease
        self._blobs = blobs
        self._cache = cache
        self._settings = settings
        self._slot = slot
        self._drain = drain
        self._child_command = child_command
        self._run_deadline = claimed_at + claim.run_seconds_limit - claim.run_seconds_used
        self._work_dir = work_dir
        self._relay = Relay(lease, blobs, claim, self._work_dir, self._go_on_storing)
        self._gpu = slot.gpu if claim.device != "cpu" else None

    def run(self) -> Ending:
        """Run the stages and store what they made; `Done` means that the job's row says succeeded.

        Raises
        ------
        LeaseLostError
            When the job is not this attempt's any more.
        """
        if (problem := self._missing_gpu()) is not None:
            return problem
        self._work_dir.mkdir(parents=True, exist_ok=True)
        try:
            first = self._first_assignment()
            return self._run_stages(first)
        except StopAskedError:
            return self._stopped()
        except _InputGoneError as error:
            return failed(ErrorCode.INTERNAL, str(error))
        finally:
            self._remove_directory()

    def _run_stages(self, first: Assignment) -> Ending:
        done = Done()
        for stage in STAGES:
            self._go_on()
            if phase := _PHASE_OF_STAGE.get(stage):
                self._relay.enter(phase)
            # Later stages read what "learn" left: the checkpoint it began from may be dropped by then.
            resume_path = first.resume_path if stage == "learn" else None
            ending = self._run_stage(first.model_copy(update={"stage": stage, "resume_path": resume_path}))
            if not isinstance(ending, Done):
                return ending
            done = ending
        self._relay.enter(Phase.STORING)
        self._relay.flush()
        return store_results(done, self._claim, self._lease, self._blobs, self._work_dir, self._go_on_storing)

    def _go_on(self) -> None:
        """Refuse to begin, or to go on fetching, what is of no use any more."""
        self._lease.check()
        if self._drain:
            raise StopAskedError
        self._go_on_storing()

    def _go_on_storing(self) -> None:
        """Refuse to wait longer for bytes on their way; those of a worker that stops have the grace of the drain."""
        if self._lease.cancel_requested or self._drain.over or time.monotonic() >= self._run_deadline:
            raise StopAskedError

    def _stopped(self) -> Ending:
        if self._lease.cancel_requested:
            return Canceled()
        return Drained() if self._drain else past_run_deadline(self._claim.run_seconds_limit)

    def _missing_gpu(self) -> Failed | None:
        wanted = self._claim.min_gpu_memory_bytes
        if wanted is None:
            return None
        found = None if self._gpu is None else self._gpu.memory_bytes
        if found is not None and found >= wanted:
            return None
        there = "no GPU" if self._gpu is None else f"a GPU with {found} bytes"
        return failed(
            ErrorCode.DEVICE_UNAVAILABLE,
            f"the spec asks for a GPU with resources.min_gpu_memory_bytes = {wanted}; found {there}: ask for less, or "
            "run the job where such a GPU is",
        )

    def _first_assignment(self) -> Assignment:
        claim = self._claim
        deadlines = claim.spec.get("deadlines") or {}
        dataset = claim.dataset
        model_path = self._fetch_input(claim.model)
        data_path = None if dataset is None else self._fetch_input(dataset)
        objective_path = None if claim.objective is None else self._fetch_input(claim.objective)
        resume = self._checkpoint_file()
        return Assignment(
            stage="learn",
            job_id=claim.job_id,
            epoch=claim.epoch,
            model_path=str(model_path),
            data_path=None if data_path is None else str(data_path),
            objective_path=None if objective_path is None else str(objective_path),
            data_format=None if dataset is None else dataset.format,
            # What was asked for, not what an earlier attempt resolved: the same rules resolve it to the same values,
            # and a number that was found must not be taken for one that was given.
            spec=with_module(claim.requested_spec, None if claim.objective is None else claim.objective.id),
            work_dir=str(self._work_dir),
            supervisor_pid=os.getpid(),
            resume_path=None if resume is None else str(resume),
            thread_count=self._slot.thread_count,
            device="cuda" if self._gpu is not None or claim.device == "cuda" else "cpu",
            memory_bytes_max=self._slot.memory_bytes_max,
            first_forward_seconds=deadlines.get("first_forward_seconds") or self._settings.first_forward_seconds,
            checkpoint_seconds=self._settings.checkpoint_seconds,
            checkpoint_spacing_seconds=self._settings.checkpoint_spacing_seconds,
            hashes={
                "model": claim.model.sha256,
                "spec": claim.spec_sha256,
                **({} if dataset is None else {"data": dataset.sha256}),
                **({} if claim.objective is None else {"objective": claim.objective.sha256}),
            },
        )

    def _fetch(self, file: InputFile | CheckpointRow, *, keep: bool = True) -> Path:
        def fetch() -> Path:
            return self._cache.fetch(file.blob_key, file.sha256, self._work_dir, keep=keep, between_blocks=self._go_on)

        return self._lease.hold_while(fetch, self._go_on)

    def _fetch_input(self, file: InputFile) -> Path:
        try:
            return self._fetch(file)
        except (BlobDamagedError, FileNotFoundError) as error:
            raise _InputGoneError(
                f"a file that the job reads is not in the blob store as it was uploaded ({error}): upload it "
                "again and submit the job anew, and look after the store"
            ) from error

    def _checkpoint_file(self) -> Path | None:
        """The newest checkpoint whose bytes are whole; a torn one is as if it were not there."""
        for row in self._claim.checkpoints:
            path = self._whole_file(row)
            if path is not None:
                return path
        return None

    def _whole_file(self, row: CheckpointRow) -> Path | None:
        try:
            path = self._fetch(row, keep=False)
            if self._lease.hold_while(partial(sha256_of, path), self._go_on) == row.sha256:
                return path
        except (BlobDamagedError, FileNotFoundError) as error:  # of all else it may be whole: the job waits for it
            self._blobs.exists(row.blob_key)  # and a store that went away says so here
            log.warning("checkpoint_unreadable", position=row.position, error=str(error))
            return None
        log.warning("checkpoint_torn", position=row.position)
        return None

    def _run_stage(self, assignment: Assignment) -> Ending:
        def environment(channel_fd: int) -> dict[str, str]:
            return child_environment(
                os.environ,
                work_dir=self._work_dir,
                thread_count=self._slot.thread_count,
                channel_fd=channel_fd,
                gpu=None if self._gpu is None else self._gpu.uuid,
            )

        self._lease.check()
        child = ChildProcess(self._child_command, self._with_silences(assignment), environment)
        self._lease.fence.guard(child)
        mark("child_started")
        log.info(
            "child_started", job_id=assignment.job_id, epoch=assignment.epoch, stage=assignment.stage, pid=child.pid
        )
        return StageWatch(child, self._lease, self._relay, self._limits(assignment), self._drain).run()

    def _with_silences(self, assignment: Assignment) -> Assignment:
        """Let the child outlive the fence's time a little, never the lease: the fence acts first where it can."""
        settings = self._settings
        more = (settings.lease_seconds - settings.self_fence_seconds) / 2
        return assignment.model_copy(
            update={
                "first_silence_seconds_max": max(self._lease.fence.seconds_left, 0.0) + more,
                "silence_seconds_max": settings.self_fence_seconds + more,
            }
        )

    def _limits(self, assignment: Assignment) -> StageLimits:
        return StageLimits(
            run_deadline=self._run_deadline,
            run_seconds=self._claim.run_seconds_limit,
            first_forward_seconds=assignment.first_forward_seconds,
            cancel_grace_seconds=self._settings.cancel_grace_seconds,
            memory_bytes_max=assignment.memory_bytes_max,
            watch_resident=assignment.device == "cuda",
        )

    def _remove_directory(self) -> None:
        shutil.rmtree(self._work_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._work_dir.parent.rmdir()  # unless another epoch's is in it
