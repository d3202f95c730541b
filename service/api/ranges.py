"""One byte range of a download (RFC 9110, section 14): which part of the file a request asks for."""

import re
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` (exclusive) of a file."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.stop - self.start


class NotSatisfiableError(Exception):
    """The range begins behind the end of the file."""


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return the range asked for, or None where the whole file is the answer.

    A header that cannot be read, another unit and several ranges at once are ignored, as the standard allows.
    """
    match = _ONE_RANGE.fullmatch(header) if header is not None else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return _suffix(int(last), size)
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= size:
        raise NotSatisfiableError
    return ByteRange(start, min(int(last) + 1, size) if last else size)


def _suffix(length: int, size: int) -> ByteRange:
    if length == 0 or size == 0:
        raise NotSatisfiableError
    return ByteRange(max(size - length, 0), size)


def matches_etag(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this entity tag, with the weak comparison the standard asks for."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
