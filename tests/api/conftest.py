"""A service on SQLite with no worker: what HTTP alone can show."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from starlette.testclient import TestClient

from service.app import create_app
from service.contract.ids import WORKER, new_id
from service.services import Services, build_services
from service.settings import Settings
from service.store.artifacts import insert_artifact
from service.store.attempts import Claim, claim
from service.store.migration import migrate
from service.store.session import Database
from tests.api import archives

KEY = "test-key-of-enough-characters"
SPEC: dict[str, Any] = {"budget": {"max_macs_fraction": 0.5}}
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Api:
    """The service, a client with its key, and what tests do all the time."""

    services: Services
    client: TestClient

    def submit(
        self, spec: Any = None, *, model: bytes | None = None, data: bytes | None = b"", **kwargs: Any
    ) -> httpx2.Response:
        files: dict[str, Any] = {"model": ("net.pt", archives.torchscript() if model is None else model)}
        if data is not None:
            files["data"] = ("train.npz", data or archives.npz())
        text = spec if isinstance(spec, str) else json.dumps(SPEC if spec is None else spec)
        return self.client.post("/v1/jobs", files=files, data={"spec": text}, **kwargs)

    def job_id(self) -> str:
        answer = self.submit()
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.client.get("/v1/jobs").json()["items"])

    def staged(self) -> list[Path]:
        """Files that an upload left behind."""
        assert self.services.blobs.root is not None
        return [path for path in (self.services.blobs.root / "staging").iterdir() if path.is_file()]

    def artifact(self, content: bytes, *, name: str = "small.pt", format: str = "torchscript") -> str:  # noqa: A002
        """Make a job that has produced this file, and return the file's id."""
        self.job_id()
        claimed = self.claim()
        path = self.services.settings.data_dir / "made-by-a-test"
        path.write_bytes(content)
        key, sha256, size = self.services.blobs.put_content(path)
        with self.services.database.write() as session:
            artifact_id = insert_artifact(
                session,
                claimed.job_id,
                claimed.epoch,
                name=name,
                format=format,
                blob_key=key,
                sha256=sha256,
                bytes=size,
            )
        assert artifact_id is not None
        return artifact_id

    def claim(self) -> Claim:
        """Take the next job as a worker would."""
        with self.services.database.write() as session:
            found = claim(session, queue="cpu", worker_id=new_id(WORKER), host="h", pid=1, lease_seconds=30)
        assert found is not None
        return found


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[structlog.typing.EventDict]]:
    """What was logged, and nothing of it on the screen."""
    with structlog.testing.capture_logs() as lines:
        yield lines


MakeServices = Callable[..., Services]


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database at head, to be copied: migrations run once."""
    path = tmp_path_factory.mktemp("template") / "rankpress.db"
    database = Database(f"sqlite:///{path}")
    migrate(database)
    database.dispose()
    return path


@pytest.fixture
def make_services(tmp_path: Path, migrated_file: Path) -> Iterator[MakeServices]:
    """Build services with other settings than the ordinary ones."""
    made: list[Services] = []

    def make(*, migrated: bool = True, **knobs: Any) -> Services:
        if migrated:
            shutil.copyfile(migrated_file, tmp_path / "rankpress.db")
        made.append(build_services(Settings(data_dir=tmp_path, api_key=KEY, **knobs)))
        return made[-1]

    yield make
    for services in made:
        services.database.dispose()


@pytest.fixture
def api(make_services: MakeServices) -> Iterator[Api]:
    services = make_services(max_model_bytes=1024 * 1024, max_dataset_bytes=1024 * 1024, max_spec_bytes=64 * 1024)
    with TestClient(create_app(services), headers=HEADERS, raise_server_exceptions=True) as client:
        yield Api(services, client)


def assert_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["type"].startswith("/problems/")
    assert problem["detail"]
    return problem
