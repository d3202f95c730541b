"""What the checks say of machines that this one is not."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.checks import machine, shared
from service.checks.configuration import check_settings
from service.checks.finding import Status
from service.checks.urls import shown_url
from service.settings import Settings
from service.store.session import Database


@dataclass(frozen=True)
class Gpu:
    uuid: str
    name: str | None = None
    memory_bytes: int | None = None


H200 = Gpu("GPU-1", "H200", 139 * 2**30)
CUDA, CPU = "2.13.0", "2.13.0+cpu"


@pytest.mark.parametrize(
    ("queues", "gpus", "torch_version", "status", "said"),
    [
        ("", [], CPU, Status.OK, "none"),
        ("cpu", [H200], CPU, Status.OK, "H200 (139.0 GiB)"),
        ("", [H200], CUDA, Status.OK, "PyTorch 2.13.0"),
        ("gpu", [H200], CUDA, Status.OK, "H200"),
        ("", [Gpu("MIG-1")], CUDA, Status.OK, "MIG-1"),
        ("", [H200], CPU, Status.FAILED, "has no CUDA"),
        ("gpu,cpu", [H200], CPU, Status.FAILED, "has no CUDA"),
        ("gpu", [], CUDA, Status.FAILED, "none is visible"),
        ("", [H200, Gpu("7")], CUDA, Status.FAILED, "names 7"),
        ("", None, None, Status.SKIPPED, "not installed"),
        ("cpu", [], None, Status.SKIPPED, "not installed"),
        ("gpu", None, CUDA, Status.FAILED, "not installed"),
    ],
)
def test_gpus(
    tmp_path: Path, queues: str, gpus: list[Gpu] | None, torch_version: str | None, status: Status, said: str
) -> None:
    finding = machine.check_gpu(Settings(data_dir=tmp_path, worker_queues=queues), gpus, torch_version)
    assert (finding.status, said in finding.found) == (status, True), finding
    assert bool(finding.advice) == (status is Status.FAILED)


def test_memory_of_a_slot(tmp_path: Path) -> None:
    few = machine.check_memory(Settings(data_dir=tmp_path, child_memory_bytes=2**33, threads=3), [H200, H200])
    assert (few.status, few.found) == (Status.OK, "slots: 2, each with 8.0 GiB and 3 threads")
    many = machine.check_memory(Settings(data_dir=tmp_path, slots=100_000), [])
    assert many.status is Status.WARNING


def test_a_disk_is_named_once(tmp_path: Path) -> None:
    (one,) = machine.check_disks(Settings(data_dir=tmp_path / "not" / "there", min_free_bytes=1))
    assert (one.status, str(tmp_path) in one.found) == (Status.OK, True)
    both = machine.check_disks(Settings(data_dir=tmp_path, blob_url="file:///dev/shm", min_free_bytes=1))
    assert len(both) == (1 if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev else 2)


@pytest.mark.parametrize(("seconds", "status"), [(0, Status.OK), (-60, Status.WARNING), (60, Status.WARNING)])
def test_clocks_that_differ(tmp_path: Path, seconds: float, status: Status) -> None:
    database = Database(f"sqlite:///{tmp_path}/clock.db")
    finding = shared.check_clock(database, now=lambda: datetime.now(UTC) + timedelta(seconds=seconds))
    database.dispose()
    assert finding.status is status
    assert ("behind" if seconds < 0 else "ahead") in finding.found or seconds == 0


def test_every_setting_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKPRESS_SLOTS", "0")
    monkeypatch.setenv("RANKPRESS_LEASE_SECONDS", "soon")
    settings, findings = check_settings({}, {})
    assert settings is None
    assert [finding.found.partition(":")[0] for finding in findings] == ["RANKPRESS_LEASE_SECONDS", "RANKPRESS_SLOTS"]
    monkeypatch.setenv("RANKPRESS_SLOTS", "1")
    monkeypatch.setenv("RANKPRESS_LEASE_SECONDS", "1000")
    (finding,) = check_settings({}, {})[1]
    assert "self_fence_seconds < lease_seconds" in finding.found


def test_names_that_are_no_settings_are_told() -> None:
    environment = {"RANKPRESS_SLOT": "1", "RANKPRESS_SLOTS": "1", "RANKPRESS_URL": "http://localhost", "HOME": "/"}
    _, findings = check_settings(environment, {})
    assert [finding.found for finding in findings] == ["RANKPRESS_SLOT is no setting"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("redis://:p@ss@host/0", "redis://:***@host/0"),
        ("redis://host/0", "redis://host/0"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("file:///shared/blobs", "file:///shared/blobs"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown
