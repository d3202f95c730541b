"""Models: uploaded TorchScript files."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.api.deps import ModelId, OwnerDep, ServicesDep
from service.api.paging import Cursor, Limit, NameFilter, bounded
from service.api.uploads import RAW_BODY, UploadName, receive_body
from service.contract.resources import ModelPage, ModelResource
from service.jobs import delete, files

router = APIRouter(prefix="/models", tags=["models"])


@router.post("", status_code=201, openapi_extra=RAW_BODY)
async def upload_model(
    request: Request, response: Response, services: ServicesDep, owner: OwnerDep, name: UploadName = None
) -> ModelResource:
    """Upload a TorchScript file as the raw body; the same bytes are the same model."""
    received = await receive_body(request, services, files.MODEL, name)
    model = await run_in_threadpool(files.register_model, services, owner, received)
    response.headers["location"] = f"/v1/models/{model.id}"
    return model


@router.get("")
def list_models(
    services: ServicesDep, owner: OwnerDep, limit: Limit = None, cursor: Cursor = None, name: NameFilter = None
) -> ModelPage:
    """The models, newest first."""
    size = bounded(limit, services.settings.page_size, services.settings.max_page_size)
    return files.list_models(services, owner, name=name, cursor=cursor, limit=size)


@router.get("/{id}")
def read_model(services: ServicesDep, owner: OwnerDep, model_id: ModelId) -> ModelResource:
    """One model."""
    return files.read_model(services, owner, model_id)


@router.delete("/{id}", status_code=204)
def delete_model(services: ServicesDep, owner: OwnerDep, model_id: ModelId) -> None:
    """Delete the model, unless a waiting or running job needs it; the same bytes uploaded again bring it back."""
    delete.delete_model(services, owner, model_id)
