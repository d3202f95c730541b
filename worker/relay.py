"""What a child says becomes rows: in order, in batches, under the attempt's lease."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.blobs.errors import BlobStoreAwayError
from service.blobs.store import BlobStore, checkpoint_key
from service.contract.errors import ProblemError
from service.contract.events import EventKind, Progress
from service.contract.marks import mark
from service.contract.plan import LayerFacts, RankRow
from service.contract.states import Phase
from service.store import attempts
from service.store.attempts import Claim
from service.store.checkpoints import insert_checkpoint
from service.store.counters import PHASE_COUNT, PHASE_SECONDS, count
from service.store.events import append_events, repeat_key
from service.store.layers import insert_layers
from service.store.ranks import insert_rank_rows
from worker.channel import (
    CheckpointMessage,
    EventMessage,
    LayersMessage,
    Message,
    PhaseMessage,
    ProgressMessage,
    RanksMessage,
    ResolvedMessage,
)
from worker.child import ChannelBrokenError, regular_file
from worker.endings import StopAskedError
from worker.lease import Lease

FLUSH_SECONDS = 0.5
BATCH = 500
PHASE_LENGTH_MAX = 40
EVENTS_MAX = 100_000  # of one attempt; a child that says more is told once, and then not heard
EVENT_LENGTH_MAX = 64 * 1024
_PHASES = frozenset(Phase)
_LINES_OF_HISTORY = frozenset({EventKind.STEP, EventKind.METRIC, EventKind.LOG, EventKind.WARNING})

log = structlog.get_logger(__name__)


class Relay:
    """Collects an attempt's messages and writes them; a row that the lease refuses ends the attempt."""

    def __init__(self, lease: Lease, blobs: BlobStore, claim: Claim, work_dir: Path, go_on: Callable[[], None]) -> None:
        self._lease = lease
        self._blobs = blobs
        self._job_id = claim.job_id
        self._epoch = claim.epoch
        self._told = set(claim.told)
        self._work_dir = work_dir
        self._go_on = go_on
        self._events: list[tuple[EventKind, Mapping[str, Any]]] = []
        self._layers: list[LayerFacts] | None = None
        self._ranks: list[RankRow] = []
        self._spec: dict[str, Any] | None = None
        self._events_taken = 0
        self._flush_at = 0.0
        self._phases: list[tuple[str, float]] = []
        self._phase_since = time.monotonic()

    def take(self, message: Message) -> None:
        """Take one message; a checkpoint, and what came before it, is written when this returns."""
        if isinstance(message, PhaseMessage):
            if len(message.phase) > PHASE_LENGTH_MAX or not message.phase.isprintable():
                raise ChannelBrokenError(f"the child named a phase that is not a word of {PHASE_LENGTH_MAX} characters")
            self.enter(message.phase)
        elif isinstance(message, ProgressMessage):
            self._lease.advance(_finite(message.progress))
        elif isinstance(message, EventMessage):
            self._take_event(message)
        elif isinstance(message, LayersMessage):
            self._layers = message.layers
        elif isinstance(message, RanksMessage):
            self._ranks.extend(message.rows)
        elif isinstance(message, ResolvedMessage):
            self._spec = message.spec
        elif isinstance(message, CheckpointMessage):
            self._store_checkpoint(message)
        if len(self._events) + len(self._ranks) >= BATCH:
            self.flush()

    def enter(self, phase: str) -> None:
        """Show a phase and note it in the job's history."""
        if phase != self._lease.phase:
            self._book_phase()
            self._lease.enter(phase)
            self._events.append((EventKind.PHASE, {"phase": phase}))

    def _book_phase(self) -> None:
        """Keep how long the phase that ends has lasted; a child may invent phases, which are not counted."""
        now = time.monotonic()
        if self._lease.phase in _PHASES:
            self._phases.append((self._lease.phase, now - self._phase_since))
        self._phase_since = now

    def flush_if_due(self) -> None:
        """Write what has waited for a while."""
        if self._pending and time.monotonic() >= self._flush_at:
            self.flush()

    def flush(self) -> None:
        """Write everything that was taken.

        Raises
        ------
        LeaseLostError
            When the attempt is not the live one; nothing was written.
        ChannelBrokenError
            When the database cannot hold what the child said.
        """
        self._flush_at = time.monotonic() + FLUSH_SECONDS
        if not self._pending:
            return
        try:
            self._lease.write(self._write)
        except SQLAlchemyError as error:
            raise ChannelBrokenError(f"the child's words cannot be stored: {type(error).__name__}") from error
        finally:
            self._events, self._layers, self._ranks, self._spec, self._phases = [], None, [], None, []

    @property
    def _pending(self) -> bool:
        return bool(self._events or self._layers or self._ranks or self._spec)

    def _write(self, session: Session) -> bool:
        job_id, epoch = self._job_id, self._epoch
        return (
            (self._layers is None or insert_layers(session, job_id, epoch, self._layers))
            and (not self._ranks or insert_rank_rows(session, job_id, epoch, self._ranks))
            and (self._spec is None or attempts.set_resolved_spec(session, job_id, epoch, self._spec))
            and append_events(session, job_id, epoch, self._events)
            and self._count_phases(session)
        )

    def _count_phases(self, session: Session) -> bool:
        for phase, seconds in self._phases:
            count(session, PHASE_SECONDS, phase, seconds)
            count(session, PHASE_COUNT, phase)
        return True

    def _take_event(self, message: EventMessage) -> None:
        if message.kind not in _LINES_OF_HISTORY:
            raise ChannelBrokenError(f"the child wrote an event of kind {message.kind}, which is the supervisor's")
        if len(repr(message.data)) > EVENT_LENGTH_MAX:
            raise ChannelBrokenError(f"the child wrote an event of more than {EVENT_LENGTH_MAX} characters")
        key = repeat_key(message.kind, message.data)
        if key is not None and key in self._told:
            return  # a resumed attempt makes steps again that the history has
        if key is not None:
            self._told.add(key)
        self._events_taken += 1
        if self._events_taken == EVENTS_MAX:
            said = f"the job wrote {EVENTS_MAX} events; no more are kept of this attempt"
            self._events.append((EventKind.WARNING, {"code": "EVENTS_DROPPED", "message": said}))
        elif self._events_taken < EVENTS_MAX:
            self._events.append((message.kind, message.data))

    def _store_checkpoint(self, message: CheckpointMessage) -> None:
        self.flush()
        path = regular_file(Path(message.path), self._work_dir)
        key = checkpoint_key(self._job_id, self._epoch, message.position)
        try:
            self._lease.hold_while(partial(self._blobs.put_file, path, key, move=True), self._go_on)
        except StopAskedError:
            return  # the stage's watch sees to the rest
        except (BlobStoreAwayError, ProblemError) as error:
            self._do_without(path, error)
            return
        dropped = self._lease.write(
            lambda session: insert_checkpoint(
                session,
                self._job_id,
                self._epoch,
                position=message.position,
                blob_key=key,
                sha256=message.sha256,
                bytes=message.bytes,
            )
        )
        mark("checkpoint_row")
        self._forget(dropped)

    def _do_without(self, path: Path, error: Exception) -> None:
        """Go on although a checkpoint could not be stored: the next one may be, and until then nothing is lost."""
        log.warning("checkpoint_not_stored", error=str(error))
        path.unlink(missing_ok=True)
        message = f"a checkpoint could not be stored, the run goes on without it: {error}"
        self._events.append((EventKind.WARNING, {"code": "CHECKPOINT_NOT_STORED", "message": message}))

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            try:
                self._blobs.delete(key)
            except Exception:  # an orphan blob is swept later; the attempt goes on
                log.warning("blob_not_deleted", key=key, exc_info=True)


def _finite(progress: Progress) -> Progress:
    """The progress without what JSON has no word for: a loss that diverges is shown as none."""
    numbers = {"eta_seconds": progress.eta_seconds, "loss": progress.loss, "cost": progress.cost}
    unknown = {name: None for name, number in numbers.items() if number is not None and not math.isfinite(number)}
    return progress.model_copy(update=unknown)
