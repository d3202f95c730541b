"""A client that costs next to nothing: the same few requests, over and over, on connections that are kept."""

import asyncio
import time
from collections.abc import Sequence
from itertools import cycle


def measure(port: int, requests: Sequence[bytes], *, connections: int, seconds: float, status: int = 200) -> float:
    """Answers per second; every one must have this status."""
    return asyncio.run(_measure(port, requests, connections, seconds, status))


def get(path: str, key: str) -> bytes:
    """A request as it goes over the wire."""
    return f"GET {path} HTTP/1.1\r\nHost: benchmark\r\nAuthorization: Bearer {key}\r\n\r\n".encode()


def post(path: str, key: str, body: bytes) -> bytes:
    """A request with a JSON body."""
    head = get(path, key).replace(b"GET", b"POST", 1).removesuffix(b"\r\n")
    return head + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def _measure(port: int, requests: Sequence[bytes], connections: int, seconds: float, status: int) -> float:
    loop = asyncio.get_running_loop()
    speakers = []
    for number in range(connections):
        source = cycle([*requests[number:], *requests[:number]])
        _, speaker = await loop.create_connection(lambda source=source: _Speaker(source, status), "127.0.0.1", port)
        speakers.append(speaker)
    began = time.perf_counter()
    for speaker in speakers:
        speaker.ask()
    await asyncio.sleep(seconds)
    answers = sum(speaker.answers for speaker in speakers)
    elapsed = time.perf_counter() - began
    for speaker in speakers:
        speaker.close()
    await asyncio.sleep(0.05)
    if failed := next((speaker.failed for speaker in speakers if speaker.failed), None):
        raise SystemExit(f"expected {status} for every request; found:\n{failed.decode(errors='replace')}")
    return answers / elapsed


class _Speaker(asyncio.Protocol):
    """One connection: asks, reads the whole answer, asks again."""

    def __init__(self, source: "cycle[bytes]", status: int) -> None:
        self.answers = 0
        self.failed = b""
        self._source = source
        self._expected = f"HTTP/1.1 {status}".encode()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self) -> None:
        assert self._transport is not None
        self._transport.write(next(self._source))

    def close(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(self._expected):
            self.failed = self._buffer
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._buffer = b""
        self.answers += 1
        self.ask()
