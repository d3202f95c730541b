import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lstep, outcome, overhead, upload
from benchmarks.outcome import Limit, Sample


def only_run(folder: Path, name: str) -> dict[str, Any]:
    content = json.loads((folder / f"{name}.local.json").read_text())
    assert content["benchmark"] == name
    (run,) = content["runs"]
    assert run["quick"] is True
    assert {"cpu", "cores", "load_average_1_min", "python", "versions"} <= run["machine"].keys()
    for figure in run["figures"].values():
        assert min(figure["values"]) <= figure["median"] <= max(figure["values"])
    return run


def limits_of(run: dict[str, Any]) -> dict[str, float]:
    return {limit["name"]: limit["bound"] for limit in run["limits"]}


@pytest.fixture
def plain_executor() -> Any:
    """The engine's benchmark sets the process up as a child does; put it back for the tests that follow."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._C._set_graph_executor_optimize(True)


@pytest.mark.usefixtures("plain_executor")
def test_lstep_compares_three_loops(tmp_path: Path) -> None:
    assert lstep.main(["--quick", "--rounds", "2", "--threads", "1", "--results", str(tmp_path)]) in {0, 1}
    run = only_run(tmp_path, "lstep")
    loops = ("plain loop", "engine without penalty", "engine's L step")
    assert set(run["figures"]) == {f"{network}: {loop}" for network in ("resnet", "lenet300") for loop in loops}
    assert limits_of(run) == {"resnet: L step / plain loop": 1.05, "lenet300: L step / plain loop": 1.05}


def test_lstep_refuses_loops_that_do_other_work() -> None:
    lstep.require_same_work("network", [1.0, 1.0001, 1.0002])
    with pytest.raises(SystemExit, match="do not do the same work"):
        lstep.require_same_work("network", [1.0, 1.01])


def test_upload_measures_speed_and_memory(tmp_path: Path) -> None:
    arguments = ["--quick", "--rounds", "1", "--data", str(tmp_path), "--results", str(tmp_path / "results")]
    assert upload.main(arguments) in {0, 1}
    run = only_run(tmp_path / "results", "upload")
    assert limits_of(run) == {"growth of the service": 64.0, "speed of an upload / plain speed": 0.4}
    assert run["figures"]["resident size at most"]["median"] > 10
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "it left files on the disk"


def test_the_archive_has_exactly_the_size_asked_for(tmp_path: Path) -> None:
    assert upload.make_archive(tmp_path / "a.pt", 5_000_001).stat().st_size == 5_000_001


@pytest.mark.full  # a minute of whole jobs, of which the tests of the road from submit to artifact make others
def test_overhead_times_the_start_and_the_whole_job(tmp_path: Path) -> None:
    assert overhead.main(["--quick", "--starts", "1", "--results", str(tmp_path)]) in {0, 1}
    run = only_run(tmp_path, "overhead")
    by_hand = run["figures"]["the same processes by hand"]["median"]
    assert limits_of(run) == {
        "from 202 to running": 1.0,
        "a job through the service": pytest.approx(1.03 * by_hand + 1, abs=0.001),
    }


@pytest.mark.parametrize(
    ("measured", "at_least", "code"), [(1.0, False, 0), (1.1, False, 1), (1.1, True, 0), (0.9, True, 1)]
)
def test_a_missed_limit_is_said_last_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: float, at_least: bool, code: int
) -> None:
    limit = Limit("ratio", measured, 1.0, at_least=at_least)
    samples = [Sample("seconds", (1.0, 2.0, 4.0))]
    assert outcome.conclude("some", samples, [limit], quick=True, facts={}, folder=tmp_path) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"ratio {measured:.3f} (at {'least' if at_least else 'most'} 1: {'MISSED' if code else 'kept'})"


def test_runs_are_added_up(tmp_path: Path) -> None:
    for _ in range(2):
        outcome.conclude("some", [Sample("seconds", (1.0,))], [], quick=False, facts={}, folder=tmp_path)
    assert len(json.loads((tmp_path / "some.json").read_text())["runs"]) == 2
