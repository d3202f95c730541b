"""Every bad input gets its problem from the real service and engine, and the service goes on."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bad_models
import httpx2
import numpy as np
import pytest
from bad_models import CLASSES, FEATURES
from served import QUICK_LEASES, Service

from service.client import Client
from service.contract.errors import Problem
from service.contract.events import EventKind
from service.contract.resources import JobResource
from service.contract.states import JobState

GIB, MIB = 1024**3, 1024**2
WAIT_SECONDS = 90
SPEC: dict[str, Any] = {"budget": {"max_params_fraction": 0.6}, "device": "cpu"}
WITHOUT_DATA = {**SPEC, "example_inputs": [{"shape": [1, FEATURES], "dtype": "float32"}]}
HONEST = bad_models.scripted(bad_models.Honest())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = {
        "CHILD_MEMORY_BYTES": str(2 * GIB),
        "MAX_MODEL_BYTES": str(MIB),
        "MAX_DATASET_BYTES": str(MIB),
        "LOG_LEVEL": "WARNING",
    }
    made = Service(tmp_path_factory.mktemp("service"), settings=QUICK_LEASES | limits)
    made.start()
    yield made
    assert made.stop() == 0


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx2.Client]:
    with httpx2.Client(
        base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}, timeout=WAIT_SECONDS
    ) as client:
        yield client


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def samples(count: int = 64) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(0)
    return {
        "inputs": drawn.standard_normal((count, FEATURES)).astype(np.float32),
        "targets": drawn.integers(0, CLASSES, count),
    }


DATA = npz(**samples())


def submit(
    http: httpx2.Client, spec: Any = SPEC, *, model: bytes = HONEST, data: bytes | None = DATA, **parameters: Any
) -> httpx2.Response:
    said = spec if isinstance(spec, (bytes, str)) else json.dumps(spec)
    files = {"model": ("model.pt", model), "spec": ("spec.json", said)} | ({"data": ("data", data)} if data else {})
    return http.post("/v1/jobs", files=files, params=parameters)


def refused(answer: httpx2.Response, status: int, code: str, *words: str) -> Problem:
    """The answer is a problem with this code, and its detail says all these words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    assert problem.code == code, problem
    assert problem.status == status
    assert problem.request_id
    assert_says(problem, words)
    return problem


def assert_says(problem: Problem, words: tuple[str, ...]) -> None:
    assert problem.type.startswith("/problems/")
    assert problem.title
    missing = [word for word in words if word not in problem.detail]
    assert not missing, f"{missing} not in {problem.detail!r}"
    assert "Traceback" not in problem.detail
    assert len(problem.detail) < 2500


