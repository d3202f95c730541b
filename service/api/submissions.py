"""`POST /v1/jobs`: the request becomes a submission, the accepted job becomes the answer."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import structlog
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from service.api.dispositions import clean_name
from service.api.multipart import boundary_of
from service.api.parts import PartsReader
from service.api.strict_json import load_json
from service.api.uploads import body_chunks
from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.contract.resources import JobResource, SubmissionCheck
from service.contract.strict import StrictModel
from service.jobs import idempotency
from service.jobs.submit import Submission, check_submission, named_objective, submit
from service.services import Services
from service.store.idempotency import Fresh, Replay

_log = structlog.get_logger(__name__)
_MULTIPART_OVERHEAD_BYTES = 64 * 1024  # boundaries, headers of parts, short text fields


class JobRequest(StrictModel):
    """The JSON form of a submission: ids of earlier uploads, and the spec."""

    model_id: str
    dataset_id: str | None = None
    spec: dict[str, Any]
    name: str | None = None


def _json_schema() -> dict[str, Any]:
    schema = JobRequest.model_json_schema()
    return {**schema, "properties": {**schema["properties"], "spec": {"$ref": "#/components/schemas/JobSpec"}}}


_PARTS_SCHEMA = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "model": {"type": "string", "format": "binary", "description": "A TorchScript file."},
        "model_id": {"type": "string", "description": "In place of model: an uploaded one."},
        "data": {"type": "string", "format": "binary", "description": "A .npz, .safetensors or WebDataset .tar file."},
        "dataset_id": {"type": "string", "description": "In place of data: an uploaded one."},
        "objective": {
            "type": "string",
            "format": "binary",
            "description": 'A TorchScript module with loss(outputs, batch), which the spec names: {"loss": {"module": '
            '"objective"}}.',
        },
        "spec": {"$ref": "#/components/schemas/JobSpec"},
        "name": {"type": "string"},
    },
}
SUBMIT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            # The spec's part may be a text field or a file; a part's own content type is not looked at.
            "multipart/form-data": {"schema": _PARTS_SCHEMA, "encoding": {"spec": {"contentType": "application/json"}}},
            "application/json": {"schema": _json_schema()},
        },
    }
}


async def accept(request: Request, services: Services, owner: str, *, key: str | None, dry_run: bool) -> Response:
    """Take in the request, have it accepted, and answer; whatever was received for a refused one is gone."""
    async with AsyncExitStack() as stack:
        claim = None if key is None or dry_run else await stack.enter_async_context(claimed(services, owner, key))
        submission = await _read_submission(request, services, owner, stack)
        if dry_run:
            spec = await run_in_threadpool(check_submission, services, submission)
            check = SubmissionCheck(requested_spec=submission.requested_spec, spec=spec)
            return Response(check.model_dump_json(), media_type="application/json")
        accepted = await run_in_threadpool(submit, services, submission, claim)
    return answer(accepted.job, replayed=accepted.replayed)


def answer(job: JobResource, *, replayed: bool) -> Response:
    """202 with the job and its place; the header says when an earlier request had started it."""
    # This line alone has both ids: it leads from a request to its job.
    _log.info("job_accepted", job_id=job.id, queue=job.queue, retry_of=job.retry_of, replayed=replayed)
    headers = {"location": f"/v1/jobs/{job.id}"} | ({"idempotency-replayed": "true"} if replayed else {})
    return Response(job.model_dump_json(), status_code=202, media_type="application/json", headers=headers)


@asynccontextmanager
async def claimed(services: Services, owner: str, key: str) -> AsyncIterator[Fresh | Replay]:
    """Hold an idempotency key while the request is read; a request that is not accepted frees it."""
    claim = await run_in_threadpool(idempotency.reserve, services, owner, key)
    try:
        yield claim
    except BaseException:
        if isinstance(claim, Fresh):
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(idempotency.release, services, claim)
        raise


async def _read_submission(request: Request, services: Services, owner: str, stack: AsyncExitStack) -> Submission:
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() == "application/json":
        return await _from_json(request, services, owner)
    boundary = boundary_of(content_type)
    if boundary is not None:
        return await _from_multipart(request, services, owner, boundary, stack)
    raise ProblemError(
        ErrorCode.UNSUPPORTED_MEDIA_TYPE,
        "expected multipart/form-data with the parts model, spec, data and objective, or application/json with "
        f"model_id, dataset_id and spec; found {content_type[:100]!r}",
    )


async def _from_multipart(
    request: Request, services: Services, owner: str, boundary: bytes, stack: AsyncExitStack
) -> Submission:
    settings = services.settings
    limit = 2 * settings.max_model_bytes + settings.max_dataset_bytes + settings.max_spec_bytes
    reader = await stack.enter_async_context(PartsReader(services))
    limit += _MULTIPART_OVERHEAD_BYTES
    await reader.read(boundary, body_chunks(request, services, limit_bytes=limit, what="the request"))
    return reader.submission(owner)


async def _from_json(request: Request, services: Services, owner: str) -> Submission:
    limit = services.settings.max_spec_bytes
    body = b"".join([chunk async for chunk in body_chunks(request, services, limit_bytes=limit, what="the JSON body")])
    try:
        asked = JobRequest.model_validate(load_json(body, "the body"))
    except ValidationError as error:
        errors = [
            FieldError(
                pointer="".join(f"/{part}" for part in detail["loc"]), code=detail["type"], message=detail["msg"]
            )
            for detail in error.errors(include_url=False)
        ]
        first = errors[0]
        raise ProblemError(
            ErrorCode.REQUEST_INVALID, f"{first.pointer or 'the body'}: {first.message}", errors=errors
        ) from None
    return Submission(
        owner=owner,
        name=clean_name(asked.name),
        requested_spec=asked.spec,
        model=asked.model_id,
        dataset=asked.dataset_id,
        objective=named_objective(asked.spec),
    )
