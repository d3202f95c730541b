"""States of a job, outcomes of an attempt, and the phases a running job goes through."""

from enum import StrEnum


class JobState(StrEnum):
    """`queued → running → succeeded | failed | canceled`, and `running → queued` on retry and drain."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def terminal(self) -> bool:
        """Whether the state never changes again."""
        return self in TERMINAL_STATES


TERMINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED})


class AttemptOutcome(StrEnum):
    """How one attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # permanent: the job failed with it
    CANCELED = "canceled"
    CRASHED = "crashed"  # the child died; the job went back to the queue or failed as WORKER_LOST
    DEFERRED = "deferred"  # a store or a disk that it needs was away; not counted
    DRAINED = "drained"  # the worker was asked to stop; not counted
    LOST = "lost"  # the lease ran out


class Phase(StrEnum):
    """What a running job is doing; free to grow, so clients must accept unknown values."""

    STARTING = "starting"
    INSPECTING = "inspecting"  # load, check operators, read data, census, reference scores
    LEARNING = "learning"  # L and C steps
    FINE_TUNING = "fine_tuning"  # the factored network is trained
    EMITTING = "emitting"  # the artifact is made in a fresh process
    VERIFYING = "verifying"  # the artifact is loaded by stock torch in a fresh process
    STORING = "storing"
    DONE = "done"
