"""The child process: one stage of one attempt, and the only place where PyTorch meets an uploaded file.

Started as ``python -m worker.runner`` with an `Assignment` on standard input; it answers over the channel alone.
"""

import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind, Progress
from service.contract.marks import mark
from service.contract.plan import LayerFacts, RankRow
from service.contract.report import PhaseUse
from service.contract.states import Phase
from worker.channel import (
    DRAIN_SIGNAL,
    Assignment,
    DoneMessage,
    EventMessage,
    FailedMessage,
    LayersMessage,
    MessageWriter,
    PhaseMessage,
    ProgressMessage,
    RanksMessage,
    ResolvedMessage,
    failure,
)
from worker.sandbox import apply_limits

EXIT_PROBLEM = 65  # EX_DATAERR: the problem was said over the channel
NO_ROOM = os.strerror(errno.ENOSPC)
EXIT_INTERNAL = 70  # EX_SOFTWARE
PHASES_FILE = "phases.json"
PROGRESS_SECONDS = 0.5  # progress is told at most this often
WRITES_SHARE_MAX = 1 / 50  # of the time may go into checkpoints at the ends of steps and epochs


def main() -> int:
    """Run the stage that standard input assigns."""
    assignment = Assignment.model_validate_json(sys.stdin.buffer.readline())
    apply_limits(assignment)
    writer = MessageWriter.from_environment()
    try:
        writer.send(DoneMessage(result=run_stage(assignment, writer)))
    except ProblemError as error:
        told = _bounded(error.detail, assignment) if error.code == ErrorCode.OUT_OF_MEMORY else error
        writer.send(failure(told, permanent=error.code != ErrorCode.INTERNAL))
        return EXIT_PROBLEM
    except Exception as error:  # noqa: BLE001  whatever it is, the supervisor must hear of it
        traceback.print_exc()
        writer.send(_unexpected(error, assignment))
        return EXIT_INTERNAL
    return 0


def run_stage(assignment: Assignment, writer: MessageWriter) -> dict[str, Any]:
    """Dispatch to the engine; PyTorch is imported under the limits that hold by now."""
    from worker.engine.device import prepare_process  # noqa: PLC0415
    from worker.engine.uncompiled import leave_compiler_out  # noqa: PLC0415

    prepare_process(assignment.thread_count, repeatable=assignment.stage != "verify")
    leave_compiler_out()
    relay = RelayingObserver(assignment, writer)
    try:
        return {"learn": _learn, "emit": _emit, "verify": _verify}[assignment.stage](assignment, relay)
    finally:
        relay.close()


