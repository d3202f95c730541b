"""The words between a supervisor and its child: one JSON line each, over pipes, without torch on either side.

The supervisor writes one `Assignment` to the child's standard input and keeps it open, with an empty line for each
heartbeat that was confirmed; when it closes, or nothing comes for too long, the child exits. The child writes messages
to the file descriptor named in `RANKPRESS_CHANNEL_FD`. On `DRAIN_SIGNAL` a child that can be resumed writes a
checkpoint as soon as it is between two updates, and exits. What a child says is not trusted: a line that is too long or
does not parse ends the attempt, never the supervisor.
"""

import os
import signal
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from service.contract.errors import ErrorCode, Problem, ProblemError
from service.contract.events import EventKind, Progress
from service.contract.plan import LayerFacts, RankRow

CHANNEL_FD_VARIABLE = "RANKPRESS_CHANNEL_FD"
DRAIN_SIGNAL = signal.SIGUSR1  # not SIGTERM, which ends a canceled child at once
LINE_BYTES_MAX = 64 * 1024 * 1024  # rank rows of a network with thousands of layers fit many times over

# Where the stages leave what the supervisor stores, in the attempt's directory.
ARTIFACT_FILE = "artifact.pt"  # after "emit"
REPORT_FILE = "report.json"  # after "verify", whose result holds {"summary": ResultSummary, "artifact_sha256": …}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Assignment(_Message):
    """What one child is to do; every path is local to this machine."""

    stage: Literal["learn", "emit", "verify"]
    job_id: str
    epoch: int
    model_path: str
    data_path: str | None = None
    objective_path: str | None = None  # the module of a loss that the user brings
    data_format: Literal["npz", "safetensors", "webdataset"] | None = None
    spec: dict[str, Any]
    work_dir: str  # this attempt's own directory; the stages hand each other files in it
    supervisor_pid: int | None = None  # a child whose parent is another one exits; None for a stage run by hand
    resume_path: str | None = None  # a checkpoint file, for "learn"
    # Without a sign of the supervisor for so long the child exits: first from its start, then from the last sign.
    first_silence_seconds_max: float | None = None
    silence_seconds_max: float | None = None
    thread_count: int = 1
    device: str = "auto"  # "cpu", or "cuda" with CUDA_VISIBLE_DEVICES set to one GPU
    memory_bytes_max: int | None = None
    first_forward_seconds: float = 60.0
    checkpoint_seconds: float = 300.0  # longest time without a checkpoint
    checkpoint_spacing_seconds: float = 30.0  # least time between two at the ends of steps; 0: one at each of them
    hashes: dict[str, str] = {}  # SHA-256 of model, data, objective, spec


class PhaseMessage(_Message):
    """The child entered a phase."""

    type: Literal["phase"] = "phase"
    phase: str


class LayersMessage(_Message):
    """The layers of the reference, said once."""

    type: Literal["layers"] = "layers"
    layers: list[LayerFacts]


class RanksMessage(_Message):
    """Rank configurations that changed at a C step, or the final choice."""

    type: Literal["ranks"] = "ranks"
    rows: list[RankRow]


class ResolvedMessage(_Message):
    """The spec with further `auto` values replaced."""

    type: Literal["resolved"] = "resolved"
    spec: dict[str, Any]


class ProgressMessage(_Message):
    """How far the job is."""

    type: Literal["progress"] = "progress"
    progress: Progress


class EventMessage(_Message):
    """One line for the job's history."""

    type: Literal["event"] = "event"
    kind: EventKind
    data: dict[str, Any]


class CheckpointMessage(_Message):
    """A checkpoint file lies complete and synced at `path`; it counts once its row is written."""

    type: Literal["checkpoint"] = "checkpoint"
    path: str
    sha256: str
    bytes: int
    position: int  # its place in the run, in optimizer updates


class DoneMessage(_Message):
    """The stage ended well; `result` is what the stage hands to the supervisor."""

    type: Literal["done"] = "done"
    result: dict[str, Any] = {}


class FailedMessage(_Message):
    """The stage ended with a problem; `permanent` problems are not tried again."""

    type: Literal["failed"] = "failed"
    problem: Problem
    permanent: bool = True


Message = Annotated[
    PhaseMessage
    | LayersMessage
    | RanksMessage
    | ResolvedMessage
    | ProgressMessage
    | EventMessage
    | CheckpointMessage
    | DoneMessage
    | FailedMessage,
    Field(discriminator="type"),
]
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Message)


def parse_message(line: bytes) -> Message:
    """Read one line of a child.

    Raises
    ------
    ProblemError
        ``INTERNAL`` when the line is not a message.
    """
    try:
        return _MESSAGES.validate_json(line)
    except ValueError as error:
        shown = line[:200].decode("utf-8", "replace")
        raise ProblemError(ErrorCode.INTERNAL, f"the child wrote a line that is no message: {shown}") from error


class MessageWriter:
    """The child's end: writes messages line by line, each in one go."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    @classmethod
    def from_environment(cls) -> "MessageWriter":
        """Open the descriptor that the supervisor passed."""
        return cls(os.fdopen(int(os.environ[CHANNEL_FD_VARIABLE]), "wb", buffering=0))

    def send(self, message: BaseModel) -> None:
        """Write one message; blocks while the supervisor's pipe is full."""
        line = message.model_dump_json().encode() + b"\n"
        view = memoryview(line)
        while view:
            written = self._stream.write(view)
            view = view[written:]


def failure(error: ProblemError, *, permanent: bool = True) -> FailedMessage:
    """Say a problem over the channel."""
    return FailedMessage(problem=error.problem(), permanent=permanent)


__all__ = [
    "ARTIFACT_FILE",
    "CHANNEL_FD_VARIABLE",
    "DRAIN_SIGNAL",
    "LINE_BYTES_MAX",
    "REPORT_FILE",
    "Assignment",
    "CheckpointMessage",
    "DoneMessage",
    "EventMessage",
    "FailedMessage",
    "LayersMessage",
    "Message",
    "MessageWriter",
    "PhaseMessage",
    "ProgressMessage",
    "RanksMessage",
    "ResolvedMessage",
    "failure",
    "parse_message",
]
