"""The resources as they stand on the wire; the service writes them and the client reads them."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from service.contract.errors import Problem
from service.contract.events import Event, Progress
from service.contract.plan import LayerPlan, RankRow
from service.contract.states import AttemptOutcome, JobState


class Resource(BaseModel):
    """Base of what is answered; clients accept fields they do not know."""

    model_config = ConfigDict(extra="ignore")


class ModelResource(Resource):
    """An uploaded TorchScript file."""

    id: str
    name: str | None
    bytes: int
    sha256: str
    created_at: datetime


class DatasetResource(Resource):
    """An uploaded set of inputs, with or without targets."""

    id: str
    name: str | None
    format: str  # "npz", "safetensors" or "webdataset"
    bytes: int
    sha256: str
    created_at: datetime


class ResultSummary(Resource):
    """The few numbers of a report that a list or a script wants."""

    params_fraction: float
    macs_fraction: float
    file_bytes_fraction: float
    metric_name: str | None = None
    reference_metric: float | None = None
    compressed_metric: float | None = None
    metric_difference: float | None = None
    metric_difference_low: float | None = None
    metric_difference_high: float | None = None
    artifact_id: str | None = None
    artifact_sha256: str | None = None


class JobResource(Resource):
    """A job: one spec applied to one model.

    `queue_position` is its place among those that wait in its queue, 1 being the next. It is counted up to 1000; it is
    null beyond, and for a job that does not wait.
    """

    id: str
    name: str | None = None
    state: JobState
    phase: str | None
    queue: str = "cpu"
    priority: int = 0  # lower runs first
    retry_of: str | None = None
    progress: Progress
    queue_position: int | None = None
    cancel_requested: bool = False
    attempt: int
    model_id: str
    objective_model_id: str | None = None  # the module of its loss
    dataset_id: str | None
    requested_spec: dict[str, Any]
    spec: dict[str, Any]  # resolved: defaults filled in, every `auto` that is known by now replaced
    result: ResultSummary | None
    problem: Problem | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class AttemptResource(Resource):
    """One try of a job by one worker; `outcome` is null while it runs."""

    epoch: int
    worker_id: str
    host: str
    gpu: str | None
    started_at: datetime
    ended_at: datetime | None
    outcome: AttemptOutcome | None
    detail: str | None  # exit code, signal, or what else is known of the end


class AttemptPage(Resource):
    """The attempts of a job, oldest first."""

    items: list[AttemptResource]


class GpuResource(Resource):
    """A GPU of a worker."""

    uuid: str
    name: str | None = None
    memory_bytes: int | None = None


class WorkerResource(Resource):
    """A process that runs jobs; `busy` of its `slots` are taken."""

    id: str
    state: str  # "live" or "gone"
    host: str
    pid: int
    version: str
    queues: list[str]
    slots: int
    busy: int
    gpus: list[GpuResource]
    started_at: datetime
    last_seen_at: datetime
    gone_at: datetime | None


class WorkerPage(Resource):
    """The workers, oldest first."""

    items: list[WorkerResource]


class SubmissionCheck(Resource):
    """The answer of a dry run: the request would be accepted, and this is the spec that would run."""

    requested_spec: dict[str, Any]
    spec: dict[str, Any]


class ArtifactResource(Resource):
    """A file that a job produced."""

    id: str
    name: str
    format: str
    bytes: int
    sha256: str


class JobPage(Resource):
    """A page of jobs; `next_cursor` is null on the last one."""

    items: list[JobResource]
    next_cursor: str | None


class ModelPage(Resource):
    """A page of models; `next_cursor` is null on the last one."""

    items: list[ModelResource]
    next_cursor: str | None


class DatasetPage(Resource):
    """A page of datasets; `next_cursor` is null on the last one."""

    items: list[DatasetResource]
    next_cursor: str | None


class EventPage(Resource):
    """Events after a number; `next_after` is what to ask for next."""

    items: list[Event]
    next_after: int


class LayerPage(Resource):
    """The layer plan, and with `history=true` every rank configuration that stood."""

    items: list[LayerPlan]
    history: list[RankRow] | None = None


class ArtifactPage(Resource):
    """The artifacts of a job."""

    items: list[ArtifactResource]


class Health(Resource):
    """Readiness: `ready`, `degraded` (work is accepted, something is away) or `unavailable`."""

    status: str
    checks: dict[str, str] = {}


class Capabilities(Resource):
    """What this service can do."""

    version: str
    methods: list[str]
    terms: list[dict[str, Any]]
    layer_kinds: list[str]
    outputs: list[str]
    data_formats: list[str]
    devices: list[str]
    limits: dict[str, int]
    reason_codes: dict[str, str]
    error_codes: dict[str, str]
    spec_schema: dict[str, Any]
