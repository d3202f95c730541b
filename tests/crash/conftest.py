import sys
from collections.abc import Callable, Iterator
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
def real_job(tmp_path_factory: pytest.TempPathFactory) -> "RealJob":
    """A small network, data that it can learn, and a spec of seconds, for the real engine."""
    from real_jobs import make_real_job

    return make_real_job(tmp_path_factory.mktemp("real"))