class RelayingObserver:
    """Tells the supervisor what the engine says, and keeps account of time and memory by phase."""

    def __init__(self, assignment: Assignment, writer: MessageWriter) -> None:
        self._assignment = assignment
        self._writer = writer
        self._work_dir = Path(assignment.work_dir)
        self._phases = _read_phases(self._work_dir)
        self._phase: str | None = None
        self._entered = time.monotonic()
        self._told = 0.0
        self._saved = time.monotonic()
        self._write_seconds = 0.0
        self._position: int | None = None
        self._leaving = False

    def leave(self) -> None:
        """Let the next checkpoint, which is due at once, be the last thing that this process does."""
        self._leaving = True

    def phase(self, phase: str) -> None:
        """Enter a phase."""
        self.close()
        self._phase, self._entered = phase, time.monotonic()
        self._writer.send(PhaseMessage(phase=phase))

    def close(self) -> None:
        """Book the phase that ends."""
        if self._phase is not None:
            self._phases.append(_use(self._phase, time.monotonic() - self._entered))
            self._phase = None
            text = json.dumps([use.model_dump(mode="json") for use in self._phases])
            (self._work_dir / PHASES_FILE).write_text(text, encoding="utf-8")

    def uses(self) -> list[PhaseUse]:
        """Phases of this attempt so far, the present one included."""
        now = [] if self._phase is None else [_use(self._phase, time.monotonic() - self._entered)]
        return [*self._phases, *now]

    def layers(self, facts: Sequence[LayerFacts]) -> None:
        """Tell the layers."""
        self._writer.send(LayersMessage(layers=list(facts)))

    def ranks(self, rows: Sequence[RankRow]) -> None:
        """Tell rank configurations."""
        if rows:
            self._writer.send(RanksMessage(rows=list(rows)))

    def resolved(self, spec: Mapping[str, Any]) -> None:
        """Tell the resolved spec."""
        self._writer.send(ResolvedMessage(spec=dict(spec)))

    def progress(self, progress: Progress) -> None:
        """Tell progress, but not more often than anyone looks."""
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or progress.fraction >= 1:
            self._told = now
            self._writer.send(ProgressMessage(progress=progress))

    def event(self, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Add to the job's history."""
        self._writer.send(EventMessage(kind=kind, data=dict(data)))

    def pulse(self, kind: str, done: int, total: int) -> bool:
        """Say whether a checkpoint is due in the middle of a step; called after every update, so it must be quick."""
        if kind == "c_step":
            mark("mid_c_step")
        elif kind == "l_step" and done < total:
            mark("mid_l_step")
        return self._leaving or time.monotonic() - self._saved >= self._assignment.checkpoint_seconds

    def checkpoint(self, save: Callable[[], Any], position: int, *, must: bool = False) -> None:
        """Write a checkpoint if one is due here; leave after it where the supervisor has asked."""
        if position != self._position and (must or self._leaving or self._due_between_steps()):
            self._write(save, position)
        if self._leaving:
            raise SystemExit(0)

    def _due_between_steps(self) -> bool:
        spacing = self._assignment.checkpoint_spacing_seconds
        if spacing > 0:
            spacing = max(spacing, self._write_seconds / WRITES_SHARE_MAX)
        return time.monotonic() - self._saved >= min(spacing, self._assignment.checkpoint_seconds)

    def _write(self, save: Callable[[], Any], position: int) -> None:
        from worker.checkpoint import write_checkpoint  # noqa: PLC0415

        began = time.monotonic()
        self._writer.send(write_checkpoint(save(), self._work_dir / "checkpoints", position))
        self._position, self._saved = position, time.monotonic()
        self._write_seconds = self._saved - began


def _learn(assignment: Assignment, relay: RelayingObserver) -> dict[str, Any]:
    from service.contract.spec import parse_spec  # noqa: PLC0415
    from worker.engine.learn import learn  # noqa: PLC0415

    signal.signal(DRAIN_SIGNAL, lambda *_: relay.leave())
    return learn(_sources(assignment), parse_spec(assignment.spec), relay, _saved(assignment, relay))


def _saved(assignment: Assignment, relay: RelayingObserver) -> Any:
    """Read what an earlier attempt saved; what another release saved is of no use, and the job begins anew."""
    from worker.checkpoint import OtherFormatError, read_checkpoint  # noqa: PLC0415

    if assignment.resume_path is None:
        return None
    try:
        return read_checkpoint(Path(assignment.resume_path))
    except OtherFormatError as error:
        relay.event(EventKind.WARNING, {"code": "CHECKPOINT_NOT_READ", "message": f"{error}; the job begins anew"})
        return None


def _emit(assignment: Assignment, relay: RelayingObserver) -> dict[str, Any]:
    from worker.engine.emission import emit  # noqa: PLC0415

    relay.phase(Phase.EMITTING)
    return emit(Path(assignment.model_path), Path(assignment.work_dir))


def _verify(assignment: Assignment, relay: RelayingObserver) -> dict[str, Any]:
    from service.contract.spec import parse_spec  # noqa: PLC0415
    from worker.engine.verification import summarise, verify  # noqa: PLC0415

    relay.phase(Phase.VERIFYING)
    spec = parse_spec(assignment.spec)
    report = verify(_sources(assignment), spec, assignment.hashes, relay.uses, assignment.job_id)
    return {"summary": summarise(report).model_dump(mode="json"), "artifact_sha256": report.hashes["artifact"]}


def _sources(assignment: Assignment) -> Any:
    from worker.engine.learn import Sources  # noqa: PLC0415

    data = None if assignment.data_path is None else Path(assignment.data_path)
    objective = None if assignment.objective_path is None else Path(assignment.objective_path)
    return Sources(Path(assignment.model_path), data, assignment.data_format, Path(assignment.work_dir), objective)


def _unexpected(error: BaseException, assignment: Assignment) -> FailedMessage:
    """Say an exception that no code foresaw; want of memory is the job's own doing and final."""
    from worker.engine.forward import out_of_memory  # noqa: PLC0415

    if NO_ROOM in str(error):  # of whatever class: Python, torch and safetensors each have their own
        detail = f"there is no room left on the worker's disk: {str(error)[:300]}"
        return failure(ProblemError(ErrorCode.STORAGE_FULL, detail), permanent=False)
    if out_of_memory(error):
        return failure(_bounded(str(error)[:300], assignment))
    detail = f"the engine met an error of its own: {type(error).__name__}: {str(error)[:500]}"
    return failure(ProblemError(ErrorCode.INTERNAL, detail), permanent=False)


def _bounded(what: str, assignment: Assignment) -> ProblemError:
    """Say a want of memory with the limit, the peak, and what to change."""
    limit = assignment.memory_bytes_max
    bound = f" within its limit of {limit} bytes" if limit is not None else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ProblemError(
        ErrorCode.OUT_OF_MEMORY,
        f"the job ran out of memory{bound}; its peak was {peak} bytes resident: {what.rstrip('.')}. Use a smaller "
        "batch_size or model, or raise RANKPRESS_CHILD_MEMORY_BYTES",
    )


def _use(phase: str, seconds: float) -> PhaseUse:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return PhaseUse(phase=phase, seconds=seconds, peak_memory_bytes=peak)


def _read_phases(work_dir: Path) -> list[PhaseUse]:
    path = work_dir / PHASES_FILE
    if not path.exists():
        return []
    return [PhaseUse.model_validate(use) for use in json.loads(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    sys.exit(main())
