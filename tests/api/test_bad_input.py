"""Each bad input gets its problem, leaves nothing behind, and the service goes on."""

import json
from typing import Any

import pytest

from tests.api import archives
from tests.api.conftest import SPEC, Api, assert_problem

MODELS = {
    "not a zip": (b"hello, I am no model" * 10, 422, "MODEL_NOT_TORCHSCRIPT"),
    "empty": (b"", 422, "MODEL_NOT_TORCHSCRIPT"),
    "truncated": (archives.truncated(), 422, "MODEL_CORRUPT"),
    "other zip": (archives.other_zip(), 422, "MODEL_NOT_TORCHSCRIPT"),
    "pickled module": (archives.pickled_module(), 422, "MODEL_NOT_TORCHSCRIPT"),
    "old pickle": (b"\x80\x02}q\x00.", 422, "MODEL_NOT_TORCHSCRIPT"),
    "__setstate__": (archives.with_setstate(), 422, "MODEL_REJECTED_UNSAFE"),
    "__getstate__": (archives.with_setstate("__getstate__"), 422, "MODEL_REJECTED_UNSAFE"),
    "over the limit": (archives.torchscript(weight=b"\0" * (1024 * 1024)), 413, "TOO_LARGE"),
}
DATA = {
    "not a file of arrays": (b"hello", "DATASET_INVALID"),
    "pickle": (b"\x80\x04N.", "DATASET_INVALID"),
    "zip without arrays": (archives.other_zip(), "DATASET_INVALID"),
    "truncated": (archives.npz()[:200], "DATASET_INVALID"),
}
SPECS: dict[str, tuple[Any, str, str]] = {
    "nothing said": ({}, "SIZE_MISSING", ""),
    "unknown field": ({**SPEC, "budgets": 1}, "SPEC_INVALID", "/budgets"),
    "unknown inner field": ({"budget": {"max_mac_fraction": 0.5}}, "SPEC_INVALID", "/budget/max_mac_fraction"),
    "budget and lambda": ({**SPEC, "method": {"type": "learning_compression", "lambda": 1.0}}, "SPEC_INVALID", ""),
    "two budgets": ({"budget": {"max_macs_fraction": 0.5, "max_params": 3}}, "SPEC_INVALID", "/budget"),
    "fraction 0": ({"budget": {"max_macs_fraction": 0}}, "SPEC_INVALID", "/budget/max_macs_fraction"),
    "fraction 2": ({"budget": {"max_macs_fraction": 2}}, "SPEC_INVALID", "/budget/max_macs_fraction"),
    "fraction text": ({"budget": {"max_params_fraction": "half"}}, "SPEC_INVALID", "/budget/max_params_fraction"),
    "fraction in quotes": ({"budget": {"max_params_fraction": "0.5"}}, "SPEC_INVALID", "/budget/max_params_fraction"),
    "true for a number": ({**SPEC, "seed": True}, "SPEC_INVALID", "/seed"),
    "a word for a flag": ({**SPEC, "method": {"multipliers": "no"}}, "SPEC_INVALID", "/method/multipliers"),
    "version 2": ({**SPEC, "version": 2}, "SPEC_INVALID", "/version"),
    "twice the same term": (
        {
            **SPEC,
            "layers": [
                {"terms": [{"type": "low_rank", "reshape": "channel"}, {"type": "low_rank", "reshape": "channel"}]}
            ],
        },
        "TERMS_NOT_DISTINCT",
        "/layers/0",
    ),
    "unknown term": ({**SPEC, "layers": [{"terms": [{"type": "cp"}]}]}, "SPEC_INVALID", "/layers/0/terms/0"),
    "a list": ([], "SPEC_INVALID", ""),
    "a number": (3, "SPEC_INVALID", ""),
}
TEXTS = {
    "no JSON": "{budget: 1}",
    "empty": "",
    "key twice": '{"budget": {"max_macs_fraction": 0.5}, "budget": {"max_macs_fraction": 0.1}}',
    "NaN": '{"budget": {"max_macs_fraction": NaN}}',
    "infinity": '{"budget": {"max_macs_fraction": 1e999}}',
    "huge integer": '{"budget": {"max_macs": ' + "9" * 5000 + "}}",
    "bigger than 64 bits": '{"budget": {"max_macs": ' + "9" * 19 + "}}",
    "deep": "[" * 20_000,
    "deep and whole": "[" * 100 + "]" * 100,
    "surrogate": '{"budget": {"max_macs_fraction": 0.5}, "layers": [{"match": "\\ud800"}]}',
    "NUL": '{"budget": {"max_macs_fraction": 0.5}, "layers": [{"match": "a\\u0000"}]}',
}


def goes_on(api: Api) -> None:
    assert api.staged() == []
    assert api.jobs() == []
    assert api.submit().status_code == 202


@pytest.mark.parametrize("case", MODELS)
def test_model_in_a_submission(api: Api, case: str) -> None:
    model, status, code = MODELS[case]
    assert_problem(api.submit(model=model), status, code)
    goes_on(api)


@pytest.mark.parametrize("case", MODELS)
def test_model_as_raw_body(api: Api, case: str) -> None:
    model, status, code = MODELS[case]
    assert_problem(api.client.post("/v1/models", content=model), status, code)
    assert api.client.get("/v1/models").json()["items"] == []
    goes_on(api)


