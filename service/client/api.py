"""The client: one method per thing the service does, with the contract's own resources as answers."""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from service.client import transfers
from service.client.errors import ServiceUnavailable, WaitTimeout
from service.client.transport import R, Retries, Transport
from service.contract import ids
from service.contract.events import Event
from service.contract.objective_spec import OBJECTIVE_PART, with_module
from service.contract.report import Report
from service.contract.resources import (
    ArtifactPage,
    ArtifactResource,
    AttemptPage,
    AttemptResource,
    Capabilities,
    DatasetResource,
    EventPage,
    Health,
    JobPage,
    JobResource,
    LayerPage,
    ModelResource,
    WorkerPage,
    WorkerResource,
)
from service.contract.spec import JobSpec
from service.contract.states import JobState

DEFAULT_URL = "http://127.0.0.1:8080"
_COLLECTIONS = {ids.JOB: "jobs", ids.MODEL: "models", ids.DATASET: "datasets", ids.ARTIFACT: "artifacts"}
FIRST_POLL_SECONDS, POLL_SECONDS_MAX = 0.2, 2.0


class Client:
    """A Rankpress service; usable as a context manager.

    Every call raises `ServiceProblem` for a refusal and `ServiceUnavailable` where no service answers.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_seconds: float = 60.0,
        attempts: int = 5,
        http_transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._transport = Transport(
            base_url,
            api_key,
            timeout_seconds=timeout_seconds,
            retries=Retries(attempts=attempts),
            http_transport=http_transport,
        )

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._transport.base_url

    def close(self) -> None:
        """Close the connections."""
        self._transport.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def upload_model(self, path: Path | str, *, name: str | None = None) -> ModelResource:
        """Upload a TorchScript file; the same bytes give the same model."""
        return self._transport.read(
            ModelResource, "POST", "/v1/models", idempotent=True, arguments=_raw_body(Path(path), name)
        )

    def upload_dataset(self, path: Path | str, *, name: str | None = None) -> DatasetResource:
        """Upload a `.npz`, `.safetensors` or WebDataset `.tar` file; the same bytes give the same dataset."""
        return self._transport.read(
            DatasetResource, "POST", "/v1/datasets", idempotent=True, arguments=_raw_body(Path(path), name)
        )

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        model: Path | str,
        data: Path | str | None = None,
        objective: Path | str | None = None,
        name: str | None = None,
        idempotency_key: str | None = None,
    ) -> JobResource:
        """Start a job on a model and a dataset, and perhaps a loss module, each given as a file or as an uploaded id.

        Safe against a broken connection: the request carries an idempotency key, by default one of its own, so
        that trying again never starts a second job.
        """
        document = spec.on_the_wire() if isinstance(spec, JobSpec) else dict(spec)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        model_is_file = not _is_id(model, ids.MODEL)
        data_is_id = data is not None and _is_id(data, ids.DATASET)
        if objective is not None and _is_id(objective, ids.MODEL):
            document, objective = with_module(document, str(objective)), None
        if model_is_file and not data_is_id:
            files = {"model": Path(model)} | ({} if data is None else {"data": Path(data)})
            if objective is not None:
                document = with_module(document, OBJECTIVE_PART)
                files[OBJECTIVE_PART] = Path(objective)
            return self._submit_files(document, files, name, headers)
        if objective is not None:
            document = with_module(document, self.upload_model(objective).id)
        body = {
            "model_id": self.upload_model(model).id if model_is_file else str(model),
            "dataset_id": data if data is None or data_is_id else self.upload_dataset(data).id,
            "spec": document,
            "name": name,
        }
        return self._transport.read(
            JobResource, "POST", "/v1/jobs", idempotent=True, arguments=lambda: {"json": body, "headers": headers}
        )

    def _submit_files(
        self, spec: dict[str, Any], paths: Mapping[str, Path], name: str | None, headers: dict[str, str]
    ) -> JobResource:
        fields = {"spec": json.dumps(spec, allow_nan=False)} | ({"name": name} if name else {})
        with ExitStack() as stack:
            files = {
                part: (path.name, stack.enter_context(path.open("rb")), "application/octet-stream")
                for part, path in paths.items()
            }
            # The multipart encoder reads each file anew from its beginning, a small chunk at a time.
            return self._transport.read(
                JobResource,
                "POST",
                "/v1/jobs",
                idempotent=True,
                arguments=lambda: {"data": fields, "files": files, "headers": headers},
            )

    def job(self, job_id: str) -> JobResource:
        """The job as it stands."""
        return self._transport.read(JobResource, "GET", _job_path(job_id), idempotent=True)

    def jobs(self, *, state: JobState | str | None = None, page_size: int = 50) -> Iterator[JobResource]:
        """All jobs, the newest first, fetched a page at a time as they are read."""
        parameters: dict[str, Any] = {"limit": page_size} | ({"state": str(state)} if state else {})
        while True:
            page = self._read(JobPage, "/v1/jobs", parameters)
            yield from page.items
            if page.next_cursor is None:
                return
            parameters = parameters | {"cursor": page.next_cursor}

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The job's history after an event number, up to now."""
        while True:
            page = self._read(EventPage, _job_path(job_id, "events"), {"after": after})
            yield from page.items
            if not page.items or page.next_after <= after:
                return
            after = page.next_after

    def layers(self, job_id: str, *, history: bool = False) -> LayerPage:
        """The layer plan, and with `history` every rank configuration that stood."""
        return self._read(LayerPage, _job_path(job_id, "layers"), {"history": "true"} if history else {})

    def report(self, job_id: str) -> Report:
        """What was measured for a finished job."""
        return self._read(Report, _job_path(job_id, "report"), {})

    def artifacts(self, job_id: str) -> list[ArtifactResource]:
        """The files that the job produced."""
        return self._read(ArtifactPage, _job_path(job_id, "artifacts"), {}).items

    def download(self, artifact: ArtifactResource | str, path: Path | str) -> str:
        """Fetch an artifact into a file and return its SHA-256.

        The file appears under its name only when it is whole and its SHA-256 is the recorded one.
        """
        artifact_id, sha256 = (artifact, None) if isinstance(artifact, str) else (artifact.id, artifact.sha256)
        url_path = f"/v1/artifacts/{quote(artifact_id, safe='')}/content"
        return transfers.download(self._transport, url_path, Path(path), sha256)

    def cancel(self, job_id: str) -> JobResource:
        """Ask the service to stop the job; it answers at once and the job ends within seconds."""
        return self._transport.read(JobResource, "POST", _job_path(job_id, "cancel"), idempotent=True)

    def retry(self, job_id: str, *, from_start: bool = False, idempotency_key: str | None = None) -> JobResource:
        """Start a new job in place of one that failed or was canceled, from its last checkpoint or from the start.

        Safe against a broken connection, as `submit` is.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        parameters = {"from": "start"} if from_start else {}
        return self._transport.read(
            JobResource,
            "POST",
            _job_path(job_id, "retry"),
            idempotent=True,
            arguments=lambda: {"params": parameters, "headers": headers},
        )

    def delete(self, id_: str) -> None:
        """Delete a job that has ended, a model, a dataset or an artifact, whichever the id names.

        Raises ValueError for an id of another kind.
        """
        collection = next((name for prefix, name in _COLLECTIONS.items() if ids.is_id(id_, prefix)), None)
        if collection is None:
            raise ValueError(f"expected the id of a job, model, dataset or artifact; found {id_!r}")
        self._transport.request("DELETE", f"/v1/{collection}/{id_}", idempotent=True)

    def wait(
        self,
        job_id: str,
        *,
        timeout_seconds: float | None = None,
        on_update: Callable[[JobResource], None] | None = None,
        outage_seconds: float = 30.0,
    ) -> JobResource:
        """Follow the job to its end, through outages of the service no longer than `outage_seconds`.

        Raises `WaitTimeout` after `timeout_seconds`; the job itself goes on.
        """
        started = time.monotonic()
        last_answer: float | None = None  # a service that never answered is away, not restarting
        pause_seconds = FIRST_POLL_SECONDS
        while True:
            try:
                job = self.job(job_id)
                last_answer = time.monotonic()
            except ServiceUnavailable:
                if last_answer is None or time.monotonic() - last_answer > outage_seconds:
                    raise
            else:
                if on_update is not None:
                    on_update(job)
                if job.state.terminal:
                    return job
            if timeout_seconds is not None:
                left_seconds = started + timeout_seconds - time.monotonic()
                if left_seconds <= 0:
                    raise WaitTimeout(f"job {job_id} was not finished after {timeout_seconds:g} s; it goes on")
                pause_seconds = min(pause_seconds, left_seconds)
            time.sleep(pause_seconds)
            pause_seconds = min(max(pause_seconds, FIRST_POLL_SECONDS) * 1.2, POLL_SECONDS_MAX)

    def attempts(self, job_id: str) -> list[AttemptResource]:
        """Who has tried the job, and how each try ended."""
        return self._read(AttemptPage, _job_path(job_id, "attempts"), {}).items

    def workers(self, *, include_gone: bool = False) -> list[WorkerResource]:
        """The processes that run jobs; with `include_gone` those too that have stopped or fallen silent."""
        return self._read(WorkerPage, "/v1/workers", {"include_gone": "true"} if include_gone else {}).items

    def capabilities(self) -> Capabilities:
        """What the service can do, with the schema of the spec."""
        return self._read(Capabilities, "/v1/capabilities", {})

    def health(self) -> Health:
        """Readiness; a service that is up but cannot work says so with the status `unavailable`."""
        try:
            response = self._transport.http.get("/v1/health/ready")
        except httpx2.TransportError as error:
            raise self._transport.unavailable(error) from error
        if response.status_code not in {200, 503}:
            raise self._transport.refusal(response)
        return Health.model_validate_json(response.content)

    def _read(self, resource: type[R], path: str, parameters: Mapping[str, Any]) -> R:
        return self._transport.read(resource, "GET", path, idempotent=True, arguments=lambda: {"params": parameters})


def _job_path(job_id: str, part: str = "") -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}" + (f"/{part}" if part else "")


def _is_id(reference: Path | str, prefix: str) -> bool:
    return isinstance(reference, str) and ids.is_id(reference, prefix)


def _raw_body(path: Path, name: str | None) -> Callable[[], Mapping[str, Any]]:
    size, shown = path.stat().st_size, name or path.name
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(shown, safe='')}",
    }
    return lambda: {"content": transfers.read_chunks(path), "headers": headers}
