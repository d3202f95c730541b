from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_service import KEY, Running, StubService

from service.client import Client


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubService]:
    """A stub service that the command reaches by its environment alone."""
    service = StubService()
    running = Running(service)
    service.url = running.start()
    monkeypatch.setenv("RANKPRESS_URL", service.url)
    monkeypatch.setenv("RANKPRESS_API_KEY", KEY)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield service
    running.stop()


@pytest.fixture
def client(stub: StubService) -> Iterator[Client]:
    with Client(stub.url, KEY, timeout_seconds=5) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(b"a model" * 100_000)
    return path