@pytest.mark.parametrize("case", DATA)
def test_data(api: Api, case: str) -> None:
    data, code = DATA[case]
    assert_problem(api.submit(data=data), 422, code)
    assert_problem(api.client.post("/v1/datasets", content=data), 422, code)
    goes_on(api)


def test_empty_data(api: Api) -> None:
    assert_problem(api.client.post("/v1/datasets"), 422, "DATASET_INVALID")


@pytest.mark.parametrize("case", SPECS)
def test_spec(api: Api, case: str) -> None:
    spec, code, pointer = SPECS[case]
    problem = assert_problem(api.submit(spec), 422, code)
    assert problem["errors"] == [] or any(error["pointer"].startswith(pointer) for error in problem["errors"]), problem
    goes_on(api)


def test_unknown_field_names_the_nearest(api: Api) -> None:
    problem = assert_problem(api.submit({**SPEC, "budgets": 1}), 422, "SPEC_INVALID")
    assert "did you mean 'budget'?" in problem["detail"]


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_no_spec(api: Api, case: str) -> None:
    assert_problem(api.submit(TEXTS[case]), 422, "SPEC_INVALID")
    goes_on(api)


@pytest.mark.parametrize("case", TEXTS)
def test_text_in_a_json_body(api: Api, case: str) -> None:
    body = f'{{"model_id": "mdl_x", "spec": {TEXTS[case] or ","}}}'
    answer = api.client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["code"] in {"REQUEST_INVALID", "SPEC_INVALID"}


def test_no_data_and_no_example_inputs(api: Api) -> None:
    problem = assert_problem(api.submit(data=None), 422, "EXAMPLE_INPUTS_MISSING")
    assert "shape" in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/example_inputs"
    goes_on(api)


def test_no_data_with_example_inputs(api: Api) -> None:
    spec = {**SPEC, "example_inputs": [{"shape": [1, 4], "dtype": "float32"}]}
    job = api.submit(spec, data=None)
    assert job.status_code == 202
    assert job.json()["dataset_id"] is None


@pytest.mark.parametrize(
    "id_",
    [
        "job_00000000000000000000000000",
        "x",
        "job_",
        "%00",
        "%ff%fe",
        "a" * 5000,
        "..",
        "mdl_x",
        "job_%F0%9F%98%80",
        "'--",
    ],
)
def test_unknown_job(api: Api, id_: str) -> None:
    for tail in ["", "/events", "/layers?history=true", "/report", "/artifacts"]:
        assert_problem(api.client.get(f"/v1/jobs/{id_}{tail}"), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/mdl_00000000000000000000000000",
        "/v1/models/%00",
        "/v1/datasets/dst_00000000000000000000000000",
        "/v1/datasets/job_00000000000000000000000000",
        "/v1/artifacts/art_00000000000000000000000000/content",
        "/v1/artifacts/..%2f..%2fetc%2fpasswd/content",
        "/static/..%2f..%2fapp.py",
        "/static/nothing.js",
    ],
)
def test_unknown_things(api: Api, path: str) -> None:
    assert_problem(api.client.get(path), 404, "NOT_FOUND")


def test_cancel_of_an_unknown_job(api: Api) -> None:
    assert_problem(api.client.post("/v1/jobs/job_00000000000000000000000000/cancel"), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=x",
        "limit=99999999999999999999",
        "cursor=nonsense",
        "cursor=%00",
        "state=done",
        "name=%00",
    ],
)
def test_list_parameters(api: Api, query: str) -> None:
    assert_problem(api.client.get(f"/v1/jobs?{query}"), 422, "REQUEST_INVALID")


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=99999999999999999999", "limit=0"])
def test_event_parameters(api: Api, query: str) -> None:
    assert_problem(api.client.get(f"/v1/jobs/{api.job_id()}/events?{query}"), 422, "REQUEST_INVALID")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/mixed; boundary=x"]
)
def test_content_types(api: Api, content_type: str) -> None:
    answer = api.client.post("/v1/jobs", content=b"x", headers={"content-type": content_type})
    assert_problem(answer, 415, "UNSUPPORTED_MEDIA_TYPE")


def test_json_body_fields(api: Api) -> None:
    missing = assert_problem(api.client.post("/v1/jobs", json={"spec": SPEC}), 422, "REQUEST_INVALID")
    assert missing["errors"][0]["pointer"] == "/model_id"
    unknown = assert_problem(
        api.client.post("/v1/jobs", json={"model_id": "x", "spec": SPEC, "dataset": "y"}), 422, "REQUEST_INVALID"
    )
    assert "did you mean 'dataset_id'?" in unknown["detail"]
    assert_problem(api.client.post("/v1/jobs", json=["x"]), 422, "REQUEST_INVALID")
    assert_problem(
        api.client.post("/v1/jobs", json={"model_id": "x", "dataset_id": "y", "spec": SPEC}), 404, "NOT_FOUND"
    )


def test_json_body_above_its_limit(api: Api) -> None:
    body = json.dumps({"model_id": "x", "spec": SPEC, "name": "n" * 100_000})
    answer = api.client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert_problem(answer, 413, "TOO_LARGE")
