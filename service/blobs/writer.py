"""A file on its way into the blob store: written block by block, hashed on the fly, counted against a limit."""

import asyncio
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from service.blobs.errors import store_errors
from service.contract.errors import ErrorCode, ProblemError

BLOCK_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class StagedBlob:
    """A whole file outside the store, safe on disk: `BlobStore.keep` it or `discard` it."""

    path: Path
    sha256: str
    bytes: int

    def discard(self) -> None:
        """Delete the file, if it is still there."""
        self.path.unlink(missing_ok=True)


class BlobWriter:
    """Writes one staged file; used as a context, it leaves nothing behind unless `finish` was reached."""

    def __init__(self, path: Path, *, limit_bytes: int, what: str) -> None:
        self.path = path
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._what = what
        self._hash = hashlib.sha256()
        self._place = str(path.parent)
        self._finished = False
        self._file = path.open("xb", buffering=0)

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Hash and write a block; raises `TOO_LARGE` over the limit and `STORAGE_FULL` on a full disk."""
        self.check_room(len(block))
        with store_errors(self._place, writing=True):
            view = memoryview(block)
            while view:
                view = view[self._file.write(view) :]
        self._hash.update(block)
        self.bytes += len(block)

    def check_room(self, more_bytes: int) -> None:
        """Raise `TOO_LARGE` if so many more bytes would be over the limit."""
        if self.bytes + more_bytes > self._limit_bytes:
            raise ProblemError(
                ErrorCode.TOO_LARGE,
                f"expected a {self._what} of at most {self._limit_bytes} bytes; found more: send a smaller file, or "
                f"raise RANKPRESS_MAX_{self._what.upper()}_BYTES on the service",
            )

    def finish(self) -> StagedBlob:
        """Make the file durable; it then belongs to the caller."""
        with store_errors(self._place, writing=True):
            os.fsync(self._file.fileno())
        self._file.close()
        self._finished = True
        return StagedBlob(self.path, self._hash.hexdigest(), self.bytes)

    def abort(self) -> None:
        """Close and delete the file, unless it was finished."""
        if not self._finished:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class AsyncBlobWriter:
    """The same for an event loop: while a thread hashes and writes one block, the next one is received.

    Holds two blocks in memory, whatever the length of the file.
    """

    def __init__(self, writer: BlobWriter, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._writer = writer
        self._block_bytes = block_bytes
        self._block = bytearray()
        self._pending: asyncio.Task[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Take a chunk of any size; raises as `BlobWriter.write` does, at the latest with the next block."""
        self._block += chunk
        if len(self._block) >= self._block_bytes:
            await self._send()

    async def finish(self) -> StagedBlob:
        """Write what is left and make the file durable."""
        await self._send()
        await self._settle()
        return await asyncio.to_thread(self._writer.finish)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            # The thread cannot be stopped, so the file is closed only after it.
            await asyncio.shield(asyncio.gather(pending, return_exceptions=True))
        self._writer.abort()

    async def _send(self) -> None:
        await self._settle()
        block, self._block = self._block, bytearray()
        if block:
            self._pending = asyncio.create_task(asyncio.to_thread(self._writer.write, block))

    async def _settle(self) -> None:
        pending = self._pending
        if pending is not None:
            await asyncio.shield(pending)
            self._pending = None
