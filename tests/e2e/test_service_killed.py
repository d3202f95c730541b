"""The service is killed, and jobs are canceled, while the real engine is at work."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bad_models
import psutil
import pytest
from served import Service

from service.client import Client
from service.contract.resources import JobResource
from service.contract.states import JobState, Phase

WAIT_SECONDS = 120
ORPHAN_SECONDS = 2
REQUEUE_SECONDS = 6  # the service's own start included; the lease would hold the job for half a minute
CANCEL_SECONDS = 10  # promised within 5; the test's machine may be busy
STEPS = 18
# Many cheap steps, a checkpoint after nearly each of them.
MANY_STEPS: dict[str, Any] = {
    "budget": {"max_params_fraction": 0.5},
    "method": {"mu": {"steps": STEPS}},
    "training": {"epochs_per_step": 6, "batch_size": 32, "optimizer": {"lr": 0.02}},
    "fine_tune": {"epochs": 2},
    "device": "cpu",
}
ENDLESS_LEARNING = MANY_STEPS | {"training": MANY_STEPS["training"] | {"epochs_per_step": 10_000}}
ENDLESS_TUNING = MANY_STEPS | {
    "method": {"mu": {"steps": 1}},
    "training": MANY_STEPS["training"] | {"epochs_per_step": 1},
    "fine_tune": {"epochs": 10_000},
}


# Phases and progress are told with heartbeats; cancels at those of production are in crash/test_cancel_latency.py.
OFTEN = {"CHECKPOINT_SECONDS": "0.1", "HEARTBEAT_SECONDS": "0.5"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"), settings=OFTEN)
    made.start()
    yield made
    assert made.stop() == 0


def client_of(service: Service) -> Client:
    return Client(service.url, service.key)


def wait_until(client: Client, job_id: str, reached: Callable[[JobResource], bool]) -> JobResource:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        job = client.job(job_id)
        if reached(job):
            return job
        assert not job.state.terminal, job.problem
        time.sleep(0.02)
    pytest.fail(f"the job did not come so far: {client.job(job_id)}")


def children_of(service: Service) -> list[psutil.Process]:
    assert service.process is not None
    return psutil.Process(service.process.pid).children(recursive=True)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def artifact_of(client: Client, job_id: str) -> str:
    return next(artifact.sha256 for artifact in client.artifacts(job_id) if artifact.format == "torchscript")


def steps_of(client: Client, job_id: str) -> list[int]:
    return [event.data["step"] for event in client.events(job_id) if event.kind == "step"]


@pytest.fixture(scope="module")
def undisturbed(service: Service, model_file: Path, data_file: Path) -> str:
    """A job that nothing happened to."""
    with client_of(service) as client:
        job = client.submit(MANY_STEPS, model=model_file, data=data_file)
        assert client.wait(job.id, timeout_seconds=WAIT_SECONDS).state is JobState.SUCCEEDED
        return job.id


def test_a_killed_job_goes_on_and_yields_the_same_artifact(
    service: Service, model_file: Path, data_file: Path, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with client_of(service) as client:
        job = client.submit(MANY_STEPS, model=model_file, data=data_file, name="survivor")
        # Events come as they happen, phases and progress with the next heartbeat.
        wait_until(client, job.id, lambda _: len(steps_of(client, job.id)) >= STEPS // 3)
        before = list(client.events(job.id))
        assert max(steps_of(client, job.id)) < STEPS
    children = children_of(service)
    assert children, "the job runs in a process of its own"
    service.kill()
    killed_at = time.monotonic()
    while not all(gone(child) for child in children):
        assert time.monotonic() < killed_at + ORPHAN_SECONDS, "a child lives on"
        time.sleep(0.01)

    service.start()
    restarted_at = time.monotonic()
    with client_of(service) as client:
        wait_until(client, job.id, lambda now: now.state is JobState.RUNNING and bool(children_of(service)))
        requeued_seconds = time.monotonic() - restarted_at
        ended = client.wait(job.id, timeout_seconds=WAIT_SECONDS)
        assert ended.state is JobState.SUCCEEDED, ended.problem
        assert ended.name == "survivor"
        after = list(client.events(job.id))
        assert after[: len(before)] == before
        assert [event.id for event in after] == list(range(after[0].id, after[0].id + len(after)))
        steps = steps_of(client, job.id)
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        assert len(steps) <= STEPS + 2, "it went on from a checkpoint, not from the start"
        assert artifact_of(client, job.id) == artifact_of(client, undisturbed)
    with capsys.disabled():
        print(f"\ntaken up {requeued_seconds:.1f} s after the start, {len(steps) - STEPS} steps repeated")
    assert requeued_seconds < REQUEUE_SECONDS


def test_a_retry_goes_on_from_the_checkpoint_and_yields_the_same_artifact(
    service: Service, model_file: Path, data_file: Path, undisturbed: str
) -> None:
    with client_of(service) as client:
        first = client.submit(MANY_STEPS, model=model_file, data=data_file, name="again")
        wait_until(client, first.id, lambda _: len(steps_of(client, first.id)) >= STEPS // 3)
        client.cancel(first.id)
        assert client.wait(first.id, timeout_seconds=WAIT_SECONDS).state is JobState.CANCELED
        job = client.retry(first.id)
        assert (job.retry_of, job.name) == (first.id, "again")
        ended = client.wait(job.id, timeout_seconds=WAIT_SECONDS)
        assert ended.state is JobState.SUCCEEDED, ended.problem
        steps = steps_of(client, job.id)
        assert steps[0] > 1, "it went on from a checkpoint, not from the start"
        assert steps[-1] == STEPS
        histories = [client.layers(one, history=True).history for one in (job.id, undisturbed)]
        assert histories[0] == histories[1]
        assert artifact_of(client, job.id) == artifact_of(client, undisturbed)


@pytest.fixture(scope="module")
def endless_forward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "endless.pt"
    return bad_models.write(path, bad_models.scripted(bad_models.LoopsForever()))


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.INSPECTING, Phase.LEARNING, Phase.FINE_TUNING])
def test_cancel_ends_a_job_within_seconds(
    service: Service,
    model_file: Path,
    endless_forward: Path,
    data_file: Path,
    phase: Phase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = endless_forward if phase == Phase.INSPECTING else model_file
    spec = ENDLESS_TUNING if phase == Phase.FINE_TUNING else ENDLESS_LEARNING
    with client_of(service) as client:
        job = client.submit(spec, model=model, data=data_file)
        wait_until(client, job.id, lambda now: now.state is JobState.RUNNING and now.phase == phase)
        asked_at = time.monotonic()
        client.cancel(job.id)
        ended = client.wait(job.id, timeout_seconds=CANCEL_SECONDS)
        seconds = time.monotonic() - asked_at
        assert ended.state is JobState.CANCELED
        assert ended.problem is None
    assert not [child for child in children_of(service) if not gone(child)]
    with capsys.disabled():
        print(f"\ncanceled while {phase.value}: {seconds:.1f} s")


def test_a_waiting_job_is_canceled_at_once(service: Service, model_file: Path, data_file: Path) -> None:
    with client_of(service) as client:
        running = client.submit(ENDLESS_LEARNING, model=model_file, data=data_file)
        wait_until(client, running.id, lambda now: now.state is JobState.RUNNING)
        waiting = client.submit(ENDLESS_LEARNING, model=model_file, data=data_file)
        assert client.job(waiting.id).state is JobState.QUEUED
        assert client.cancel(waiting.id).state is JobState.CANCELED
        assert client.cancel(waiting.id).state is JobState.CANCELED, "it may be asked twice"
        client.cancel(running.id)
        assert client.wait(running.id, timeout_seconds=WAIT_SECONDS).state is JobState.CANCELED
        assert client.wait(waiting.id).state is JobState.CANCELED
