"""What a wrong spec is told: the place that is meant, and what is expected there."""

from typing import Any

import pytest

from service.contract.errors import ProblemError
from service.contract.resolve import resolve_at_submit
from service.contract.schemas import spec_components
from service.contract.spec import parse_spec

BUDGET: dict[str, Any] = {"budget": {"max_macs_fraction": 0.3}}


def with_term(term: Any) -> dict[str, Any]:
    return {**BUDGET, "layers": [{"terms": [term]}]}


@pytest.mark.parametrize(
    ("spec", "pointer", "words"),
    [
        (with_term({"type": "prunee"}), "/layers/0/terms/0", "low_rank, prune, quantize, tucker2; found 'prunee'"),
        (with_term({"reshape": "matrx"}), "/layers/0/terms/0/reshape", "'matrix', 'chunked'"),
        (
            with_term({"reshape": {"view": [4], "permute": [1], "matrix": [2, 2]}}),
            "/layers/0/terms/0/reshape",
            "permute must name each of the 1 axes",
        ),
        ({**BUDGET, "cost": {"macs": 0}}, "/cost", "at least one of the weights"),
        ({**BUDGET, "cost": "flops"}, "/cost", "'auto', or 'macs', 'params' or 'bytes', or an object"),
        ({**BUDGET, "training": {"schedule": "cosine"}}, "/training/schedule", '{"type": "cosine"}'),
        (
            {**BUDGET, "training": {"schedule": {"to": 0.5}}},
            "/training/schedule",
            "constant, cosine, exponential, step",
        ),
        (
            {**BUDGET, "training": {"schedule": {"type": "cosine", "from": 1}}},
            "/training/schedule/from",
            "unknown field 'from'",
        ),
        ({**BUDGET, "objective": {"class_dim": 10**30}}, "/objective/class_dim", "15"),
        ({**BUDGET, "objective": {"ignore_index": 10**30}}, "/objective/ignore_index", "less than"),
        ({**BUDGET, "objective": {"temperature": 1e300}}, "/objective/temperature", "less than"),
        ({**BUDGET, "training": {"optimizer": {"weight_decay": 1e300}}}, "/training/optimizer/weight_decay", "less"),
        ({**BUDGET, "data": {"std": [1e-300]}}, "/data/std/0", "greater than"),
        ({**BUDGET, "layers": [{"keep": "dense", "min_rank": 0}]}, "/layers/0", "keep 'dense'"),
        ({"budget": 0.5}, "/budget", "Input should be an object; found 0.5"),
        ({**BUDGET, "method": {"steps": 3}}, "/method/steps", "did you mean 'mu.steps'?"),
        ({**BUDGET, "training": {"lr": 0.1}}, "/training/lr", "did you mean 'optimizer.lr'?"),
        (
            {"layers": [{"terms": [{"type": "quantize", "values": 4}], "rank": 5}]},
            "/layers/0",
            "rank is of low_rank terms, and the rule has none, only quantize: remove it, or give the term's values",
        ),
        (
            {**BUDGET, "layers": [{"terms": [{"type": "tucker2"}, {"type": "prune"}], "max_rank": 5}]},
            "/layers/0",
            "max_rank is of low_rank terms, and the rule has none, only tucker2, prune: remove it",
        ),
    ],
)
def test_one_error_at_the_place_that_is_meant(spec: dict[str, Any], pointer: str, words: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse_spec(spec)
    assert [error.pointer for error in caught.value.errors] == [pointer]
    assert words in caught.value.detail
    assert "more, see errors" not in caught.value.detail


def test_the_schema_asks_for_the_type_where_the_service_does() -> None:
    parts = spec_components()
    listed = parts["LayerRule"]["properties"]["terms"]["anyOf"][1]["items"]["oneOf"]
    required = {branch["$ref"].rpartition("/")[2]: branch.get("required") for branch in listed}
    assert required == {
        "LowRankTermSpec": None,  # the default
        "PruneTermSpec": ["type"],
        "QuantizeTermSpec": ["type"],
        "Tucker2TermSpec": ["type"],
    }
    for name in ("ConstantSchedule", "CosineSchedule", "ExponentialSchedule", "StepSchedule"):
        assert parts[name]["required"] == ["type"]
    assert "required" not in parts["QuantizeTermSpec"]  # in `then` there is one type alone


@pytest.mark.parametrize(
    "spec",
    [
        with_term({"reshape": "matrix", "then": {"bits": 4}}),
        with_term({"type": "prune", "keep_fraction": 0.1}),
        with_term({"type": "tucker2", "ranks": [2, 3]}),
        {**BUDGET, "training": {"schedule": {"type": "cosine"}}, "method": {"mu": {"steps": 3}}},
        {**BUDGET, "objective": {"loss": {"module": "objective"}}},
    ],
)
def test_what_is_resolved_is_a_spec_again(spec: dict[str, Any]) -> None:
    resolved = resolve_at_submit(parse_spec(spec))
    assert resolve_at_submit(parse_spec(resolved)) == resolved
