"""Stored files on their way out: ranges, validators, digests and names (RFC 9110, 9530, 6266)."""

import base64
from collections.abc import Iterator, Mapping

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from service.api.dispositions import attachment
from service.api.problems import request_id_of, respond
from service.api.ranges import NotSatisfiableError, matches_etag, parse_range
from service.contract.errors import ErrorCode, ProblemError
from service.jobs.read import StoredFile
from service.services import Services


def stored_file_response(
    request: Request,
    services: Services,
    file: StoredFile,
    *,
    media_type: str = "application/octet-stream",
    inline: bool = False,
) -> Response:
    """Answer with a stored file, or the part of it that the request asks for; the file never changes under its id."""
    etag, size = f'"{file.resource.sha256}"', file.resource.bytes
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(file.resource.sha256)).decode()}:",
        "content-type": media_type,
    }
    if not inline:
        headers["content-disposition"] = attachment(file.resource.name)
    if matches_etag(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers={name: headers[name] for name in ("etag", "cache-control")})
    if_range = request.headers.get("if-range")
    wanted = request.headers.get("range") if if_range is None or if_range.strip() == etag else None
    try:
        part = parse_range(wanted, size)
    except NotSatisfiableError:
        error = ProblemError(
            ErrorCode.RANGE_NOT_SATISFIABLE, f"expected a range within the file's {size} bytes; found {wanted}"
        )
        return respond(error, request_id_of(request), {"content-range": f"bytes */{size}"})
    start, stop = (part.start, part.stop) if part else (0, size)
    headers["content-length"] = str(stop - start)
    if part:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    return _send(request, services, file, start, stop, status=206 if part else 200, headers=headers)


def _send(
    request: Request,
    services: Services,
    file: StoredFile,
    start: int,
    stop: int,
    *,
    status: int,
    headers: Mapping[str, str],
) -> Response:
    blocks: Iterator[bytes] = iter(())
    if request.method != "HEAD":
        blocks = services.blobs.open_range(
            file.blob_key, start, stop, block_bytes=services.settings.download_block_bytes
        )
    return StreamingResponse(blocks, status_code=status, headers=headers)
