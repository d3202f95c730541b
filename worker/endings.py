"""How a stage, and with it an attempt, can end."""

import signal
from dataclasses import dataclass, field
from typing import Any

from service.contract.errors import ErrorCode, Problem, ProblemError
from worker.child import ChildProcess

# What a process writes as it dies of a refused allocation: python, the C++ library, torch's CPU allocator.
_MEMORY_MARKS = ("MemoryError", "std::bad_alloc", "can't allocate memory", "Cannot allocate memory")


@dataclass(frozen=True)
class Done:
    """The stage ended well."""

    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The stage ended with a problem; a permanent one fails the job."""

    problem: Problem
    permanent: bool = True


@dataclass(frozen=True)
class Crashed:
    """The child ended without a word, or with words that cannot be read."""

    detail: str


@dataclass(frozen=True)
class Canceled:
    """The user asked for the end."""


@dataclass(frozen=True)
class Drained:
    """The worker is asked to stop; the job goes on elsewhere."""


@dataclass(frozen=True)
class Deferred:
    """What the attempt needs of its surroundings is away; the job waits for it, and the try does not count."""

    detail: str


Ending = Done | Failed | Crashed | Canceled | Drained | Deferred


class StopAskedError(Exception):
    """The job is canceled, its worker stops, or its time is up; what this attempt was at is of no use any more."""


class LeaseLostError(Exception):
    """The job is not this attempt's any more: nothing is written from here on."""


def failed(code: ErrorCode, detail: str) -> Failed:
    """A permanent failure with this problem."""
    return Failed(ProblemError(code, detail).problem())


def ending_without_message(child: ChildProcess, exit_code: int, memory_bytes_max: int | None) -> Ending:
    """Read the end of a child that said neither `done` nor `failed`."""
    last = child.last_error_line
    if memory_bytes_max is not None and any(mark in child.stderr_tail[-4096:] for mark in _MEMORY_MARKS):
        return out_of_memory(f"the process was refused memory ({last})", memory_bytes_max)
    how = f"killed by {_signal_name(-exit_code)}" if exit_code < 0 else f"exit code {exit_code}"
    return Crashed(f"the job's process ended without a result ({how})" + (f": {last}" if last else ""))


def out_of_memory(what: str, memory_bytes_max: int) -> Failed:
    """A permanent failure that says how much memory there was."""
    detail = (
        f"{what}; a job may use {memory_bytes_max} bytes ({memory_bytes_max / 2**30:.2f} GiB) here: "
        "use a smaller batch_size, or raise RANKPRESS_CHILD_MEMORY_BYTES"
    )
    return failed(ErrorCode.OUT_OF_MEMORY, detail)


def past_run_deadline(run_seconds: float) -> Failed:
    """A permanent failure of a job that used up its time."""
    return failed(
        ErrorCode.TIMEOUT,
        f"the job ran for its whole {run_seconds:g} seconds and did not finish: "
        "raise deadlines.run_seconds, or ask for fewer steps or epochs",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
