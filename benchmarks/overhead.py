"""What does the service add to a job?

From the 202 to `running` at most 1 s on an idle worker (median; counted from the commit before the 202, for a job may
run before its answer has reached the client), and a whole job at most 3 % + 1 s longer than the same
learning, emission and verification processes started by hand with the same assignment. Both ways run in turn, on
scikit-learn's handwritten digits; times of the service are those of the job's own events.
"""

import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.by_hand import run_stages
from benchmarks.networks import DigitsNet
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.served import Served, served
from service.client.api import Client
from service.contract.events import EventKind
from service.contract.resources import JobResource
from service.contract.states import JobState
from service.settings import Settings

START_SECONDS_MAX = 1.0
SHARE_MAX, EXTRA_SECONDS_MAX = 1.03, 1.0
STARTS, STARTS_QUICK = 10, 2
ROUNDS, ROUNDS_QUICK = 5, 1
JOB_SECONDS_MAX = 900.0

SMALL_SPEC = {"budget": {"max_params_fraction": 0.5}, "example_inputs": [{"shape": [1, 1, 8, 8]}]}
SPEC = {"budget": {"max_macs_fraction": 0.3}, "method": {"type": "learning_compression", "mu": {"steps": 25}}}
SPEC_QUICK = {
    "budget": {"max_macs_fraction": 0.3},
    "method": {"type": "learning_compression", "mu": {"steps": 2}},
    "training": {"epochs_per_step": 1},
    "fine_tune": {"epochs": 1},
}


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("overhead", __doc__)
    options.add_argument("--data", type=Path, metavar="NPZ", help="inputs of 1×8×8 and targets  [default: the digits]")
    options.add_argument(
        "--starts", type=int, help=f"small jobs, for the time from 202 to running  [default: {STARTS}]"
    )
    options.add_argument("--rounds", type=int, help=f"whole jobs each way  [default: {ROUNDS}]")
    given = options.parse_args(arguments)
    starts = given.starts or (STARTS_QUICK if given.quick else STARTS)
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    spec = SPEC_QUICK if given.quick else SPEC
    with tempfile.TemporaryDirectory(prefix="rankpress-overhead-") as name:
        folder = Path(name)
        model = make_network(folder / "digits.pt", 4 if given.quick else 32)
        data = given.data or make_digits(folder / "digits.npz", 200 if given.quick else None)
        with served(folder) as service, service.client() as client:
            waits = time_starts(client, model, starts)
            through, by_hand = time_jobs(service, client, folder, model, data, spec, rounds)
    samples = [
        Sample("from 202 to running", tuple(waits)),
        Sample("job through the service", tuple(through)),
        Sample("the same processes by hand", tuple(by_hand)),
        Sample("longer than by hand", tuple(a - b for a, b in zip(through, by_hand, strict=True))),
    ]
    allowed = SHARE_MAX * median(by_hand) + EXTRA_SECONDS_MAX
    limits = [
        Limit("from 202 to running", median(waits), START_SECONDS_MAX, "s"),
        Limit("a job through the service", median(through), round(allowed, 3), "s"),
    ]
    return conclude("overhead", samples, limits, quick=given.quick, facts={"spec": spec}, folder=given.results)


def time_starts(client: Client, model: Path, count: int) -> list[float]:
    """Seconds from the event that says queued to the one that says running, one job after the other."""
    model_id = client.upload_model(model).id
    waits = []
    for number in range(count):
        say(f"small job {number + 1} of {count}")
        job = client.submit(SMALL_SPEC, model=model_id)
        require_success(client.wait(job.id, timeout_seconds=JOB_SECONDS_MAX))
        queued, running = (moment(client, job.id, state) for state in (JobState.QUEUED, JobState.RUNNING))
        waits.append((running - queued).total_seconds())
    return waits


def time_jobs(
    service: Served, client: Client, folder: Path, model: Path, data: Path, spec: Mapping[str, Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of the job through the service, from the request to its last event, and by hand; in turn."""
    model_id, dataset_id = client.upload_model(model).id, client.upload_dataset(data).id
    settings = Settings(data_dir=service.data_dir)
    through: list[float] = []
    by_hand: list[float] = []
    for number in range(rounds):
        say(f"job {number + 1} of {rounds}, through the service and by hand")
        asked = datetime.now(UTC)
        job = client.submit(spec, model=model_id, data=dataset_id)
        require_success(client.wait(job.id, timeout_seconds=JOB_SECONDS_MAX))
        through.append((moment(client, job.id, JobState.SUCCEEDED) - asked).total_seconds())
        by_hand.append(
            run_stages(
                model,
                data,
                spec,
                folder / f"by-hand-{number}",
                settings.threads_per_child(1),
                settings.memory_per_child_bytes(1),
            )
        )
    return through, by_hand


def moment(client: Client, job_id: str, state: JobState) -> datetime:
    """When the job entered a state, by the database's clock, which is this machine's."""
    for event in client.events(job_id):
        if event.kind == EventKind.STATE and event.data.get("state") == state:
            return event.created_at
    raise SystemExit(f"the job {job_id} has no event that says {state}")


def require_success(job: JobResource) -> None:
    """A failed job measures nothing."""
    if job.state != JobState.SUCCEEDED:
        raise SystemExit(f"the job {job.id} is {job.state}: {job.problem.detail if job.problem else 'no problem told'}")


def make_network(path: Path, width: int) -> Path:
    """An untrained network; a job takes no longer for it."""
    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(DigitsNet(width)), str(path))
    return path


def make_digits(path: Path, count: int | None) -> Path:
    """The handwritten digits as 1×8×8 images from 0 to 1."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    inputs = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(path, inputs=inputs[:count], targets=targets.astype(np.int64)[:count])
    return path


if __name__ == "__main__":
    sys.exit(main())
