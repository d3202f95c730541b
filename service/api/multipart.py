"""multipart/form-data read as a stream: parts are seen as they arrive and nothing is kept."""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.dispositions import clean_name
from service.contract.errors import ErrorCode, ProblemError

MAX_PARTS = 16


@dataclass(frozen=True)
class PartBegins:
    """The headers of a part, as far as they matter."""

    name: str
    file_name: str | None


@dataclass(frozen=True)
class PartEnds:
    """The part is complete."""


PartEvent = PartBegins | bytes | PartEnds


def boundary_of(content_type: str) -> bytes | None:
    """The boundary, where the content type is multipart/form-data."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return None
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    return boundary


async def read_parts(boundary: bytes, chunks: AsyncIterable[bytes]) -> AsyncIterator[PartEvent]:
    """Yield what the body's parts hold, in the order they come; refuse a body that is malformed or cut off."""
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        async for chunk in chunks:
            parser.write(chunk)
            for event in collector.take():
                yield event
        parser.finalize()
    except FormParserError as error:
        raise _malformed(str(error)) from None
    if not collector.ended:
        raise _malformed("it ends before its closing boundary; was the upload cut off?")


class _Collector:
    """Turns the parser's callbacks, which cannot wait, into a list of events."""

    def __init__(self) -> None:
        self.ended = False
        self._events: list[PartEvent] = []
        self._parts = 0
        self._field = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def take(self) -> list[PartEvent]:
        events, self._events = self._events, []
        return events

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"it has more than {MAX_PARTS} parts")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no Content-Disposition: form-data with a name")
        shown = options.get(b"filename", b"").decode("utf-8", "replace")
        self._events.append(PartBegins(options[b"name"].decode("utf-8", "replace"), clean_name(shown)))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _part_end(self) -> None:
        self._events.append(PartEnds())

    def _end(self) -> None:
        self.ended = True


def _malformed(what: str) -> ProblemError:
    return ProblemError(ErrorCode.REQUEST_INVALID, f"the multipart body cannot be read: {what}")