HOW_TO = "torch.jit.script"
MODELS = {
    "not a zip": (b"hello, I am no model" * 10, 422, "MODEL_NOT_TORCHSCRIPT", ["not a zip", HOW_TO]),
    "a truncated zip": (HONEST[: len(HONEST) // 2], 422, "MODEL_CORRUPT", ["cut off", "again"]),
    "a zip that is not TorchScript": (bad_models.other_zip(), 422, "MODEL_NOT_TORCHSCRIPT", ["a zip without", HOW_TO]),
    "a pickled module": (
        bad_models.pickled(bad_models.Honest()), 422, "MODEL_NOT_TORCHSCRIPT", ["bad_models.Honest", HOW_TO],
    ),
    "a module in the old pickle format": (
        bad_models.pickled(bad_models.Honest(), as_zip=False), 422, "MODEL_NOT_TORCHSCRIPT", ["pickle", HOW_TO],
    ),
    "an empty file": (b"", 422, "MODEL_NOT_TORCHSCRIPT", ["an empty file", HOW_TO]),
    "a file over the limit": (HONEST + bytes(MIB), 413, "TOO_LARGE", [str(MIB)]),
    "__getstate__ and __setstate__": (
        bad_models.scripted(bad_models.Pickles()), 422, "MODEL_REJECTED_UNSAFE", ["__getstate__", "line", "remove"],
    ),
    "values that are cut off": (
        bad_models.damaged(HONEST, "data/0"), 422, "MODEL_CORRUPT", ["'weight' needs 2048 bytes and has 1024"],
    ),
    "a dataset": (DATA, 422, "MODEL_NOT_TORCHSCRIPT", [HOW_TO]),
    "random bytes with a zip header": (
        b"PK\x03\x04" + random.Random(0).randbytes(5000), 422, "MODEL_CORRUPT", ["again"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_file_that_is_no_model(http: httpx2.Client, case: str) -> None:
    model, status, code, words = MODELS[case]
    refused(submit(http, model=model), status, code, *words)
    refused(http.post("/v1/models", content=model), status, code, *words)


DATASETS = {
    "objects in an array": (npz(inputs=np.array([{}, {}], dtype=object)), 422, "DATASET_INVALID", ["never unpickled"]),
    "not a file of arrays": (b"hello, world. " * 9, 422, "DATASET_INVALID", ["savez"]),
    "a truncated npz": (DATA[: len(DATA) // 2], 422, "DATASET_INVALID", ["cut off"]),
    "a pickle": (b"\x80\x04N.", 422, "DATASET_INVALID", ["pickle, which is never loaded"]),
    "random bytes with a zip header": (
        b"PK\x03\x04" + random.Random(1).randbytes(5000), 422, "DATASET_INVALID", ["savez"],
    ),
    "a file over the limit": (npz(inputs=np.zeros((520, 520), np.float32)), 413, "TOO_LARGE", [str(MIB)]),
}  # fmt: skip


@pytest.mark.parametrize("case", DATASETS)
def test_a_file_that_is_no_dataset(http: httpx2.Client, case: str) -> None:
    data, status, code, words = DATASETS[case]
    refused(submit(http, data=data), status, code, *words)
    refused(http.post("/v1/datasets", content=data), status, code, *words)


LAMBDA = {"type": "learning_compression", "lambda": 1.0}
SPECS: dict[str, tuple[Any, int, str, list[str]]] = {
    "an unknown field": ({**SPEC, "bugdet": 1}, 422, "SPEC_INVALID", ["bugdet", "did you mean 'budget'?"]),
    "an unknown inner field": (
        {"budget": {"max_mac_fraction": 0.5}}, 422, "SPEC_INVALID", ["did you mean 'max_macs_fraction'?"],
    ),
    "budget and lambda": ({**SPEC, "method": LAMBDA}, 422, "SPEC_INVALID", ["budget", "method.lambda", "remove"]),
    "neither budget nor lambda": ({}, 422, "SIZE_MISSING", ["budget", "method.lambda", "max_macs_fraction"]),
    "two budgets": (
        {"budget": {"max_macs_fraction": 0.5, "max_params": 3}}, 422, "SPEC_INVALID", ["exactly one", "max_params"],
    ),
    "a fraction of 0": ({"budget": {"max_macs_fraction": 0}}, 422, "SPEC_INVALID", ["/budget/", "greater than 0"]),
    "a negative fraction": ({"budget": {"max_macs_fraction": -0.3}}, 422, "SPEC_INVALID", ["/budget/", "-0.3"]),
    "a fraction above 1": ({"budget": {"max_params_fraction": 1.5}}, 422, "SPEC_INVALID", ["/budget/", "1.5"]),
    "a mu schedule out of range": (
        {**SPEC, "method": {"mu": {"growth": 10.0, "steps": 1000}}}, 422, "SPEC_INVALID", ["/method/mu", "growth"],
    ),
    "example inputs beyond reason": (
        {**SPEC, "example_inputs": [{"shape": [1, 2**40, 2**40]}]}, 422, "SPEC_INVALID", ["/example_inputs/0"],
    ),
    "levels without end": (b"[" * 100_000, 422, "SPEC_INVALID", ["nested"]),
    "objects without end": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 422, "SPEC_INVALID", ["nested"]),
    "10 MB": (json.dumps({**SPEC, "name": "x" * 10_000_000}), 413, "TOO_LARGE", ["at most"]),
    "not UTF-8": (b'{"budget": "\xff\xfe"}', 422, "SPEC_INVALID", ["UTF-8"]),
    "a key that stands twice": (
        '{"budget": {"max_params": 1}, "budget": {"max_params": 2}}', 422, "SPEC_INVALID", ["'budget'", "twice"],
    ),
    "NaN": ('{"budget": {"max_macs_fraction": NaN}}', 422, "SPEC_INVALID", ["NaN", "number"]),
    "no JSON": ("{budget: 0.3}", 422, "SPEC_INVALID", ["line 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_a_spec_that_cannot_be_run(http: httpx2.Client, case: str) -> None:
    spec, status, code, words = SPECS[case]
    refused(submit(http, spec), status, code, *words)


def test_no_data_and_no_example_inputs(http: httpx2.Client) -> None:
    """The refusal suggests what the first layer's weight takes."""
    suggested = f'"example_inputs": [{{"shape": [1, {FEATURES}], "dtype": "float32"}}]'
    refused(submit(http, data=None), 422, "EXAMPLE_INPUTS_MISSING", suggested)
    model_id = http.post("/v1/models", content=HONEST).json()["id"]
    refused(http.post("/v1/jobs", json={"model_id": model_id, "spec": SPEC}), 422, "EXAMPLE_INPUTS_MISSING", suggested)


@pytest.mark.parametrize("path", ["jobs/{}", "jobs/{}/events", "jobs/{}/report", "models/{}", "artifacts/{}/content"])
@pytest.mark.parametrize("id_", ["job_00000000000000000000000000", "x", "%00", "..%2F..%2Fetc%2Fpasswd"])
def test_an_unknown_id(http: httpx2.Client, path: str, id_: str) -> None:
    refused(http.get("/v1/" + path.format(id_)), 404, "NOT_FOUND", "there is no")


@pytest.mark.parametrize("authorization", [None, "Bearer wrong-key-of-enough-length", "Basic eDp5", "Bearer", ""])
def test_a_missing_or_wrong_key(service: Service, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("POST", "/v1/models")):
        answer = httpx2.request(method, service.url + path, headers=headers)
        refused(answer, 401, "UNAUTHENTICATED", "Authorization: Bearer")


def weird_values() -> list[Any]:
    return [
        None, True, 0, -1, 3, 2**63, -(2**63), 10**30, 1e-320, 1e308, 0.5, "", "auto", "x" * 1000, "\ufeff", "☃", [],
        {}, [[]], [None], ["auto"], [1, "a"], {"type": "low_rank"}, {"": ""}, {"match": "*"}, [{"terms": [{}]}],
    ]  # fmt: skip


def mutated(value: Any, drawn: random.Random) -> Any:
    """Replace one place of a document by something odd."""
    if isinstance(value, dict) and value and drawn.random() < 0.85:
        key = drawn.choice(list(value))
        return {**value, key: mutated(value[key], drawn)}
    if isinstance(value, list) and value and drawn.random() < 0.85:
        place = drawn.randrange(len(value))
        return [mutated(item, drawn) if at == place else item for at, item in enumerate(value)]
    return drawn.choice(weird_values())


def test_odd_specs_are_never_an_error_of_the_service(http: httpx2.Client) -> None:
    drawn = random.Random(0)
    model_id = http.post("/v1/models", content=HONEST).json()["id"]
    whole = http.post("/v1/jobs", json={"model_id": model_id, "spec": WITHOUT_DATA}, params={"dry_run": "true"})
    assert whole.status_code == 200, whole.text
    full = whole.json()["spec"] | {"layers": [{"match": "*", "terms": [{"type": "low_rank", "reshape": "matrix"}]}]}
    for _ in range(80):
        spec = mutated(full, drawn)
        body = json.dumps({"model_id": model_id, "spec": spec})
        answer = http.post(
            "/v1/jobs", content=body, params={"dry_run": "true"}, headers={"content-type": "application/json"}
        )
        if answer.status_code != 200:
            refused(answer, 422, answer.json()["code"])


def test_odd_files_are_never_an_error_of_the_service(http: httpx2.Client) -> None:
    drawn = random.Random(0)
    for path, whole in (("/v1/models", HONEST), ("/v1/datasets", DATA)):
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(drawn.choice([1, 3, 30])):  # most often in the directories, where zips are most alive
                near_end = drawn.random() < 0.5
                place = drawn.randrange(len(content) - 1500 if near_end else 0, len(content))
                content[place] = drawn.randrange(256)
            answer = http.post(path, content=bytes(content))
            assert answer.status_code in {200, 201, 413, 422}, answer.text


@dataclass(frozen=True)
class Bad:
    """A job that is accepted and then fails: what is wrong with it, and what it must be told."""

    code: str
    words: tuple[str, ...]
    model: bytes = HONEST
    data: bytes | None = DATA
    spec: dict[str, Any] = field(default_factory=lambda: SPEC)


def scripted(module: type) -> bytes:
    return bad_models.scripted(module())


def with_targets(targets: Any) -> bytes:
    return npz(**(samples() | {"targets": targets}))


def with_nan() -> bytes:
    inputs = samples()["inputs"]
    inputs[5, 3] = np.nan
    return npz(**(samples() | {"inputs": inputs}))


TARGETS = samples()["targets"]
JOBS = {
    "an operator outside the allowlist": Bad(
        "MODEL_REJECTED_UNSAFE", ("aten::save", "forward", "remove"), scripted(bad_models.Saves)
    ),
    "in a submodule's method that is not called": Bad(
        "MODEL_REJECTED_UNSAFE", ("aten::from_file", "reader.unused"), scripted(bad_models.ReadsUncalled)
    ),
    "in a nested block": Bad("MODEL_REJECTED_UNSAFE", ("aten::save", "line"), scripted(bad_models.SavesNested)),
    "damaged code": Bad("MODEL_CORRUPT", ("cannot load",), bad_models.damaged(HONEST, ".py")),
    "no compressible layer": Bad(
        "NO_COMPRESSIBLE_LAYER", ("none of the model's",), scripted(bad_models.NothingToCompress)
    ),
    "inputs of another shape": Bad(
        "INPUT_SHAPE_MISMATCH",
        ("float32[1, 7]", "Check the data's shape"),
        data=npz(inputs=samples()["inputs"][:, :7], targets=TARGETS),
    ),
    "test inputs of another shape": Bad(
        "INPUT_SHAPE_MISMATCH",
        ("test_inputs", "(7,)", f"({FEATURES},)"),
        data=npz(**samples(), test_inputs=samples()["inputs"][:, :7], test_targets=TARGETS),
    ),
    "targets of another shape": Bad(
        "INPUT_SHAPE_MISMATCH", ("'targets'", "(64, 3)", "one class"), data=with_targets(np.zeros((64, 3), int))
    ),
    "targets of another length": Bad(
        "DATASET_INVALID", ("'targets' has 50 rows", "'inputs' has 64"), data=with_targets(TARGETS[:50])
    ),
    "targets out of range": Bad(
        "DATASET_INVALID", ("holds class 4", "expected 0 to 3"), data=with_targets(TARGETS + 1)
    ),
    "NaN in data": Bad("DATASET_INVALID", ("'inputs' holds NaN", "row 5", "remove"), data=with_nan()),
    "a budget out of reach": Bad(
        "CONSTRAINT_UNREACHABLE",
        ("the budget is 100", "lowest rank", "Raise"),
        spec=SPEC | {"budget": {"max_params": 100}},
    ),
    "a CUDA device where there is none": Bad("DEVICE_UNAVAILABLE", ("CUDA", '"cpu"'), spec=SPEC | {"device": "cuda"}),
    "a forward that raises": Bad(
        "MODEL_RAISED", ("the tide is out", f"float32[1, {FEATURES}]"), scripted(bad_models.Raises)
    ),
    "a forward that does not return": Bad(
        "TIMEOUT",
        ("3 seconds", "first_forward_seconds"),
        scripted(bad_models.LoopsForever),
        spec=SPEC | {"deadlines": {"first_forward_seconds": 3}},
    ),
    "a run past its deadline": Bad(
        "TIMEOUT",
        ("6 seconds", "run_seconds"),
        scripted(bad_models.LoopsInTraining),
        spec=SPEC | {"deadlines": {"run_seconds": 6}},
    ),
    "a forward that takes all memory at once": Bad(
        "OUT_OF_MEMORY", ("memory", str(2 * GIB)), scripted(bad_models.AllocatesAtOnce)
    ),
    "a forward that takes it bit by bit": Bad(
        "OUT_OF_MEMORY", ("memory", str(2 * GIB)), scripted(bad_models.AllocatesBitByBit)
    ),
}  # fmt: skip


def ended(service: Service, answer: httpx2.Response) -> JobResource:
    assert answer.status_code == 202, answer.text
    with Client(service.url, service.key) as client:
        return client.wait(answer.json()["id"], timeout_seconds=WAIT_SECONDS)


@pytest.mark.parametrize("case", JOBS)
def test_a_job_that_must_fail(service: Service, http: httpx2.Client, case: str) -> None:
    bad = JOBS[case]
    job = ended(service, submit(http, bad.spec, model=bad.model, data=bad.data))
    assert job.state is JobState.FAILED
    assert job.problem is not None
    assert job.problem.code == bad.code, job.problem
    assert_says(job.problem, bad.words)
    assert job.attempt == 1, "what cannot succeed is not tried again"
    events = http.get(f"/v1/jobs/{job.id}/events", params={"limit": 1000}).json()["items"]
    assert not [event for event in events if event["kind"] == EventKind.STEP], "it fails before any training"
    refused(http.get(f"/v1/jobs/{job.id}/report"), 404, "NOT_FOUND", "report")


def test_the_service_goes_on(service: Service, http: httpx2.Client, model_file: Path) -> None:
    """After all that a good job succeeds; a rule that matches nothing is a warning in its history and its report."""
    spec = WITHOUT_DATA | {"layers": [{"match": "encoder.*", "keep": "dense"}, {"match": "*"}]}
    job = ended(service, submit(http, spec, model=model_file.read_bytes(), data=None))
    assert job.state is JobState.SUCCEEDED, job.problem
    events = http.get(f"/v1/jobs/{job.id}/events", params={"limit": 1000}).json()["items"]
    report = http.get(f"/v1/jobs/{job.id}/report").json()
    for warnings in ([e["data"] for e in events if e["kind"] == EventKind.WARNING], report["warnings"]):
        assert [warning for warning in warnings if "'encoder.*'" in warning["message"]], warnings
    assert http.get("/v1/health/ready").json()["status"] == "ready"
    scratch = service.folder / "data" / "scratch"
    assert not list(scratch.rglob("job_*")), "nothing of the attempts is left"
    assert not list(Path(service.folder).rglob("stolen")), "no model wrote a file"
