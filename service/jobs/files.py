"""Uploaded models and datasets: what is taken in, kept once for each content, and shown."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from service.blobs.archive import check_model_file
from service.blobs.datasets import check_dataset
from service.blobs.store import BlobStore
from service.blobs.writer import BlobWriter, StagedBlob
from service.contract import ids
from service.contract.errors import ErrorCode, ProblemError
from service.contract.resources import DatasetPage, DatasetResource, ModelPage, ModelResource
from service.jobs.read import checked_cursor, not_found
from service.services import Services
from service.settings import Settings
from service.store import datasets, listings, models
from service.store.blobs import hold_blobs
from service.store.tables import Dataset, Model

DATA_FORMATS = ("npz", "safetensors", "webdataset")
MODEL_FORMAT = "torchscript"


@dataclass(frozen=True)
class FileKind:
    """What an upload is meant to be: its limit, and the check that refuses anything else and names the format."""

    what: str
    limit_bytes: Callable[[Settings], int]
    check: Callable[[Path, Settings], str]


def _check_model(path: Path, settings: Settings) -> str:
    check_model_file(path, max_entries=settings.max_archive_entries, max_unpacked_bytes=4 * settings.max_model_bytes)
    return MODEL_FORMAT


def _check_dataset(path: Path, settings: Settings) -> str:
    return check_dataset(path, max_unpacked_bytes=4 * settings.max_dataset_bytes)


MODEL = FileKind("model", lambda settings: settings.max_model_bytes, _check_model)
OBJECTIVE = FileKind("objective", lambda settings: settings.max_model_bytes, _check_model)
DATASET = FileKind("dataset", lambda settings: settings.max_dataset_bytes, _check_dataset)


@dataclass(frozen=True)
class ReceivedFile:
    """A whole upload that passed its check; not in the store yet."""

    name: str | None
    format: str
    staged: StagedBlob

    @property
    def sha256(self) -> str:
        """Of its bytes."""
        return self.staged.sha256


def open_writer(services: Services, kind: FileKind) -> BlobWriter:
    """Begin to take in a file; its writer holds the limit."""
    return services.blobs.writer(limit_bytes=kind.limit_bytes(services.settings), what=kind.what)


def check_received(services: Services, kind: FileKind, staged: StagedBlob, name: str | None) -> ReceivedFile:
    """Refuse an upload that is not what it is meant to be; then nothing of it is left."""
    try:
        return ReceivedFile(name, kind.check(staged.path, services.settings), staged)
    except BaseException:
        staged.discard()
        raise


def store_model(blobs: BlobStore, file: ReceivedFile) -> Callable[[Session, str], Model]:
    """Move the file into the store, and return what writes its row: to be called in a transaction."""
    key = blobs.keep(file.staged)

    def write(session: Session, owner: str) -> Model:
        _hold(session, blobs, key)
        return models.upsert_model(session, owner, file.name, file.sha256, file.staged.bytes, key)

    return write


def store_dataset(blobs: BlobStore, file: ReceivedFile) -> Callable[[Session, str], Dataset]:
    """Move the file into the store, and return what writes its row: to be called in a transaction."""
    key = blobs.keep(file.staged)

    def write(session: Session, owner: str) -> Dataset:
        _hold(session, blobs, key)
        return datasets.upsert_dataset(session, owner, file.name, file.format, file.sha256, file.staged.bytes, key)

    return write


def _hold(session: Session, blobs: BlobStore, key: str) -> None:
    """Keep the sweep off the stored bytes until their row is committed."""
    hold_blobs(session, [key])
    if not blobs.exists(key):
        raise ProblemError(
            ErrorCode.UNAVAILABLE,
            "expected the file that was just stored; an old copy of the same content was deleted at that moment, and "
            "this one with it: send the same request again",
        )


def register_model(services: Services, owner: str, file: ReceivedFile) -> ModelResource:
    """Keep an uploaded model; the same bytes again are the model that is there."""
    write = store_model(services.blobs, file)
    with services.database.write() as session:
        return models.model_resource(write(session, owner))


def register_dataset(services: Services, owner: str, file: ReceivedFile) -> DatasetResource:
    """Keep an uploaded dataset; the same bytes again are the dataset that is there."""
    write = store_dataset(services.blobs, file)
    with services.database.write() as session:
        return datasets.dataset_resource(write(session, owner))


def list_models(services: Services, owner: str, *, name: str | None, cursor: str | None, limit: int) -> ModelPage:
    """A page of the owner's models, newest first."""
    checked_cursor(cursor, ids.MODEL)
    with services.database.read() as session:
        rows, following = listings.list_models(session, owner, name=name, cursor=cursor, limit=limit)
        return ModelPage(items=[models.model_resource(row) for row in rows], next_cursor=following)


def list_datasets(services: Services, owner: str, *, name: str | None, cursor: str | None, limit: int) -> DatasetPage:
    """A page of the owner's datasets, newest first."""
    checked_cursor(cursor, ids.DATASET)
    with services.database.read() as session:
        rows, following = listings.list_datasets(session, owner, name=name, cursor=cursor, limit=limit)
        return DatasetPage(items=[datasets.dataset_resource(row) for row in rows], next_cursor=following)


def read_model(services: Services, owner: str, model_id: str) -> ModelResource:
    """One model."""
    with services.database.read() as session:
        return models.model_resource(existing_model(session, owner, model_id))


def read_dataset(services: Services, owner: str, dataset_id: str) -> DatasetResource:
    """One dataset."""
    with services.database.read() as session:
        return datasets.dataset_resource(existing_dataset(session, owner, dataset_id))


def existing_model(session: Session, owner: str, model_id: str, *, lock: bool = False) -> Model:
    """The owner's model, or `NOT_FOUND`; with `lock` it stays until the transaction ends."""
    row = models.get_model(session, model_id, owner, lock=lock) if ids.is_id(model_id, ids.MODEL) else None
    if row is None:
        raise not_found("model", model_id)
    return row


def existing_dataset(session: Session, owner: str, dataset_id: str, *, lock: bool = False) -> Dataset:
    """The owner's dataset, or `NOT_FOUND`; with `lock` it stays until the transaction ends."""
    row = datasets.get_dataset(session, dataset_id, owner, lock=lock) if ids.is_id(dataset_id, ids.DATASET) else None
    if row is None:
        raise not_found("dataset", dataset_id)
    return row
