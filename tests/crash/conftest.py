import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fleet import Fleet, RealJob

sys.path[:0] = [str(Path(__file__).parents[1] / "worker"), str(Path(__file__).parent)]


@pytest.fixture
def make_fleet(postgres_url: str, tmp_path: Path) -> Iterator[Callable[..., "Fleet"]]:
    """Make installations whose processes all end with the test."""
    from fleet import Fleet

    fleets: list[Fleet] = []

    def make(*arguments: Any, **options: Any) -> "Fleet":
        fleets.append(Fleet(tmp_path / f"fleet-{len(fleets)}", postgres_url, *arguments, **options))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "of-the-run"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def real_job(of_the_run: Path) -> "RealJob":
    """A small network, data that it can learn, and a spec of seconds, for the real engine.

    Made once for all processes: a model that is scripted again has other bytes, and so has what is made of it.
    """
    from real_jobs import make_real_job, read_real_job

    with _alone(of_the_run):
        return read_real_job(of_the_run) or make_real_job(of_the_run)


@pytest.fixture(scope="session")
def undisturbed_artifact(
    of_the_run: Path, tmp_path_factory: pytest.TempPathFactory, postgres_url: str, real_job: "RealJob"
) -> str:
    """The SHA-256 of what the real job yields when nothing is killed; found once for all processes."""
    found = of_the_run / "undisturbed-artifact"
    with _alone(of_the_run):
        if not found.exists():
            found.write_text(_run_undisturbed(tmp_path_factory.mktemp("undisturbed") / "fleet", postgres_url, real_job))
    return found.read_text()


def _run_undisturbed(folder: Path, postgres_url: str, real_job: "RealJob") -> str:
    from fleet import Fleet

    fleet = Fleet(folder, postgres_url, {})  # at production timings, without extra checkpoints
    try:
        fleet.add_service()
        fleet.add_machine()
        job_id = fleet.submit(real_job)
        fleet.wait_for_end([job_id], 180)
        fleet.check([job_id])
        assert len(fleet.attempts(job_id)) == 1
        return fleet.artifact(job_id)
    finally:
        fleet.close()
