"""Uploads: bodies streamed to the blob store in constant memory, hashed and counted on the way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.concurrency import run_in_threadpool

from service.api.dispositions import clean_name, file_name
from service.api.limits import declared_length, too_large
from service.blobs.writer import AsyncBlobWriter
from service.contract.errors import ErrorCode, ProblemError
from service.jobs import files
from service.jobs.files import FileKind, ReceivedFile
from service.services import Services

UploadName = Annotated[
    str | None, Query(max_length=200, description="The file's name; else the one of Content-Disposition.")
]
RAW_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


async def body_chunks(request: Request, services: Services, *, limit_bytes: int, what: str) -> AsyncIterator[bytes]:
    """The body as it arrives; refused above the limit (at once where its length is declared) and when it stalls."""
    length = declared_length(request.headers)
    if length is not None and length > limit_bytes:
        raise too_large(limit_bytes, what)
    stream = request.stream()
    received = 0
    while True:
        try:
            async with asyncio.timeout(services.settings.upload_idle_seconds):
                chunk = await anext(stream, b"")
        except TimeoutError:
            seconds = services.settings.upload_idle_seconds
            raise ProblemError(
                ErrorCode.REQUEST_INVALID,
                f"expected {what}; nothing new came for {seconds:g} s: send it again",
            ) from None
        if not chunk:
            return
        received += len(chunk)
        if received > limit_bytes:
            raise too_large(limit_bytes, what)
        yield chunk


@asynccontextmanager
async def writer_of(services: Services, kind: FileKind) -> AsyncIterator[AsyncBlobWriter]:
    """A writer for one file; leaves nothing behind unless it is finished."""
    writer = await run_in_threadpool(files.open_writer, services, kind)
    async with AsyncBlobWriter(writer, block_bytes=services.settings.upload_block_bytes) as asynchronous:
        yield asynchronous


async def receive_body(request: Request, services: Services, kind: FileKind, name: str | None) -> ReceivedFile:
    """Take in a file that is the whole body."""
    limit = kind.limit_bytes(services.settings)
    async with writer_of(services, kind) as writer:
        async for chunk in body_chunks(request, services, limit_bytes=limit, what=f"the {kind.what}"):
            await writer.write(chunk)
        staged = await writer.finish()
    shown = clean_name(name) or file_name(request.headers.get("content-disposition"))
    return await run_in_threadpool(files.check_received, services, kind, staged, shown)
