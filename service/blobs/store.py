"""Bytes by key: in files beside the database, or in an object store, both through obstore."""

import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, ObjectStore

from service.blobs.errors import BlobStoreAwayError, store_errors
from service.blobs.local import copy_durably, move_durably, read_range, sync_file
from service.blobs.remote import PARTS_AT_ONCE, open_remote, part_bytes
from service.blobs.writer import BlobWriter, StagedBlob
from service.contract.errors import ProblemError

if TYPE_CHECKING:
    from obstore import ObjectMeta  # a name for type checkers alone

_KEY = re.compile(
    r"sha256/[0-9a-f]{2}/[0-9a-f]{62}"
    r"|checkpoints/job_[0-9a-z]{26}/[0-9]+/[0-9A-Za-z][0-9A-Za-z._-]*"
    r"|probe/[0-9a-f]{16}"
)
_PREFIXES = ("sha256", "checkpoints", "probe")
_STAGING = "staging"
MARKER = "rankpress-store.json"  # in a folder that machines share: it is told from an empty mount point by this
_MARKED = {"format": 1}
_READ_BYTES = 8 * 1024**2  # of one request to an object store
_KEYS_OF_A_PAGE = 1000
AWAY_SECONDS = 30.0
PROBE_SECONDS = 5.0


def content_key(sha256: str) -> str:
    """The key of a file by its content; no text of a user ever becomes a path."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"expected a SHA-256 in 64 hexadecimal digits; found {sha256!r}")
    return f"sha256/{sha256[:2]}/{sha256[2:]}"


def checkpoint_key(job_id: str, epoch: int, step: int) -> str:
    """The key of a checkpoint; it holds the epoch, so that no attempt ever writes where another one reads."""
    return _checked(f"checkpoints/{job_id}/{epoch}/{step}-{secrets.token_hex(4)}")


class BlobStore:
    """One store by its URL (`file://`, `s3://`, …); files are staged beside it, or in `staging_dir`.

    Every method raises BlobStoreAwayError when the store does not answer or refuses: within `away_seconds`, counted for
    each request, of which a large file needs many. A folder is made with `create` alone; without, it must be there with
    its marker, now and at every use.
    """

    def __init__(
        self, url: str, *, staging_dir: Path | None = None, away_seconds: float = AWAY_SECONDS, create: bool = True
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.root: Path | None = Path(unquote(parts.path)) if parts.scheme == "file" else None
        self._marked = not create
        self._store: ObjectStore
        self._prober: ObjectStore
        if self.root is not None:
            if create:
                self.root.mkdir(parents=True, exist_ok=True)
            else:
                self._check_here()
            self._store = self._prober = LocalStore(self.root)
        else:
            self._store = open_remote(url, away_seconds=away_seconds)
            self._prober = open_remote(url, away_seconds=min(away_seconds, PROBE_SECONDS))
        staging = staging_dir or (self.root / _STAGING if self.root is not None else None)
        if staging is None:
            raise ValueError(f"expected a staging_dir beside the object store {url}; found none")
        self._staging = staging
        staging.mkdir(parents=True, exist_ok=True)

    def write_marker(self) -> bool:
        """Mark a folder, so that it is told from the empty mount point of one; returns whether it had no mark yet."""
        if self.root is None:
            return False
        try:
            with (self.root / MARKER).open("x", encoding="ascii") as file:
                json.dump(_MARKED, file)
        except FileExistsError:
            return False
        return True

    def writer(self, *, limit_bytes: int, what: str = "file") -> BlobWriter:
        """Begin a staged file; `what` names it in a refusal ("model", "dataset")."""
        with self._errors(writing=True):
            return BlobWriter(self._staging / secrets.token_hex(16), limit_bytes=limit_bytes, what=what)

    def keep(self, staged: StagedBlob) -> str:
        """Move a staged file into the store under its content's key, and return the key.

        After a crash the key holds the whole file or nothing, and after an error the staged file is gone. A file that
        is there already is replaced by the same bytes, which makes it young again for the sweep of orphans.
        """
        key = content_key(staged.sha256)
        try:
            self._move_in(staged.path, key)
        finally:
            staged.discard()
        return key

    def put_file(self, path: Path, key: str, *, move: bool = False) -> None:
        """Store a file under a key, durably and in one step; with `move` the original is gone afterwards."""
        _checked(key)
        if self.root is None:
            self._upload(path, key)
        else:
            self._copy_in(path, key, move=move)
        if move:
            path.unlink(missing_ok=True)

    def put_content(self, path: Path, *, move: bool = False) -> tuple[str, str, int]:
        """Store a file under its content's key; returns key, SHA-256 and bytes."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        key = content_key(sha256)
        self.put_file(path, key, move=move)
        return key, sha256, size

    def open_range(
        self, key: str, start: int = 0, end: int | None = None, *, block_bytes: int = 1024**2
    ) -> Iterator[bytes]:
        """Read the bytes from `start` up to but without `end`, in blocks; raises FileNotFoundError at once."""
        size = self.size(key)
        stop = size if end is None else min(end, size)
        path = self.local_path(key)
        if path is not None:
            return read_range(path, start, stop, block_bytes)
        return self._read_object(key, start, stop, block_bytes)

    def size(self, key: str) -> int:
        """How many bytes lie under the key; raises FileNotFoundError."""
        _checked(key)
        with self._errors():
            return int(obstore.head(self._store, key)["size"])

    def exists(self, key: str) -> bool:
        """Whether something lies under the key."""
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def local_path(self, key: str) -> Path | None:
        """The file under the key, for a store of files: read it in place, never write to it."""
        _checked(key)
        return None if self.root is None else self.root / key

    def delete(self, key: str) -> None:
        """Delete what lies under the key; nothing there is no error."""
        _checked(key)
        with contextlib.suppress(FileNotFoundError), self._errors():
            obstore.delete(self._store, key)

    def delete_if_older(self, key: str, seconds: float) -> bool:
        """Delete what lies under the key if it was last written so long ago; returns whether it was deleted."""
        _checked(key)
        try:
            with self._errors():
                written = obstore.head(self._store, key)["last_modified"]
        except FileNotFoundError:
            return False
        if written >= datetime.now(UTC) - timedelta(seconds=seconds):
            return False
        self.delete(key)
        return True

    def keys_older_than(self, seconds: float) -> Iterator[str]:
        """The keys that were last written so long ago; what is no key of ours is passed over."""
        self._check_here()  # a folder that is away would list as an empty one
        limit = datetime.now(UTC) - timedelta(seconds=seconds)
        for prefix in _PREFIXES:
            pages = iter(obstore.list(self._store, prefix, chunk_size=_KEYS_OF_A_PAGE))
            while page := self._next_page(pages):
                yield from (
                    meta["path"] for meta in page if meta["last_modified"] < limit and _KEY.fullmatch(meta["path"])
                )

    def sweep_staging(self, seconds: float) -> int:
        """Delete staged files that a crash left behind so long ago; returns how many."""
        limit = time.time() - seconds
        swept = 0
        with self._errors(writing=True):
            staged = list(self._staging.iterdir())
        for path in staged:
            with contextlib.suppress(FileNotFoundError):  # another service sweeps too
                if path.is_file() and path.stat().st_mtime < limit:
                    path.unlink()
                    swept += 1
        return swept

    def check(self) -> None:
        """Write, read and delete a small object; raises BlobStoreAwayError or `STORAGE_FULL` with what went wrong."""
        path = _checked(f"probe/{secrets.token_hex(8)}")  # what a crash leaves of it is an orphan, which is swept
        written = secrets.token_bytes(16)
        with self._errors(writing=True):
            obstore.put(self._prober, path, written)
            read = bytes(obstore.get(self._prober, path).bytes())
            obstore.delete(self._prober, path)
        if read != written:
            raise BlobStoreAwayError(f"{self.url}: a small object was read back with other bytes")

    def probe(self) -> bool:
        """Whether a small object can be written, read and deleted."""
        try:
            self.check()
        except (BlobStoreAwayError, ProblemError):
            return False
        return True

    @contextlib.contextmanager
    def _errors(self, *, writing: bool = False) -> Iterator[None]:
        """`store_errors`, and a folder that is away: nothing is written where it was, and no file in it is missing."""
        if writing:
            self._check_here()
        try:
            with store_errors(self.url, writing=writing):
                yield
        except FileNotFoundError:
            self._check_here()
            raise

    def _check_here(self) -> None:
        """Raise when the folder was unmounted or deleted; writing would begin another one in its place."""
        if self.root is None:
            return
        try:
            (self.root / MARKER if self._marked else self.root).stat()
        except OSError as error:
            expected, advice = f"the folder {self.root}", ""
            if self._marked:
                expected = f"the shared folder {self.root} with {MARKER} in it"
                advice = ": is it mounted? Run `rankpress migrate` once where it is"
            raise BlobStoreAwayError(f"expected {expected}; found {error.strerror!r}{advice}") from error

    def _copy_in(self, path: Path, key: str, *, move: bool) -> None:
        device = path.stat().st_dev  # a file that is missing here is not the store's fault
        with self._errors(writing=True):
            here = device == self._staging.stat().st_dev
        if move and here:
            with self._errors(writing=True):
                sync_file(path)
            self._move_in(path, key)
            return
        copy = self._staging / secrets.token_hex(16)
        try:
            with self._errors(writing=True):
                copy_durably(path, copy)
            self._move_in(copy, key)
        finally:
            copy.unlink(missing_ok=True)

    def _move_in(self, path: Path, key: str) -> None:
        if self.root is None:
            self._upload(path, key)
            path.unlink(missing_ok=True)
            return
        with self._errors(writing=True):
            move_durably(path, self.root / key)

    def _upload(self, path: Path, key: str) -> None:
        """Send a file in parts; memory holds only those that are under way, and the key shows all of it or nothing."""
        size = path.stat().st_size
        with self._errors(writing=True):
            obstore.put(self._store, key, path, chunk_size=part_bytes(size), max_concurrency=PARTS_AT_ONCE)

    def _next_page(self, pages: "Iterator[Sequence[ObjectMeta]]") -> "Sequence[ObjectMeta]":
        with self._errors():
            return next(pages, ())

    def _read_object(self, key: str, start: int, stop: int, block_bytes: int) -> Iterator[bytes]:
        """One short request after the other: a slow reader holds none open, and each is tried again by itself."""
        for part_start in range(start, stop, _READ_BYTES):
            with self._errors():
                part = obstore.get_range(self._store, key, start=part_start, end=min(part_start + _READ_BYTES, stop))
            view = memoryview(part)
            for block_start in range(0, len(view), block_bytes):
                yield bytes(view[block_start : block_start + block_bytes])


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"expected a blob key such as sha256/ab/cd… or checkpoints/job_…/1/3; found {key!r}")
    return key
