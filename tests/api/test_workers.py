"""`GET /v1/workers`, the client's call for it, and the command."""

import json

import pytest

from service.cli import workers as workers_command
from service.cli.command import run
from service.cli.exits import ExitCode
from service.client.api import Client
from service.contract.ids import WORKER, new_id
from service.store.workers import beat_worker, register_worker, retire_worker
from tests.api.conftest import KEY, Api

GPU = {"uuid": "GPU-1", "name": "H200", "memory_bytes": 2**37}


@pytest.fixture
def pair(api: Api) -> tuple[str, str]:
    """A worker that lives and one that has stopped."""
    live, gone = sorted((new_id(WORKER), new_id(WORKER)))  # in one millisecond any order
    with api.services.database.write() as session:
        register_worker(session, live, host="a", pid=7, queues=["gpu"], slots=2, version="1.2", devices={"cuda": [GPU]})
        register_worker(session, gone, host="b", pid=8, queues=["cpu"], slots=1)
        beat_worker(session, live, 1)
        retire_worker(session, gone)
    return live, gone


def test_without_workers_the_list_is_empty(api: Api) -> None:
    assert api.client.get("/v1/workers").json() == {"items": []}


def test_workers_are_listed_and_the_gone_ones_only_if_asked_for(api: Api, pair: tuple[str, str]) -> None:
    (live,) = api.client.get("/v1/workers").json()["items"]
    assert (live["id"], live["state"], live["queues"]) == (pair[0], "live", ["gpu"])
    assert (live["slots"], live["busy"], live["gpus"]) == (2, 1, [GPU])
    assert (live["host"], live["pid"], live["version"], live["gone_at"]) == ("a", 7, "1.2", None)
    every = api.client.get("/v1/workers", params={"include_gone": "true"}).json()["items"]
    assert [(worker["id"], worker["state"]) for worker in every] == list(zip(pair, ("live", "gone"), strict=True))
    assert every[1]["gone_at"] is not None


def test_the_command_shows_them(
    api: Api, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Client("http://testserver", KEY)
    monkeypatch.setattr(client._transport, "http", api.client)
    monkeypatch.setattr(workers_command, "connect", lambda _: client)
    monkeypatch.setattr(client, "close", lambda: None)
    assert run(["workers", "--all"]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*pair, "1 of 2", "H200", "gone"))
    assert run(["workers", "--json"]) == ExitCode.DONE
    assert [worker["id"] for worker in json.loads(capsys.readouterr().out)["items"]] == [pair[0]]
