"""An attempt's hold on its job: heartbeats, the fence that kills without them, and writes that count only with it."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from service.contract.events import Progress
from service.contract.states import Phase
from service.settings import Settings
from service.store import attempts
from service.store.attempts import Claim
from service.store.counters import FENCED_WRITES_REFUSED, count
from service.store.session import DATABASE_AWAY, Database
from worker.child import ChildProcess
from worker.endings import LeaseLostError

_RETRY_SECONDS = 0.5
_WRITE_SECONDS = 60.0  # a write that fails for longer, while heartbeats do not, will not come to pass
_LOOK_SECONDS = 0.5  # between looks at a cancel or a drain while bytes move
_BEAT_SECONDS_MIN = 0.2  # between heartbeats that a change of phase asks for

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Fence:
    """Kills the guarded child when no heartbeat was confirmed in time.

    It has its own thread: the supervising one may hang in the database at that very moment.
    """

    def __init__(self, seconds: float, confirmed_at: float) -> None:
        self._seconds = seconds
        self._deadline = confirmed_at + seconds
        self._child: ChildProcess | None = None
        self._changed = threading.Condition()
        self._closed = False
        self.passed = False
        threading.Thread(target=self._watch, name="lease-fence", daemon=True).start()

    def confirm(self, sent_at: float) -> None:
        """Move the deadline: a heartbeat that was sent at this monotonic time has been confirmed."""
        with self._changed:
            self._deadline = max(self._deadline, sent_at + self._seconds)
            self._changed.notify()
            if self._child is not None:
                self._child.show_life()

    @property
    def seconds_left(self) -> float:
        """How long the child may live without another confirmed heartbeat."""
        return self._deadline - time.monotonic()

    def guard(self, child: ChildProcess) -> None:
        """Kill this child from now on."""
        with self._changed:
            self._child = child
            if self.passed:
                child.signal_group(signal.SIGKILL)

    def close(self) -> None:
        """End the watch."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self.passed = True
                    if self._child is not None:
                        self._child.signal_group(signal.SIGKILL)
                    return
                self._changed.wait(left)


class Lease:
    """The epoch under which an attempt writes; used by the attempt's own thread."""

    def __init__(self, database: Database, settings: Settings, claim: Claim, claimed_at: float) -> None:
        self._database = database
        self._job_id = claim.job_id
        self._epoch = claim.epoch
        self._lease_seconds = settings.lease_seconds
        self.heartbeat_seconds = settings.heartbeat_seconds
        self.fence = Fence(settings.self_fence_seconds, claimed_at)
        self._last_beat = claimed_at
        self._beat_at = claimed_at + settings.heartbeat_seconds
        self._phase: str = Phase.STARTING
        self._fraction = claim.fraction  # a resumed attempt makes again what was seen before
        self._progress: Progress | None = None
        self.cancel_requested = False

    @property
    def phase(self) -> str:
        """What the job is doing."""
        return self._phase

    def enter(self, phase: str) -> None:
        """Show another phase; the next heartbeat comes at once."""
        if phase != self._phase:
            self._phase = phase
            self._beat_at = min(self._beat_at, self._last_beat + _BEAT_SECONDS_MIN)

    def advance(self, progress: Progress) -> None:
        """Show how far the job is; the fraction never falls within an attempt."""
        self._fraction = max(self._fraction, progress.fraction)
        self._progress = progress.model_copy(update={"fraction": self._fraction})

    def beat_if_due(self) -> None:
        """Send a heartbeat if it is time; a database that is away is asked again until the fence.

        Raises
        ------
        LeaseLostError
            When the job is another attempt's, or the fence has passed.
        """
        self.check()
        now = time.monotonic()
        if now < self._beat_at:
            return
        self._last_beat = now
        self._beat_at = now + self.heartbeat_seconds
        try:
            with self._database.write() as session:
                beat = attempts.heartbeat(
                    session,
                    self._job_id,
                    self._epoch,
                    lease_seconds=self._lease_seconds,
                    phase=self._phase,
                    progress=self._progress,
                )
        except DATABASE_AWAY as error:
            log.warning("heartbeat_failed", error=str(error))
            self._beat_at = time.monotonic() + min(_RETRY_SECONDS, self.heartbeat_seconds)
            return
        self.check()
        if beat is None:
            self._count_refused()
            raise LeaseLostError(f"{self._job_id}: epoch {self._epoch} is not the live one any more")
        self.fence.confirm(now)
        self.cancel_requested = beat.cancel_requested

    def check(self) -> None:
        """Refuse to go on once the fence has passed, whatever the database says after that."""
        if self.fence.passed:
            raise LeaseLostError(f"{self._job_id}: no heartbeat of epoch {self._epoch} was confirmed in time")

    def write(self, operation: Callable[[Session], T | None]) -> T:
        """Run a fenced write in its own transaction, again and again while the database is away.

        The operation answers None or False when the attempt is not the live one.

        Raises
        ------
        LeaseLostError
            When it answered so, or the fence has passed.
        """
        give_up_at = time.monotonic() + _WRITE_SECONDS
        while True:
            self.check()
            try:
                with self._database.write() as session:
                    answer = operation(session)
            except DATABASE_AWAY as error:
                if time.monotonic() > give_up_at:
                    raise
                log.warning("write_failed", error=str(error))
                time.sleep(min(_RETRY_SECONDS, self.heartbeat_seconds))
                self.beat_if_due()
                continue
            if answer is None or answer is False:
                self._count_refused()
                raise LeaseLostError(f"{self._job_id}: a write of epoch {self._epoch} was refused")
            return answer

    def let_go(self, operation: Callable[[Session], bool]) -> None:
        """Try one last fenced write after the lease was lost, without a second try; a refusal is counted."""
        try:
            with self._database.write() as session:
                freed = operation(session)
        except DATABASE_AWAY as error:
            log.warning("lease_not_released", error=str(error))
            return
        if not freed and self.fence.passed:  # where a write was refused before, that one is counted already
            self._count_refused()

    def _count_refused(self) -> None:
        log.warning("write_refused")
        try:
            with self._database.write() as session:
                count(session, FENCED_WRITES_REFUSED)
        except DATABASE_AWAY as error:
            log.warning("refusal_not_counted", error=str(error))

    def hold_while(self, work: Callable[[], T], go_on: Callable[[], None] | None = None) -> T:
        """Do something slow (move bytes) in another thread while the heartbeats go on in this one.

        What `go_on` raises at a heartbeat ends the wait, and so does a lost lease; what the thread still does then has
        no effect.
        """
        future = _aside(work)
        while not wait([future], timeout=min(self.heartbeat_seconds / 2, _LOOK_SECONDS)).done:
            self.beat_if_due()
            if go_on is not None:
                go_on()
        return future.result()


def _aside(work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="bytes", daemon=True).start()
    return future
