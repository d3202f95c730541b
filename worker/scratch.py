"""Where a worker's attempts have their files: a directory of its own, which the next worker here removes if it died."""

import fcntl
import os
import shutil
import time
from pathlib import Path

import structlog

_LOCK = "lock"
_YOUNG_SECONDS = 60.0  # one that starts at this moment may have a directory and no lock yet

log = structlog.get_logger(__name__)


class Scratch:
    """A worker's scratch directory, held by a lock for as long as its process lives.

    Workers of one machine may share a data directory: none of them ever removes the files of another that lives.
    """

    def __init__(self, directory: Path, worker_id: str) -> None:
        self._directory = directory.absolute()
        self._own = self._directory / worker_id
        self._descriptor: int | None = None

    def attempt(self, job_id: str, epoch: int) -> Path:
        """The directory of an attempt; the attempt makes and removes it."""
        return self._own / job_id / str(epoch)

    def open(self, *, alone: bool) -> None:
        """Make and hold the directory, and remove those whose workers are dead: all others where no other can live."""
        self._own.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._own / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in self._directory.iterdir():
            if path != self._own and (alone or (_age_seconds(path) > _YOUNG_SECONDS and not _is_held(path / _LOCK))):
                log.info("scratch_removed", worker_id=path.name)
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove the directory; its attempts have ended."""
        shutil.rmtree(self._own, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # another worker removes it


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
