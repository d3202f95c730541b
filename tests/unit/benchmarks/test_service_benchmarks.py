from pathlib import Path

import pytest

from benchmarks import api, queue
from benchmarks.requests_per_second import get, post
from tests.unit.benchmarks.test_benchmarks import limits_of, only_run


def test_api_compares_with_a_bare_route(tmp_path: Path) -> None:
    assert api.main(["--quick", "--results", str(tmp_path)]) in {0, 1}
    run = only_run(tmp_path, "api")
    assert limits_of(run) == {"sqlite, running: ours / bare": 0.6, "sqlite, queued: ours / bare": 0.6}
    assert all(figure["median"] > 10 for figure in run["figures"].values())
    assert {name.rpartition(" ")[2] for name in run["figures"]} == {"bare", "ours"}


def test_queue_measures_rates_and_claims(tmp_path: Path) -> None:
    assert queue.main(["--quick", "--results", str(tmp_path)]) in {0, 1}
    run = only_run(tmp_path, "queue")
    assert limits_of(run) == {"claim at 50 / at 10": 1.5}
    assert set(run["figures"]) == {
        "postgresql: claim, 10 wait",
        "postgresql: claim, 50 wait",
        "postgresql: submitted, 1 process",
        "postgresql: submitted, 2 processes",
        "postgresql: claimed, 2 processes",
        "postgresql: POST /v1/jobs",
    }


def test_requests_are_whole() -> None:
    assert get("/a", "k").endswith(b"\r\nAuthorization: Bearer k\r\n\r\n")
    sent = post("/a", "k", b"{}")
    assert sent.startswith(b"POST /a HTTP/1.1\r\n")
    assert sent.endswith(b"Content-Length: 2\r\n\r\n{}")


def test_an_answer_that_is_no_200_ends_the_measurement(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    with api.served("bare", url, tmp_path / "bare") as port, pytest.raises(SystemExit, match="expected 200"):
        api.measure(port, [get("/nowhere", "k")], connections=1, seconds=0.1)
