"""Every knob of the service, read from the environment (`RANKPRESS_…`) when a `Settings` is made."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIN_API_KEY_LENGTH = 16
MEMORY_SHARE = 0.8  # of the machine's memory that all children together may use
EMBEDDED_BROKER = "memory://"
DATABASE_FILE = "rankpress.db"
QUEUES = ("gpu", "cpu")  # in the order in which a worker of both looks for work

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def default_data_dir() -> Path:
    """Where an embedded service keeps its data if it is told nothing: the user's data directory."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "rankpress"


def machine_memory_bytes() -> int:
    """The memory of this machine, or of this container if that has less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


class Settings(BaseSettings):
    """One object holds every setting; it is passed on, never imported."""

    model_config = SettingsConfigDict(
        env_prefix="RANKPRESS_", extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    # Where things are.
    data_dir: Path = Field(default_factory=default_data_dir)
    """Directory of the embedded service: database, blobs, key and scratch files."""
    database_url: str = ""
    """SQLAlchemy URL of the database; empty: SQLite in the data directory."""
    broker_url: str = EMBEDDED_BROKER
    """Celery's broker; the default is the embedded mode, one process."""
    blob_url: str = ""
    """Where files are kept; empty: `blobs` in the data directory."""
    worker_queues: str = ""
    """Queues that a worker serves: `cpu`, `gpu`, `gpu,cpu`; empty: both when embedded, else cpu, and gpu with a GPU."""
    cache_bytes: PositiveInt = 32 * GIB
    """Most bytes of the files that a worker keeps of an object store."""
    database_timeout_seconds: PositiveFloat = 10.0
    """A statement, or a connection that says nothing, is given up after so long; PostgreSQL only."""

    # The HTTP edge.
    host: str = "127.0.0.1"
    """Address that `rankpress serve` listens on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port that `rankpress serve` listens on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """A key that always works, at least 16 characters; an embedded service without it makes one in its data folder."""
    owner: str = "default"
    """Whom the configured key belongs to."""

    # Limits of what is taken in.
    max_model_bytes: PositiveInt = 4 * GIB
    """Largest model file."""
    max_dataset_bytes: PositiveInt = 16 * GIB
    """Largest dataset file."""
    max_spec_bytes: PositiveInt = MIB
    """Largest job spec."""
    max_body_bytes: PositiveInt = MIB
    """Largest body of every route that takes no file."""
    max_archive_entries: PositiveInt = 100_000
    """Most members of a model's archive."""
    upload_idle_seconds: PositiveFloat = 60.0
    """An upload that sends nothing for so long is ended."""
    upload_block_bytes: PositiveInt = 4 * MIB
    """Size of the blocks in which an upload is hashed and written."""
    download_block_bytes: PositiveInt = MIB
    """Size of the blocks in which a download is read."""

    # Leases (design section 4): heartbeat < self-fence < lease < reap.
    heartbeat_seconds: PositiveFloat = 2.0
    """How often a running attempt renews its lease."""
    self_fence_seconds: PositiveFloat = 20.0
    """Without a confirmed heartbeat for so long a worker kills its own child."""
    lease_seconds: PositiveFloat = 30.0
    """How long a lease holds after a heartbeat."""
    reap_seconds: PositiveFloat = 40.0
    """How long after the last heartbeat a job is taken from its worker."""
    reconcile_seconds: PositiveFloat = 5.0
    """How often the reconciler looks for what is stuck."""
    worker_gone_seconds: PositiveFloat = 60.0
    """A worker not seen for so long is shown as gone; more than two heartbeats."""
    worker_deaf_seconds: PositiveFloat = 60.0
    """An idle worker that heard no bell although jobs have waited for so long ends itself, to be started again."""
    orphan_seconds: PositiveFloat = 24 * 3600.0
    """Age at which files that no row names are deleted; at least twice `RANKPRESS_REAP_SECONDS`."""
    idempotency_in_flight_seconds: PositiveFloat = 3600.0
    """After so long an unfinished idempotency key is free again."""
    idempotency_keep_seconds: PositiveFloat = 7 * 24 * 3600.0
    """How long a finished idempotency key is remembered."""
    key_cache_seconds: float = Field(default=10.0, ge=0, le=10)
    """How long the answer to an API key is remembered; a revoked key is refused after so long at the latest."""

    # Retention; None keeps for ever. What is in use is never deleted.
    job_keep_seconds: PositiveFloat | None = None
    """Age after its end at which a job is deleted with its history and artifacts."""
    model_keep_seconds: PositiveFloat | None = None
    """Age at which a model that no job waits for or runs on is deleted."""
    dataset_keep_seconds: PositiveFloat | None = None
    """Age at which a dataset that no job waits for or runs on is deleted."""
    artifact_keep_seconds: PositiveFloat | None = None
    """Age at which an artifact is deleted; its job stays."""
    checkpoint_keep_seconds: PositiveFloat = 7 * 24 * 3600.0
    """How long the checkpoints of a failed or canceled job are kept, from which a retry goes on."""
    worker_keep_seconds: PositiveFloat = 7 * 24 * 3600.0
    """How long a worker that is gone is still listed."""

    # Attempts.
    max_attempts: PositiveInt = 3
    """Tries without a new checkpoint before a job fails as WORKER_LOST."""
    retry_base_seconds: float = Field(default=2.0, ge=0)
    """Wait before the second try; it grows fourfold with each further one."""
    retry_cap_seconds: float = Field(default=600.0, ge=0)
    """Longest wait before a try."""
    cancel_grace_seconds: PositiveFloat = 5.0
    """How long a canceled child may take to end before it is killed."""
    drain_grace_seconds: PositiveFloat = 25.0
    """How long children may take when their worker is asked to stop."""

    # What a child may use.
    run_seconds_max: PositiveFloat = 7 * 24 * 3600.0
    """Longest run of a job whose spec sets no `deadlines.run_seconds`."""
    first_forward_seconds: PositiveFloat = 60.0
    """Longest first forward pass of a model whose spec sets none."""
    slots: PositiveInt | None = None
    """Jobs that run at once on this machine; empty: one for each GPU that is served, or one."""
    threads: PositiveInt | None = None
    """Threads of each job; empty: cores divided by slots."""
    child_memory_bytes: PositiveInt | None = None
    """Memory of each job; empty: 80 % of the machine's, divided by slots."""
    checkpoint_seconds: float = Field(default=300.0, ge=0)
    """Longest time without a checkpoint; within a long step too."""
    checkpoint_spacing_seconds: float = Field(default=30.0, ge=0)
    """Least time between two checkpoints at the ends of steps."""

    # Pages.
    page_size: PositiveInt = 50
    """Items of a page where a request says none."""
    max_page_size: PositiveInt = 200
    """Most items of a page."""
    event_page_size: PositiveInt = 200
    """Events of a page where a request says none."""
    max_event_page_size: PositiveInt = 1000
    """Most events of a page."""

    log_level: str = "INFO"
    """Least level of log lines."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """How log lines look; auto: for people on a terminal, JSON elsewhere."""
    min_free_bytes: PositiveInt = GIB
    """`rankpress doctor` complains of a disk with less room."""

    @field_validator("api_key", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("api_key")
    @classmethod
    def _key_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < MIN_API_KEY_LENGTH:
            raise ValueError(
                f"RANKPRESS_API_KEY must have at least {MIN_API_KEY_LENGTH} characters; "
                f"found {len(value.get_secret_value())}: choose a longer one"
            )
        return value

    @field_validator("worker_queues")
    @classmethod
    def _queues_are_known(cls, value: str) -> str:
        named = [name.strip() for name in value.split(",") if name.strip()]
        if unknown := [name for name in named if name not in QUEUES]:
            raise ValueError(f"expected cpu, gpu or gpu,cpu; found {', '.join(unknown)}")
        return ",".join(name for name in QUEUES if name in named)

    @model_validator(mode="after")
    def _leases_are_ordered(self) -> Self:
        order = (self.heartbeat_seconds, self.self_fence_seconds, self.lease_seconds, self.reap_seconds)
        if not all(earlier < later for earlier, later in pairwise(order)):
            raise ValueError(
                "expected heartbeat_seconds < self_fence_seconds < lease_seconds < reap_seconds; "
                f"found {' , '.join(map(str, order))}: a child must be dead before its job can be claimed again"
            )
        return self

    @model_validator(mode="after")
    def _waits_outlast_what_they_wait_for(self) -> Self:
        if not self.worker_gone_seconds > 2 * self.heartbeat_seconds:
            raise ValueError(
                "expected worker_gone_seconds > 2 * heartbeat_seconds; "
                f"found {self.worker_gone_seconds} and {self.heartbeat_seconds}: a worker that lives would be taken "
                "for gone between two heartbeats; raise worker_gone_seconds"
            )
        if not self.worker_deaf_seconds > 2 * self.reconcile_seconds:
            raise ValueError(
                "expected worker_deaf_seconds > 2 * reconcile_seconds; "
                f"found {self.worker_deaf_seconds} and {self.reconcile_seconds}: a worker would end itself before a "
                "lost bell has been rung again; raise worker_deaf_seconds"
            )
        if not self.orphan_seconds >= 2 * self.reap_seconds:
            raise ValueError(
                "expected orphan_seconds >= 2 * reap_seconds; "
                f"found {self.orphan_seconds} and {self.reap_seconds}: a file whose row is about to be written would "
                "be deleted; raise orphan_seconds"
            )
        return self

    @model_validator(mode="after")
    def _memory_broker_means_one_process(self) -> Self:
        if self.embedded and self.database_url and not self.database_url.startswith("sqlite"):
            raise ValueError(
                "expected RANKPRESS_BROKER_URL beside a RANKPRESS_DATABASE_URL of several machines; found the "
                "in-process broker memory://: set RANKPRESS_BROKER_URL to a redis:// URL"
            )
        return self

    @property
    def embedded(self) -> bool:
        """Whether API and worker are one process with an in-memory broker."""
        return self.broker_url.startswith(EMBEDDED_BROKER)

    @property
    def resolved_database_url(self) -> str:
        """The database URL with its default, and with the driver that the store uses."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir.absolute() / DATABASE_FILE}"
        scheme, separator, rest = self.database_url.partition("://")
        driver = "postgresql+psycopg" if scheme in {"postgres", "postgresql"} else scheme
        return f"{driver}{separator}{rest}"

    @property
    def resolved_blob_url(self) -> str:
        """The blob store's URL with its default."""
        return self.blob_url or (self.data_dir.absolute() / "blobs").as_uri()

    @property
    def scratch_dir(self) -> Path:
        """Where attempts work; its files mean nothing without a row."""
        return self.data_dir / "scratch"

    @property
    def cache_dir(self) -> Path:
        """Where a worker keeps files of an object store."""
        return self.data_dir / "cache"

    @property
    def key_file(self) -> Path:
        """Where the embedded service keeps the key it made."""
        return self.data_dir / "api-key"

    @property
    def lock_file(self) -> Path:
        """The file whose lock holds the data directory for one process."""
        return self.data_dir / "lock"

    def threads_per_child(self, slot_count: int) -> int:
        """How many threads a child computes with."""
        if self.threads is not None:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // slot_count)

    def memory_per_child_bytes(self, slot_count: int) -> int:
        """How much memory a child may use."""
        if self.child_memory_bytes is not None:
            return self.child_memory_bytes
        return int(machine_memory_bytes() * MEMORY_SHARE / slot_count)
