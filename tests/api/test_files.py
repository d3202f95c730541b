"""Models and datasets: uploaded as raw bodies, kept once, listed."""

import hashlib
from typing import Any

import pytest

from tests.api import archives
from tests.api.conftest import Api, assert_problem

KINDS = [("models", archives.torchscript(), "mdl_"), ("datasets", archives.npz(), "dst_")]


@pytest.mark.parametrize(("kind", "content", "prefix"), KINDS)
def test_upload(api: Api, kind: str, content: bytes, prefix: str) -> None:
    answer = api.client.post(f"/v1/{kind}?name=mine", content=content)
    assert answer.status_code == 201
    found = answer.json()
    assert found["id"].startswith(prefix)
    assert answer.headers["location"] == f"/v1/{kind}/{found['id']}"
    assert (found["name"], found["bytes"]) == ("mine", len(content))
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert api.client.get(answer.headers["location"]).json() == found
    assert api.staged() == []


@pytest.mark.parametrize(("kind", "content", "prefix"), KINDS)
def test_same_bytes_are_the_same_thing(api: Api, kind: str, content: bytes, prefix: str) -> None:
    first, again = (api.client.post(f"/v1/{kind}", content=content).json() for _ in range(2))
    assert first == again
    assert len(api.client.get(f"/v1/{kind}").json()["items"]) == 1


def test_bytes_sent_in_chunks_without_a_length(api: Api) -> None:
    content = archives.torchscript(weight=bytes(500_000))
    chunks = (content[start : start + 65_536] for start in range(0, len(content), 65_536))
    found = api.client.post("/v1/models", content=chunks).json()
    assert found["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("attachment; filename=net.pt", "net.pt"),
        ('attachment; filename="my net.pt"', "my net.pt"),
        ("attachment; filename*=UTF-8''r%C3%A9s.pt", "rés.pt"),
        ("attachment; filename=\"a.pt\"; filename*=utf-8'en'b.pt", "b.pt"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename="C:\\\\nets\\\\net.pt"', "net.pt"),
        ("attachment", None),
        ("", None),
        ('attachment; filename=""', None),
    ],
)
def test_name_from_the_header(api: Api, header: str, name: str | None) -> None:
    headers = {"Content-Disposition": header}
    assert api.client.post("/v1/models", content=archives.torchscript(), headers=headers).json()["name"] == name


def test_formats(api: Api) -> None:
    assert api.client.post("/v1/datasets", content=archives.npz()).json()["format"] == "npz"
    assert api.client.post("/v1/datasets", content=archives.safetensors()).json()["format"] == "safetensors"
    assert api.client.post("/v1/datasets", content=archives.tar()).json()["format"] == "webdataset"


def test_pages(api: Api) -> None:
    made = [
        api.client.post(f"/v1/models?name=n{i % 2}", content=archives.torchscript(weight=bytes([i]) * 9)).json()["id"]
        for i in range(5)
    ]
    first: dict[str, Any] = api.client.get("/v1/models?limit=3").json()
    second = api.client.get("/v1/models", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == sorted(made, reverse=True)
    assert second["next_cursor"] is None
    assert len(api.client.get("/v1/models?name=n0").json()["items"]) == 3
    assert api.client.get("/v1/datasets").json() == {"items": [], "next_cursor": None}
    assert_problem(api.client.get("/v1/datasets?cursor=mdl_x"), 422, "REQUEST_INVALID")


def test_declared_length_above_the_limit_is_refused_unread(api: Api) -> None:
    answer = api.client.post("/v1/models", content=b"", headers={"Content-Length": str(2**40)})
    assert_problem(answer, 413, "TOO_LARGE")


def test_undeclared_length_above_the_limit_leaves_nothing(api: Api) -> None:
    answer = api.client.post("/v1/models", content=(bytes(100_000) for _ in range(20)))
    assert_problem(answer, 413, "TOO_LARGE")
    assert api.staged() == []
