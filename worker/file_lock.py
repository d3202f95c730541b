"""A lock between processes and threads of one machine that spares work, and is not waited for in vain."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

_POLL_SECONDS = 0.05

log = structlog.get_logger(__name__)


def nothing() -> None:
    """What is done while waiting or working if nobody asks for anything."""


@contextlib.contextmanager
def held(
    path: Path, *, patience_seconds: float, while_waiting: Callable[[], None] = nothing
) -> Iterator[Callable[[], None]]:
    """Hold the lock of a path; yields what the holder calls now and then to show that it is at work.

    A holder that shows nothing for `patience_seconds` may be stopped, and is not waited for any longer: then two are at
    work at once. So nothing that must be true may hang on this lock. What `while_waiting` raises ends the wait.
    """
    descriptor = _acquire(path, patience_seconds, while_waiting)
    if descriptor is None:
        log.warning("lock_not_waited_for", path=str(path), patience_seconds=patience_seconds)
        yield nothing
        return
    try:
        yield lambda: os.utime(descriptor)
    finally:
        path.unlink(missing_ok=True)  # before it is free: whoever gets it then sees that it is not the path's any more
        os.close(descriptor)


def _acquire(path: Path, patience_seconds: float, while_waiting: Callable[[], None]) -> int | None:
    seen, seen_at = None, time.monotonic()
    while True:
        with contextlib.ExitStack() as stack:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, descriptor)
            if _locked(descriptor) and _is_at(descriptor, path):
                os.utime(descriptor)
                stack.pop_all()
                return descriptor
            stat = os.fstat(descriptor)
        if seen != (stat.st_ino, stat.st_mtime_ns):
            seen, seen_at = (stat.st_ino, stat.st_mtime_ns), time.monotonic()
        elif time.monotonic() - seen_at > patience_seconds:
            return None
        while_waiting()
        time.sleep(_POLL_SECONDS)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
