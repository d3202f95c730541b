"""One stage of an attempt: a child is watched from its start to its end, in the thread that started it."""

import signal
import threading
import time
from dataclasses import dataclass

from service.contract.errors import ErrorCode, ProblemError
from service.contract.states import Phase
from worker.channel import (
    DRAIN_SIGNAL,
    DoneMessage,
    FailedMessage,
    LayersMessage,
    PhaseMessage,
    ProgressMessage,
    parse_message,
)
from worker.child import ChannelBrokenError, ChildProcess
from worker.endings import (
    Canceled,
    Crashed,
    Deferred,
    Done,
    Drained,
    Ending,
    Failed,
    ending_without_message,
    failed,
    out_of_memory,
    past_run_deadline,
)
from worker.lease import Lease
from worker.relay import Relay

TICK_SECONDS = 0.1  # how long a drain, a deadline or an exit can go unnoticed
EXIT_SECONDS = 2.0  # what a child that has said its last word may take to leave


class Drain:
    """Whether this worker is asked to stop, and how long its children may take to write a checkpoint."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._over_at = 0.0
        self.grace_seconds = 0.0

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def ask(self, grace_seconds: float) -> None:
        """Ask; the running attempts see it within a tick."""
        self.grace_seconds = grace_seconds
        self._over_at = time.monotonic() + grace_seconds
        self._asked.set()

    @property
    def over(self) -> bool:
        """Whether the time for saving things is up."""
        return bool(self) and time.monotonic() >= self._over_at


@dataclass(frozen=True)
class StageLimits:
    """What a stage may use; times on the monotonic clock."""

    run_deadline: float
    run_seconds: float
    first_forward_seconds: float
    cancel_grace_seconds: float
    memory_bytes_max: int | None
    watch_resident: bool  # where the address space is not limited


def _failure(message: FailedMessage) -> Ending:
    if message.problem.code == ErrorCode.STORAGE_FULL:
        return Deferred(message.problem.detail)
    return Failed(message.problem, message.permanent)


class StageWatch:
    """Reads a child's messages, keeps its lease, holds its limits, and says how it ended."""

    def __init__(self, child: ChildProcess, lease: Lease, relay: Relay, limits: StageLimits, drain: Drain) -> None:
        self._child = child
        self._lease = lease
        self._relay = relay
        self._limits = limits
        self._drain = drain
        self._said: Ending | None = None  # the child's own last word
        self._stopping: Ending | None = None  # what the supervisor decided
        self._kill_at: float | None = None
        self._gone_at: float | None = None
        self._forward_since: float | None = None
        self._resident_next = 0.0

    def run(self) -> Ending:
        """Watch until the child has ended and everything it said is written.

        Raises
        ------
        LeaseLostError
            When the job is not this attempt's any more; the child is dead then.
        """
        try:
            while not self._over():
                self._receive()
                self._lease.beat_if_due()
                self._hold_limits(time.monotonic())
            exit_code = self._child.close()
            ending = self._ending(exit_code)
            try:
                self._relay.flush()
            except ChannelBrokenError as error:
                return Crashed(str(error))
            return ending
        finally:
            self._child.close()

    def _over(self) -> bool:
        now = time.monotonic()
        if self._child.exited():
            if self._gone_at is None:
                self._gone_at = now
                self._child.signal_group(signal.SIGKILL)  # what it left behind would hold the channel open
            return self._child.drained() or now > self._gone_at + EXIT_SECONDS
        return self._kill_at is not None and now >= self._kill_at

    def _ending(self, exit_code: int) -> Ending:
        if self._stopping is not None:
            return self._stopping
        if self._said is not None:
            return self._said
        return ending_without_message(self._child, exit_code, self._limits.memory_bytes_max)

    def _receive(self) -> None:
        try:
            for line in self._child.read_lines(TICK_SECONDS):
                self._take(line)
            self._relay.flush_if_due()
        except (ChannelBrokenError, ProblemError) as error:
            self._stop(Crashed(str(error)), grace_seconds=0.0)

    def _take(self, line: bytes) -> None:
        if self._said is not None:
            return  # `done` and `failed` are last words
        message = parse_message(line)
        if isinstance(message, PhaseMessage):
            self._forward_since = time.monotonic() if message.phase == Phase.INSPECTING else None
        elif isinstance(message, LayersMessage | ProgressMessage):
            self._forward_since = None  # the model has answered
        if isinstance(message, DoneMessage):
            self._leave(Done(message.result))
        elif isinstance(message, FailedMessage):
            self._leave(_failure(message))
        else:
            self._relay.take(message)

    def _leave(self, word: Ending) -> None:
        self._said = word
        if self._kill_at is None:
            self._kill_at = time.monotonic() + EXIT_SECONDS

    def _hold_limits(self, now: float) -> None:
        if self._stopping is not None:
            return
        if self._lease.cancel_requested:
            self._stop(Canceled(), self._limits.cancel_grace_seconds)
        elif self._said is not None or self._gone_at is not None:
            return
        elif self._drain:
            self._stop(Drained(), self._drain.grace_seconds, DRAIN_SIGNAL)
        elif now >= self._limits.run_deadline:
            self._stop(past_run_deadline(self._limits.run_seconds), grace_seconds=0.0)
        elif self._forward_since is not None and now >= self._forward_since + self._limits.first_forward_seconds:
            self._stop(self._past_first_forward(), grace_seconds=0.0)
        elif self._limits.watch_resident and now >= self._resident_next:
            self._resident_next = now + self._lease.heartbeat_seconds
            self._hold_memory()

    def _hold_memory(self) -> None:
        limit = self._limits.memory_bytes_max
        resident = self._child.resident_bytes() if limit is not None else 0
        if limit is not None and resident > limit:
            self._stop(out_of_memory(f"the job's processes used {resident} bytes", limit), grace_seconds=0.0)

    def _stop(self, ending: Ending, grace_seconds: float, asking: signal.Signals = signal.SIGTERM) -> None:
        """End the child: a signal that asks its group, and SIGKILL after the grace."""
        self._stopping = ending
        self._kill_at = time.monotonic() + grace_seconds
        self._child.signal_group(asking if grace_seconds > 0 else signal.SIGKILL)

    def _past_first_forward(self) -> Failed:
        seconds = self._limits.first_forward_seconds
        return failed(
            ErrorCode.TIMEOUT,
            f"the model's forward did not return in {seconds:g} seconds, or the loss module that the job brings did "
            "not: look for a loop that does not end, or raise deadlines.first_forward_seconds",
        )
