"""A worker's own copies of what lies in an object store: named by content, hashed at every use, bounded in size."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from service.blobs.errors import BlobDamagedError
from service.blobs.store import BlobStore, content_key
from service.blobs.writer import BLOCK_BYTES
from worker.file_lock import held, nothing

_CACHED = re.compile("[0-9a-f]{64}")
_PART, _LOCK = "part-", "lock-"
_LEFTOVER_SECONDS = 3600.0
PATIENCE_SECONDS = 30.0

log = structlog.get_logger(__name__)


class BlobCache:
    """The cache in a directory, which processes and threads of one machine may share.

    Whoever is handed a file has a link of its own to it, so no eviction takes it away. Bytes that rotted, or that a job
    tampered with, are found by their hash before anybody is handed them: reading a file costs far less than the job
    that it is for. Locks only spare a second download; nothing becomes wrong without them.
    """

    def __init__(
        self, blobs: BlobStore, directory: Path, max_bytes: int, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._blobs = blobs
        self._directory = directory
        self._max_bytes = max_bytes
        self._patience_seconds = patience_seconds

    def fetch(
        self,
        key: str,
        sha256: str,
        directory: Path,
        *,
        keep: bool = True,
        between_blocks: Callable[[], None] = nothing,
    ) -> Path:
        """A file with the bytes under the key: the store's own, or one in the directory, never to be written to.

        With `keep` the cache holds it for the next time. What `between_blocks` raises ends a download.

        Raises
        ------
        FileNotFoundError
            When nothing lies under the key.
        BlobDamagedError
            When the bytes that an object store holds do not have this SHA-256.
        BlobStoreAwayError
            When the store does not answer.
        """
        content_key(sha256)  # the hash becomes a file name
        local = self._blobs.local_path(key)
        if local is not None:
            self._blobs.size(key)  # a file that is not there, or a store that is away, says so
            return local
        target = directory / sha256
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._take(sha256, target):
            return target
        with self._alone(sha256, between_blocks) as show_life:
            if not self._take(sha256, target):

                def after_block() -> None:
                    show_life()
                    between_blocks()

                self._download(key, sha256, target, after_block, keep=keep)
        return target

    def _take(self, sha256: str, target: Path) -> bool:
        """Link the cached file to its place and make it the most recently used one; a damaged one is thrown away."""
        cached = self._directory / sha256
        target.unlink(missing_ok=True)
        try:
            _link(cached, target)
        except FileNotFoundError:
            return False
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            log.warning("cached_file_damaged", sha256=sha256, found=found)
            target.unlink()
            cached.unlink(missing_ok=True)
            return False
        with contextlib.suppress(FileNotFoundError):
            os.utime(cached)
        return True

    def _download(self, key: str, sha256: str, target: Path, after_block: Callable[[], None], *, keep: bool) -> None:
        part = self._reserve(self._blobs.size(key)) if keep else None
        if part is None:
            target.touch()
            self._receive(key, sha256, target, after_block)
            return
        try:
            self._receive(key, sha256, part, after_block)
            _link(part, target)
            with self._alone("room"):  # whoever counts what is there must find it under one name or the other
                part.replace(self._directory / sha256)
        finally:
            part.unlink(missing_ok=True)

    def _receive(self, key: str, sha256: str, path: Path, after_block: Callable[[], None]) -> None:
        digest = hashlib.sha256()
        with contextlib.ExitStack() as unless_whole:
            unless_whole.callback(path.unlink, missing_ok=True)
            with path.open("r+b") as file:
                for block in self._blobs.open_range(key, block_bytes=BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
                    after_block()
                file.truncate()
                os.fchmod(file.fileno(), 0o444)
            if digest.hexdigest() != sha256:
                raise BlobDamagedError(key, sha256, digest.hexdigest())
            unless_whole.pop_all()

    def _reserve(self, size: int) -> Path | None:
        """An unfinished file that counts with its full size already; None when the cache cannot hold so much."""
        with self._alone("room"):
            if not self._make_room(size):
                return None
            part = self._directory / f"{_PART}{secrets.token_hex(16)}"
            with part.open("xb") as file:
                file.truncate(size)
            return part

    def _make_room(self, size: int) -> bool:
        """Delete leftovers, then the least recently used files until so much more fits."""
        cached, parts_bytes = [], 0
        for path, stat in self._entries():
            if _CACHED.fullmatch(path.name):
                cached.append((stat.st_mtime_ns, stat.st_size, path))
            elif stat.st_mtime < time.time() - _LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)
            elif path.name.startswith(_PART):
                parts_bytes += stat.st_size
        if size > self._max_bytes - parts_bytes:
            return False
        room = self._max_bytes - parts_bytes - sum(bytes_ for _, bytes_, _ in cached)
        for _, bytes_, path in sorted(cached):
            if size <= min(room, shutil.disk_usage(self._directory).free):
                break
            path.unlink(missing_ok=True)
            room += bytes_
        return True

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._directory.iterdir():
            if _CACHED.fullmatch(path.name) or path.name.startswith((_PART, _LOCK)):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.stat()

    def _alone(
        self, name: str, while_waiting: Callable[[], None] = nothing
    ) -> contextlib.AbstractContextManager[Callable[[], None]]:
        path = self._directory / f"{_LOCK}{name}"
        return held(path, patience_seconds=self._patience_seconds, while_waiting=while_waiting)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
