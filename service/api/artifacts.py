"""Artifacts: the files that jobs produced."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.deps import ArtifactId, OwnerDep, ServicesDep
from service.api.downloads import stored_file_response
from service.jobs import delete, read

router = APIRouter(prefix="/artifacts", tags=["artifacts"])

_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file."},
    206: {"content": {"application/octet-stream": {}}, "description": "The part that Range asks for."},
    304: {"description": "The file is the one that If-None-Match names."},
}


@router.get("/{id}/content", response_class=Response, responses=_CONTENT)
@router.head("/{id}/content", include_in_schema=False)
def read_content(request: Request, services: ServicesDep, owner: OwnerDep, artifact_id: ArtifactId) -> Response:
    """Download the file, or with `Range` a part of it; the ETag is its SHA-256."""
    found = read.find_artifact(services, owner, artifact_id)
    return stored_file_response(request, services, found)


@router.delete("/{id}", status_code=204)
def delete_artifact(services: ServicesDep, owner: OwnerDep, artifact_id: ArtifactId) -> None:
    """Delete the file; the job that made it stays."""
    delete.delete_artifact(services, owner, artifact_id)
