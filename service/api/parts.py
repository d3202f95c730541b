"""The parts of a multipart submission, in any order."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from fastapi.concurrency import run_in_threadpool

from service.api.dispositions import clean_name
from service.api.limits import too_large
from service.api.multipart import PartBegins, PartEnds, read_parts
from service.api.strict_json import load_json
from service.api.uploads import writer_of
from service.blobs.writer import AsyncBlobWriter
from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.contract.objective_spec import OBJECTIVE_PART
from service.contract.spec import parse_spec
from service.jobs import files
from service.jobs.files import FileKind, ReceivedFile
from service.jobs.submit import Submission, named_objective
from service.services import Services

_FILES: dict[str, FileKind] = {"model": files.MODEL, "data": files.DATASET, OBJECTIVE_PART: files.OBJECTIVE}
_TEXTS = ("spec", "name", "model_id", "dataset_id")
_SHORT_TEXT_BYTES = 1024


class PartsReader:
    """Reads the parts; as a context it deletes on leaving whatever was received and not kept."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._received: dict[str, ReceivedFile] = {}
        self._texts: dict[str, bytes] = {}
        self._spec: Any = None
        self._part: PartBegins | None = None
        self._text = bytearray()
        self._writer: AsyncBlobWriter | None = None
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()
        for file in self._received.values():
            await run_in_threadpool(file.staged.discard)

    async def read(self, boundary: bytes, chunks: AsyncIterator[bytes]) -> None:
        """Take in the whole body; a spec that cannot be read is refused as soon as it has arrived."""
        async for event in read_parts(boundary, chunks):
            if isinstance(event, PartBegins):
                await self._begin(event)
            elif isinstance(event, PartEnds):
                await self._end()
            elif self._writer is not None:
                await self._writer.write(event)
            else:
                self._take_text(event)

    def submission(self, owner: str) -> Submission:
        """What the parts ask for; refuses one that lacks a part or says a thing twice."""
        model = self._one_of("model", "model_id")
        if model is None:
            raise _missing("model", "the TorchScript file, or model_id with the id of an uploaded one")
        if "spec" not in self._texts:
            raise _missing("spec", 'the job spec as JSON, for example {"budget": {"max_macs_fraction": 0.3}}')
        return Submission(
            owner=owner,
            name=clean_name(self._texts["name"].decode("utf-8", "replace")) if "name" in self._texts else None,
            requested_spec=self._spec,
            model=model,
            dataset=self._one_of("data", "dataset_id"),
            objective=self._received.get(OBJECTIVE_PART) or named_objective(self._spec),
        )

    async def _begin(self, part: PartBegins) -> None:
        known = (*_FILES, *_TEXTS)
        if part.name not in known:
            raise _invalid(part.name, f"unknown part {part.name[:100]!r}; the parts are {', '.join(known)}")
        if part.name in self._received or part.name in self._texts:
            raise _invalid(part.name, f"the part {part.name!r} stands in the request twice; send it once")
        self._part = part
        kind = _FILES.get(part.name)
        if kind is not None:
            self._writer = await self._open.enter_async_context(writer_of(self._services, kind))

    def _take_text(self, data: bytes) -> None:
        assert self._part is not None  # noqa: S101  (data comes between the begin and the end of a part)
        limit = self._services.settings.max_spec_bytes if self._part.name == "spec" else _SHORT_TEXT_BYTES
        if len(self._text) + len(data) > limit:
            raise too_large(limit, f"the part {self._part.name}")
        self._text += data

    async def _end(self) -> None:
        assert self._part is not None  # noqa: S101
        part = self._part
        kind = _FILES.get(part.name)
        if kind is not None and self._writer is not None:
            staged = await self._writer.finish()
            self._writer = None
            self._received[part.name] = await run_in_threadpool(
                files.check_received, self._services, kind, staged, part.file_name
            )
            return
        self._texts[part.name] = bytes(self._text)
        self._text.clear()
        if part.name == "spec":
            self._spec = load_json(self._texts["spec"], "the spec", ErrorCode.SPEC_INVALID)
            parse_spec(self._spec)

    def _one_of(self, file_part: str, id_part: str) -> ReceivedFile | str | None:
        if file_part in self._received and id_part in self._texts:
            raise _invalid(id_part, f"{file_part} and {id_part} stand for the same; send one of them")
        if id_part in self._texts:
            return self._texts[id_part].decode("utf-8", "replace").strip()
        return self._received.get(file_part)


def _missing(name: str, expected: str) -> ProblemError:
    return _invalid(name, f"expected a part {name!r} with {expected}; found none", code="missing")


def _invalid(name: str, message: str, *, code: str = "part") -> ProblemError:
    error = FieldError(pointer=f"/{name[:100]}", code=code, message=message)
    return ProblemError(ErrorCode.REQUEST_INVALID, message, errors=[error])
