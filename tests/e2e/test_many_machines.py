"""`serve`, `worker`, `migrate` and `keys` as an operator of several machines runs them, in processes of their own."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from installation import Fleet, Running
from sqlalchemy import select

from service.client import Client, ServiceProblem
from service.contract.errors import ErrorCode
from service.contract.resources import JobResource
from service.contract.states import JobState
from service.store.session import Database
from service.store.tables import Attempt, Job

LONG_SPEC = {
    "budget": {"max_macs_fraction": 0.5},
    "device": "cpu",
    "method": {"mu": {"steps": 500}},
    "training": {"epochs_per_step": 20},
}
NOT_ON_AN_API_MACHINE = ("torch", "worker", "numpy", "pynvml")
NOT_IN_A_SUPERVISOR = ("torch", "fastapi", "uvicorn", "prometheus_client")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, postgres_url: str, valkey_url: str) -> Iterator[Fleet]:
    made = Fleet.make(tmp_path_factory.mktemp("fleet"), postgres_url, valkey_url, "fleet")
    for command in ("serve", "worker"):
        refused = made.run(command)
        assert refused.returncode == 2
        assert "rankpress migrate" in refused.stderr
    assert made.run("migrate").returncode == 0
    yield made
    made.stop()


@pytest.fixture(scope="module")
def key(fleet: Fleet) -> str:
    keyless = fleet.run("serve", without=NOT_ON_AN_API_MACHINE)
    assert keyless.returncode == 2
    assert "rankpress keys add" in keyless.stderr
    made = fleet.run("keys", "add", "operator", without=NOT_ON_AN_API_MACHINE)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.fixture(scope="module")
def clients(fleet: Fleet, key: str) -> Iterator[list[Client]]:
    """Two APIs, each with a folder and a port of its own."""
    made = []
    for number in range(2):
        running = fleet.start(
            "serve", "--port", "0", "--data", f"api-{number}", says="API only.*", without=NOT_ON_AN_API_MACHINE
        )
        said = running.out.read_text()
        url = re.search(r"listens on (http://\S+)", said)
        assert url is not None
        assert "The API keys are those in the database: 1" in said
        made.append(Client(url[1], key))
    yield made
    for client in made:
        client.close()


def start_worker(fleet: Fleet, *arguments: str, **changes: str) -> Running:
    says, without = r"worker (wrk_\w+) is ready", NOT_IN_A_SUPERVISOR
    return fleet.start("worker", "--queue", "cpu", *arguments, says=says, without=without, **changes)


def submit(client: Client, model: Path, data: Path) -> JobResource:
    return client.submit(LONG_SPEC, model=str(model), data=str(data))


def job_row(fleet: Fleet, job_id: str) -> tuple[Job, list[Attempt]]:
    database = Database(fleet.environment["RANKPRESS_DATABASE_URL"])
    with database.read() as session:
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        attempts = list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.epoch)))
    database.dispose()
    return job, attempts


def wait_for_child(worker: Running) -> psutil.Process:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process(worker.process.pid).children():
            status = Path(f"/proc/{child.pid}/status").read_text()
            if "NoNewPrivs:\t1" in status:  # it has bound itself to its supervisor
                return child
        time.sleep(0.05)
    pytest.fail(f"no child was started:\n{worker.err.read_text()}")


def wait_for_step(client: Client, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while not (job := client.job(job_id)).progress.step:
        assert job.state in {JobState.QUEUED, JobState.RUNNING}, job.problem
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def test_apis_share_jobs_and_keys(fleet: Fleet, clients: list[Client], model_file: Path, data_file: Path) -> None:
    job = submit(clients[0], model_file, data_file)
    assert clients[1].job(job.id).state is JobState.QUEUED
    clients[1].cancel(job.id)
    assert not list(fleet.folder.glob("api-*/api-key"))
    with (
        Client(clients[1].base_url, "rp_unknown_key_of_enough_length") as stranger,
        pytest.raises(ServiceProblem) as refused,
    ):
        stranger.job(job.id)
    assert refused.value.problem.code is ErrorCode.UNAUTHENTICATED


def test_a_worker_starts_drains_and_ends(
    fleet: Fleet, clients: list[Client], model_file: Path, data_file: Path
) -> None:
    worker = start_worker(fleet, "--slots", "1", "--data", "first")
    assert "queues cpu; slots 1; no GPU" in worker.out.read_text()
    assert fleet.run("doctor", "--worker").returncode == 0
    job = submit(clients[0], model_file, data_file)
    wait_for_step(clients[0], job.id)
    asked = time.monotonic()
    assert worker.stop() == 0, worker.err.read_text()
    assert time.monotonic() - asked < 25
    row, attempts = job_row(fleet, job.id)
    assert (row.state, row.attempt) == (JobState.QUEUED, 0)
    assert [attempt.outcome for attempt in attempts] == ["drained"]
    clients[0].cancel(job.id)

    lines = [json.loads(line) for line in worker.err.read_text().splitlines()]
    assert all({"event", "level", "timestamp", "logger"} <= set(line) for line in lines)
    of_the_job = [line for line in lines if "job_id" in line]
    assert {line["event"] for line in of_the_job} >= {"attempt_started", "child_started", "attempt_ended"}
    assert {(line["job_id"], line["epoch"]) for line in of_the_job} == {(job.id, 1)}


def test_a_second_signal_ends_at_once(fleet: Fleet, clients: list[Client], model_file: Path, data_file: Path) -> None:
    worker = start_worker(fleet, "--data", "second", RANKPRESS_LOG_FORMAT="console")
    job = submit(clients[0], model_file, data_file)
    child = wait_for_child(worker)
    child.suspend()  # it can neither write its checkpoint nor end
    os.kill(worker.process.pid, signal.SIGTERM)
    worker.wait_for("a second signal ends at once")
    time.sleep(0.5)
    assert worker.process.poll() is None
    asked = time.monotonic()
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.process.wait(5) == 1
    assert time.monotonic() - asked < 5
    child.wait(5)
    assert "attempt_started" in worker.err.read_text()
    assert '"event"' not in worker.err.read_text()
    clients[0].cancel(job.id)


def test_a_worker_ends_although_the_broker_is_away(fleet: Fleet) -> None:
    waiting = fleet.start("worker", "--data", "third", says="", RANKPRESS_BROKER_URL="redis://127.0.0.1:9/0")
    deadline = time.monotonic() + 20
    while "127.0.0.1:9" not in waiting.err.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "127.0.0.1:9" in waiting.err.read_text()
    assert waiting.stop() == 0, waiting.err.read_text()


@pytest.mark.parametrize(
    ("arguments", "changes", "said", "code"),
    [
        ((), {"RANKPRESS_BROKER_URL": "memory://", "RANKPRESS_DATABASE_URL": ""}, "RANKPRESS_BROKER_URL", 2),
        (("--queue", "gpu"), {"CUDA_VISIBLE_DEVICES": ""}, "expected a GPU for the queue gpu", 2),
        ((), {"RANKPRESS_DATABASE_URL": "postgresql://127.0.0.1:9/nothing"}, "to answer; it does not", 5),
        ((), {"RANKPRESS_BLOB_URL": "file:///proc/blobs"}, "look at it with `rankpress doctor`", 5),
    ],
)
def test_what_a_worker_refuses(
    fleet: Fleet, arguments: tuple[str, ...], changes: dict[str, str], said: str, code: int
) -> None:
    refused = fleet.run("worker", *arguments, **changes)
    assert refused.returncode == code, refused.stderr
    assert said in " ".join(refused.stderr.split())


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_folder_that_is_not_mounted_is_refused_and_left_empty(fleet: Fleet, tmp_path: Path, command: str) -> None:
    changes = {"RANKPRESS_BLOB_URL": tmp_path.as_uri(), "RANKPRESS_API_KEY": "a-key-of-sixteen-characters"}
    refused = fleet.run(command, **changes)
    assert refused.returncode == 5, refused.stderr
    assert "is it mounted? Run `rankpress migrate` once where it is" in " ".join(refused.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_sqlite_serves_one_machine_and_says_so(fleet: Fleet) -> None:
    alone = {"RANKPRESS_DATABASE_URL": f"sqlite:///{fleet.folder}/alone.db", "RANKPRESS_BLOB_URL": ""}
    assert fleet.run("migrate", **alone).returncode == 0
    worker = start_worker(fleet, "--data", "alone", **alone)
    assert worker.stop() == 0
    assert "SQLite, which only the processes of this machine can share" in worker.err.read_text()
    assert "files are kept in" in worker.err.read_text()


def test_keys_come_and_go(fleet: Fleet, key: str, clients: list[Client]) -> None:
    second = fleet.run("keys", "add", "ci", "--owner", "builds").stdout.strip()
    twice = fleet.run("keys", "add", "ci")
    assert twice.returncode == 2
    assert "'ci'" in twice.stderr
    listed = json.loads(fleet.run("keys", "list", "--json").stdout)
    assert [(item["name"], item["owner"], item["revoked_at"]) for item in listed] == [
        ("operator", "default", None),
        ("ci", "builds", None),
    ]
    assert second not in json.dumps(listed)
    with Client(clients[0].base_url, second) as builds:
        assert not list(builds.jobs())
    assert fleet.run("keys", "revoke", second).returncode == 0  # by what leaked, when its name is not known
    shown = fleet.run("keys", "list").stdout
    assert re.search(r"^operator .* –$", shown, re.MULTILINE)
    assert re.search(r"^ci .* 20\S+$", shown, re.MULTILINE)
