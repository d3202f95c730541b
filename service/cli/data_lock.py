"""One process per data directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.contract.errors import ErrorCode, ProblemError


@contextmanager
def hold(lock_file: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel gives it back when the process dies, however it dies.

    Raises `STATE_CONFLICT` where another process has it.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise ProblemError(
                ErrorCode.STATE_CONFLICT,
                f"expected {lock_file.parent} to be free; process {holder or '?'} serves it: "
                "stop that one, or give another folder with --data",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
