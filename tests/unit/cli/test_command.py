import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from stub_service import CONTENT, KEY, StubService

from service.cli import services_file
from service.cli.command import run
from service.cli.exits import ExitCode
from service.contract.errors import ErrorCode
from service.contract.states import JobState


@pytest.fixture
def compress(stub: StubService, model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on a model file, with a budget unless the test gives its own."""

    def call(*more: str, size: tuple[str, ...] = ("--max-macs-fraction", "0.3")) -> int:
        return run(["compress", str(model), *size, "--output", str(tmp_path / "small.pt"), *more])

    return call


def cases(path: Path) -> dict[str, str]:
    """Name and outcome of each JUnit case."""
    found = ET.parse(path).getroot().iter("testcase")
    kinds = ("failure", "error", "skipped")
    return {
        case.attrib["name"]: next((kind for kind in kinds if case.find(kind) is not None), "passed") for case in found
    }


def test_compress_ends_with_file_and_table(
    compress: Callable[..., int], stub: StubService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress("--junit", str(tmp_path / "j.xml"), "--report", str(tmp_path / "r.json")) == ExitCode.DONE
    shown = capsys.readouterr()
    assert (tmp_path / "small.pt").read_bytes() == CONTENT
    assert stub.submissions[0]["spec"] == {"budget": {"max_macs_fraction": 0.3}}
    for text in (
        "-0.50 points  [-1.20, +0.20] at 95 %, n = 400",
        "150.0 %  slower than the reference",
        "channel rank 2 + spatial rank 1",
        "NOT_CHEAPER",
        "warning: SLOWER",
        "reached 350",
    ):
        assert text in shown.out
    assert set(cases(tmp_path / "j.xml").values()) == {"passed"}
    assert json.loads((tmp_path / "r.json").read_text())["macs_fraction"] == pytest.approx(1 / 3)


def test_json_is_alone_on_standard_output(
    compress: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert compress("--json") == ExitCode.DONE
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["exit_code"] == 0
    assert document["job"]["state"] == "succeeded"
    assert document["artifact"]["path"] == str(tmp_path / "small.pt")
    assert "learning" in shown.err


@pytest.mark.parametrize(
    ("end", "code", "exit_code", "case"),
    [
        (JobState.FAILED, ErrorCode.DIVERGED, ExitCode.FAILED, "job succeeded"),
        (JobState.CANCELED, None, ExitCode.FAILED, "job succeeded"),
        (JobState.FAILED, ErrorCode.CONSTRAINT_UNREACHABLE, ExitCode.BUDGET_MISSED, "budget met"),
        (JobState.FAILED, ErrorCode.TIMEOUT, ExitCode.TIMEOUT, "job succeeded"),
    ],
)
def test_a_job_that_ends_badly(
    compress: Callable[..., int],
    stub: StubService,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    end: JobState,
    code: ErrorCode | None,
    exit_code: ExitCode,
    case: str,
) -> None:
    stub.end, stub.code = end, code
    assert compress("--json", "--junit", str(tmp_path / "j.xml")) == exit_code
    outcomes = cases(tmp_path / "j.xml")
    assert outcomes.pop(case) == "failure"
    assert set(outcomes.values()) == {"skipped"}
    assert json.loads(capsys.readouterr().out)["exit_code"] == exit_code
    assert not (tmp_path / "small.pt").exists()


def test_a_missed_budget_is_seen_in_the_report_too(compress: Callable[..., int], stub: StubService) -> None:
    stub.reached = 351
    assert compress() == ExitCode.BUDGET_MISSED


def test_a_damaged_download_fails(compress: Callable[..., int], stub: StubService, tmp_path: Path) -> None:
    stub.damage = True
    assert compress("--junit", str(tmp_path / "j.xml")) == ExitCode.FAILED
    assert cases(tmp_path / "j.xml")["artifact verified"] == "failure"


def test_out_of_time(compress: Callable[..., int], stub: StubService, capsys: pytest.CaptureFixture[str]) -> None:
    stub.steps = -1
    assert compress("--timeout", "0.3") == ExitCode.TIMEOUT
    assert f"rankpress watch {stub.job_id}" in capsys.readouterr().err
    assert not stub.canceled


def test_service_away(
    compress: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKPRESS_URL", "http://127.0.0.1:9")
    assert compress("--json", "--junit", str(tmp_path / "j.xml")) == ExitCode.SERVICE_AWAY
    assert cases(tmp_path / "j.xml")["job succeeded"] == "error"
    assert json.loads(capsys.readouterr().out)["problem"]["code"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    "size",
    [
        (),
        ("--max-macs-fraction", "1.5"),
        ("--max-macs-fraction", "0.3", "--lambda", "1"),
        ("--max-macs-fraction", "0.3", "--max-params", "9"),
        ("--max-macs", "many"),
        ("--spec", "nowhere.json"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_without_upload(
    compress: Callable[..., int], stub: StubService, size: tuple[str, ...]
) -> None:
    assert compress(size=size) == ExitCode.USAGE
    assert stub.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "nowhere.pt", "--max-params", "9"],
        ["nonsense"],
        ["watch"],
        ["watch", "job_unknown"],
        ["jobs", "--url", "no-address"],
        ["submit", "nowhere.pt", "--max-params", "9", "--json"],
    ],
)
def test_usage(stub: StubService, arguments: list[str]) -> None:
    assert run(arguments) == ExitCode.USAGE


def test_an_output_that_cannot_be_written_is_refused_first(stub: StubService, model: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(model), "--max-params", "9", "--output", str(tmp_path / "no" / "small.pt")]
    assert run(arguments) == ExitCode.USAGE
    assert stub.requests == []


def test_options_stand_above_the_spec_file(compress: Callable[..., int], stub: StubService, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("method: {mu: {initial: 1e-3, steps: 5}, lambda: 2.0}\nseed: 1\n")
    assert compress("--spec", str(spec), "--seed", "7") == ExitCode.DONE
    assert stub.submissions[0]["spec"] == {
        "method": {"mu": {"initial": 0.001, "steps": 5}},
        "seed": 7,
        "budget": {"max_macs_fraction": 0.3},
    }


def test_the_parts_of_the_trip(
    stub: StubService, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["submit", str(model), "--lambda", "0.5"]) == ExitCode.DONE
    assert capsys.readouterr().out.strip() == stub.job_id
    assert run(["watch", stub.job_id]) == ExitCode.DONE
    assert "features.0" in capsys.readouterr().out
    assert run(["fetch", stub.job_id, "-o", str(tmp_path / "out.pt")]) == ExitCode.DONE
    assert (tmp_path / "out.pt").read_bytes() == CONTENT
    assert run(["jobs", "--limit", "2"]) == ExitCode.DONE
    assert capsys.readouterr().out.count(stub.job_id) == 2
    assert run(["inspect", stub.job_id, "--history"]) == ExitCode.DONE
    assert "chosen" in capsys.readouterr().out
    assert run(["cancel", stub.job_id, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["state"] == "canceled"
    assert run(["fetch", stub.job_id]) == ExitCode.FAILED
    assert run(["capabilities"]) == ExitCode.DONE
    assert run(["schema"]) == ExitCode.DONE


def test_the_key_of_a_local_service_is_found(
    stub: StubService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANKPRESS_API_KEY")
    assert run(["jobs"]) == ExitCode.USAGE
    assert "RANKPRESS_API_KEY" in capsys.readouterr().err
    key_file = tmp_path / "api-key"
    key_file.write_text(f"{KEY}\n")
    services_file.record(stub.url.replace("127.0.0.1", "localhost") + "/", key_file)
    assert run(["jobs"]) == ExitCode.DONE
    key_file.unlink()
    services_file.record("http://127.0.0.1:1", key_file)
    assert services_file.find_key(stub.url) is None


def test_interrupt_cancels_the_job(stub: StubService, model: Path, tmp_path: Path) -> None:
    stub.steps = -1
    heard = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job is deaf
    )
    command = [sys.executable, "-c", f"{heard}; from service.cli import main; main()", "compress", str(model), "--json"]
    process = subprocess.Popen(
        [*command, "--max-macs-fraction", "0.3"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
    )
    deadline = time.monotonic() + 20
    while stub.polls < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert stub.canceled
    assert process.returncode == ExitCode.FAILED
    assert json.loads(out)["job"]["state"] == "canceled"
