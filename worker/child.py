"""One stage's process as its supervisor sees it: started, read, signalled and reaped."""

import contextlib
import os
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil

from worker.channel import LINE_BYTES_MAX, Assignment

STDERR_TAIL_BYTES = 64 * 1024
_READ_BYTES = 256 * 1024


class ChannelBrokenError(Exception):
    """The child wrote what is no message; the attempt ends."""


class ChildProcess:
    """A child in its own session, with a pipe for its messages; it is started and reaped by one thread.

    The thread that makes this object must stay until the child has ended: the child's death signal follows it.
    """

    def __init__(
        self, command: Sequence[str], assignment: Assignment, environment: Callable[[int], dict[str, str]]
    ) -> None:
        self._channel, channel_end = os.pipe()
        self._errors, errors_end = os.pipe()
        try:
            self._process = subprocess.Popen(  # the command is the operator's
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors_end,
                pass_fds=(channel_end,),
                env=environment(channel_end),
                cwd=assignment.work_dir,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._channel)
            os.close(self._errors)
            raise
        finally:
            os.close(channel_end)
            os.close(errors_end)
        self._to_say = memoryview(assignment.model_dump_json().encode() + b"\n")
        self._line = bytearray()
        self._tail = bytearray()
        self._reaped = False
        self._reaping = threading.Lock()  # a signal must not reach a process id that was handed on
        self._selector = selectors.DefaultSelector()
        for fd in (self._channel, self._errors, self._stdin.fileno()):
            os.set_blocking(fd, False)
        self._selector.register(self._channel, selectors.EVENT_READ, self._read_channel)
        self._selector.register(self._errors, selectors.EVENT_READ, self._read_errors)
        self._selector.register(self._stdin, selectors.EVENT_WRITE, self._say)
        self._channel_open = True

    @property
    def pid(self) -> int:
        """The process id, which is the id of its process group too."""
        return self._process.pid

    @property
    def _stdin(self) -> IO[bytes]:
        if self._process.stdin is None:  # cannot be: it was asked for as a pipe
            raise ChannelBrokenError("the child has no standard input")
        return self._process.stdin

    def read_lines(self, timeout_seconds: float) -> list[bytes]:
        """Wait for the child at most this long, and return the lines that are complete.

        Raises
        ------
        ChannelBrokenError
            When a line is longer than `LINE_BYTES_MAX`.
        """
        lines: list[bytes] = []
        for key, _ in self._selector.select(timeout_seconds):
            lines.extend(key.data())
        return lines

    def exited(self) -> bool:
        """Whether the process has ended; it stays a zombie, and so its group's id stays its own, until `close`."""
        if self._reaped:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def drained(self) -> bool:
        """Whether the last message was read."""
        return not self._channel_open

    def signal_group(self, signal_number: int) -> None:
        """Send a signal to every process of the child's group; harmless once it has ended, from any thread."""
        with self._reaping:
            if not self._reaped:
                os.killpg(self.pid, signal_number)

    def show_life(self) -> None:
        """Let the child know that its supervisor holds the lease; for the thread that reads its messages."""
        with self._reaping:
            if not self._reaped and not self._to_say:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):  # it is stopped, or has ended
                    os.write(self._stdin.fileno(), b"\n")

    def resident_bytes(self) -> int:
        """Sum the resident sizes of the child and its descendants."""
        total = 0
        try:
            child = psutil.Process(self.pid)
            for process in (child, *child.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.Error:
            pass  # it ended meanwhile; what was summed is the figure
        return total

    def close(self) -> int:
        """Kill what is left of the group, reap the child, and return its exit code (negative: the signal)."""
        with self._reaping:
            if not self._reaped:
                os.killpg(self.pid, signal.SIGKILL)
                code = self._process.wait()
                self._reaped = True
                self._keep_tail(_read(self._errors))
                self._selector.close()
                os.close(self._channel)
                os.close(self._errors)
                self._stdin.close()
                return code
        return self._process.returncode or 0

    @property
    def stderr_tail(self) -> str:
        """The last that the child wrote to its standard error."""
        return self._tail.decode("utf-8", "replace")

    @property
    def last_error_line(self) -> str:
        """The last line of standard error that says something."""
        lines = [line.strip() for line in self.stderr_tail.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def _say(self) -> list[bytes]:
        try:
            written = os.write(self._stdin.fileno(), self._to_say)
        except BrokenPipeError:
            written = len(self._to_say)  # it ended before it listened; its exit says the rest
        self._to_say = self._to_say[written:]
        if not self._to_say:
            self._selector.unregister(self._stdin)  # it stays open: its end is the child's order to exit
        return []

    def _read_channel(self) -> list[bytes]:
        chunk = _read(self._channel)
        if chunk is None:
            return []
        if not chunk:
            self._selector.unregister(self._channel)
            self._channel_open = False
            return []
        if b"\n" not in chunk:
            self._line += chunk
            self._refuse_long(self._line)
            return []
        first, *rest = chunk.split(b"\n")
        lines = [bytes(self._line + first), *rest[:-1]]
        self._line = bytearray(rest[-1])
        self._refuse_long(lines[0])
        return lines

    @staticmethod
    def _refuse_long(line: bytes | bytearray) -> None:
        if len(line) > LINE_BYTES_MAX:
            raise ChannelBrokenError(f"the child wrote a line of more than {LINE_BYTES_MAX} bytes")

    def _read_errors(self) -> list[bytes]:
        chunk = _read(self._errors)
        if chunk == b"":
            self._selector.unregister(self._errors)
        self._keep_tail(chunk)
        return []

    def _keep_tail(self, chunk: bytes | None) -> None:
        self._tail += chunk or b""
        del self._tail[:-STDERR_TAIL_BYTES]


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return None


def regular_file(path: Path, directory: Path) -> Path:
    """Return the path if it is a regular file of this directory; what a child names is not trusted."""
    try:
        inside = path.parent.resolve(strict=True).is_relative_to(directory.resolve(strict=True))
        if inside and path.is_file() and not path.is_symlink():
            return path
    except OSError:
        pass
    raise ChannelBrokenError(f"the child named a file that is not a regular file of its directory: {path.name}")
