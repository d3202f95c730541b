"""Datasets: uploaded inputs, with or without targets."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.api.deps import DatasetId, OwnerDep, ServicesDep
from service.api.paging import Cursor, Limit, NameFilter, bounded
from service.api.uploads import RAW_BODY, UploadName, receive_body
from service.contract.resources import DatasetPage, DatasetResource
from service.jobs import delete, files

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.post("", status_code=201, openapi_extra=RAW_BODY)
async def upload_dataset(
    request: Request, response: Response, services: ServicesDep, owner: OwnerDep, name: UploadName = None
) -> DatasetResource:
    """Upload a .npz, .safetensors or WebDataset .tar file as the raw body; the same bytes are the same dataset."""
    received = await receive_body(request, services, files.DATASET, name)
    dataset = await run_in_threadpool(files.register_dataset, services, owner, received)
    response.headers["location"] = f"/v1/datasets/{dataset.id}"
    return dataset


@router.get("")
def list_datasets(
    services: ServicesDep, owner: OwnerDep, limit: Limit = None, cursor: Cursor = None, name: NameFilter = None
) -> DatasetPage:
    """The datasets, newest first."""
    size = bounded(limit, services.settings.page_size, services.settings.max_page_size)
    return files.list_datasets(services, owner, name=name, cursor=cursor, limit=size)


@router.get("/{id}")
def read_dataset(services: ServicesDep, owner: OwnerDep, dataset_id: DatasetId) -> DatasetResource:
    """One dataset."""
    return files.read_dataset(services, owner, dataset_id)


@router.delete("/{id}", status_code=204)
def delete_dataset(services: ServicesDep, owner: OwnerDep, dataset_id: DatasetId) -> None:
    """Delete the dataset, unless a waiting or running job needs it; the same bytes uploaded again bring it back."""
    delete.delete_dataset(services, owner, dataset_id)
