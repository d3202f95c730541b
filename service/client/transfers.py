"""Files to and from the service in constant memory."""

import base64
import binascii
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import httpx2

from service.client.errors import DownloadDamagedError
from service.client.transport import RETRIED_STATUSES, Transport

CHUNK_BYTES = 1 << 20


def read_chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, a chunk at a time."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def download(transport: Transport, url_path: str, target: Path, sha256: str | None) -> str:
    """Fetch into a temporary file beside the target, check its SHA-256, and only then give it its name.

    A connection that breaks is taken up again where it broke; the target is never a part of a file.
    """
    descriptor, partial_name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    partial = Path(partial_name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            fetch = _Fetch(transport, url_path, file)
            fetch.run()
            file.flush()
            os.fsync(file.fileno())
        expected = sha256 or fetch.announced_sha256
        if expected is not None and fetch.hash.hexdigest() != expected:
            raise DownloadDamagedError(
                f"{target.name}: expected SHA-256 {expected}, received {fetch.hash.hexdigest()}; fetch it again"
            )
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
        return fetch.hash.hexdigest()
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


class _Fetch:
    """One file on its way, over as many connections as it takes."""

    def __init__(self, transport: Transport, url_path: str, file: BinaryIO) -> None:
        self.transport = transport
        self.url_path = url_path
        self.file = file
        self.received = 0
        self.hash = hashlib.sha256()
        self.etag: str | None = None
        self.announced_sha256: str | None = None

    def run(self) -> None:
        """Read to the end; attempts that bring bytes do not count against the retries."""
        failures = 0
        while True:
            before = self.received
            try:
                if self._one_connection():
                    return
                error: Exception = ConnectionError("the service is busy")
            except httpx2.TransportError as broken:
                error = broken
            failures = 1 if self.received > before else failures + 1
            if failures >= self.transport.retries.attempts:
                raise self.transport.unavailable(error) from error
            time.sleep(self.transport.retries.pause_seconds(failures - 1))

    def _one_connection(self) -> bool:
        headers = {"Range": f"bytes={self.received}-"} if self.received else {}
        if self.received and self.etag:
            headers["If-Range"] = self.etag
        with self.transport.http.stream("GET", self.url_path, headers=headers) as response:
            if response.status_code in RETRIED_STATUSES:
                return False
            if not response.is_success:
                response.read()
                raise self.transport.refusal(response)
            if response.status_code != 206:
                self._restart()
            self.etag = response.headers.get("ETag", self.etag)
            self.announced_sha256 = _announced_sha256(response.headers) or self.announced_sha256
            for chunk in response.iter_raw():
                self.file.write(chunk)
                self.hash.update(chunk)
                self.received += len(chunk)
        return True

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received = 0
        self.hash = hashlib.sha256()


def _announced_sha256(headers: httpx2.Headers) -> str | None:
    """The SHA-256 of the whole file from `Repr-Digest` (RFC 9530), in hexadecimal."""
    for member in headers.get("Repr-Digest", "").split(","):
        name, _, value = member.strip().partition("=")
        if name == "sha-256":
            with suppress(binascii.Error):
                return base64.b64decode(value.strip(":"), validate=True).hex()
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
