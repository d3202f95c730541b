"""What the rules make of each layer; every reason of the closed list comes from somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Mlp, archive, quick, run_learn
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import REASON_MEANINGS, Form, ReasonCode
from service.contract.spec import parse_spec
from worker.engine.forms.best_reshape import BestReshapeTerm
from worker.engine.layer_rules import Decisions, apply_rules
from worker.engine.network.costs import take_census
from worker.engine.network.load import load_model

HALF = {"budget": {"max_params_fraction": 0.5}}


def decide(module: nn.Module, example: tuple[int, ...], **spec: Any) -> Decisions:
    census = take_census(load_model(archive(module)), (torch.randn(1, *example),))
    return apply_rules(census.layers, parse_spec({**HALF, **spec}))


def decide_convolutions(**spec: Any) -> Decisions:
    return decide(ConvNet(), (2, 8, 8), **spec)


SUMS: list[dict[str, Any]] = [
    {"kind": "conv2d", "terms": [{"reshape": "channel"}, {"reshape": "spatial"}]},
    {"match": "*"},
]


def term(reshape: Any, **more: Any) -> dict[str, Any]:
    return {"type": "low_rank", "reshape": reshape, **more}


def forms(decisions: Decisions) -> dict[str, list[str]]:
    return {
        problem.layer.name: [choice.term.form.value for choice in problem.choices] for problem in decisions.problems
    }


def test_auto_terms() -> None:
    decisions = decide_convolutions()
    assert forms(decisions)["fc"] == ["matrix"]
    for problem in decisions.problems[:2]:
        (choice,) = problem.choices
        assert isinstance(choice.term, BestReshapeTerm)
        assert {"channel", "spatial", "spatial_transposed"} <= {each.form.value for each in choice.term.candidates}
    assert [facts.name for facts in decisions.facts] == ["conv1", "bn", "conv2", "fc"]
    assert decisions.dense == {"bn": ReasonCode.UNSUPPORTED_KIND}
    assert decisions.warnings == []


def test_the_first_rule_that_matches_holds() -> None:
    decisions = decide_convolutions(
        layers=[
            {"match": "conv1", "keep": "dense"},
            {"match": "conv*", "terms": [term("spatial_transposed")]},
            {"match": "*", "kind": "linear", "terms": [term("chunked", chunks=4)]},
        ]
    )
    assert forms(decisions) == {"conv2": ["spatial_transposed"], "fc": ["chunked"]}
    assert decisions.dense["conv1"] == ReasonCode.KEPT_BY_RULE


def test_a_rule_that_decides_nothing_is_a_warning_with_the_models_names() -> None:
    decisions = decide_convolutions(layers=[{"match": "encoder.*"}, {"match": "*"}, {"match": "fc"}])
    assert [(warning.code, "encoder.*" in warning.message) for warning in decisions.warnings] == [
        ("RULE_MATCHED_NOTHING", True),
        ("RULE_MATCHED_NOTHING", False),  # `fc` stands behind `*`
    ]
    assert "conv1" in decisions.warnings[0].message


def test_a_term_that_does_not_apply_is_dropped() -> None:
    decisions = decide_convolutions(layers=[{"terms": [term("matrix"), term("channel")]}])
    assert forms(decisions) == {"conv1": ["channel"], "conv2": ["channel"], "fc": ["matrix"]}
    drop = decisions.dropped["conv1"][0]
    assert (drop.index, drop.form, drop.reason) == (0, Form.MATRIX, ReasonCode.TERM_NOT_APPLICABLE)
    assert next(problem for problem in decisions.problems if problem.layer.name == "conv1").term_indices == (1,)


def test_channel_and_spatial_are_one_term_on_a_1x1_convolution() -> None:
    decisions = decide(nn.Conv2d(8, 12, 1), (8, 5, 5), layers=[{"terms": [term("channel"), term("spatial")]}])
    (problem,) = decisions.problems
    assert len(problem.choices) == 1
    assert [drop.reason for drop in problem.dropped] == [ReasonCode.TERMS_NOT_DISTINCT]


def test_a_general_reshape_that_equals_a_named_one_is_not_distinct() -> None:
    general = {"view": [4, 8, 20], "permute": [1, 0, 2], "matrix": [32, 20]}
    decisions = decide(nn.Linear(20, 32), (20,), layers=[{"terms": [term("matrix"), term(general)]}])
    assert [drop.reason for drop in decisions.problems[0].dropped] == [ReasonCode.TERMS_NOT_DISTINCT]


def test_fixed_ranks() -> None:
    decisions = decide(Mlp(), (20,), layers=[{"match": "fc1", "rank": 5}, {"match": "fc2", "rank": 16}, {"rank": 2}])
    by_name = {problem.layer.name: problem for problem in decisions.problems}
    assert [(c.rank_low, c.rank_high) for c in by_name["fc1"].choices] == [(5, 5)]
    assert by_name["fc1"].fixed
    assert decisions.dense["fc2"] == ReasonCode.RANK_ABOVE_BREAK_EVEN  # 16 · 64 = 32 · 32
    assert decide(Mlp(), (20,), layers=[{"rank": 15}]).dense.get("fc2") is None


def test_a_fixed_rank_above_break_even_leaves_only_its_term_out() -> None:
    terms = [term("channel", rank=500), term("spatial")]
    decisions = decide_convolutions(layers=[{"match": "conv2", "terms": terms}])
    (problem,) = decisions.problems
    assert [choice.term.form for choice in problem.choices] == [Form.SPATIAL]
    assert [(drop.form, drop.reason) for drop in problem.dropped] == [(Form.CHANNEL, ReasonCode.RANK_ABOVE_BREAK_EVEN)]


def test_bounds_of_ranks() -> None:
    terms = [term("channel", min_rank=1, max_rank=3), term("spatial", max_rank=0)]
    (problem,) = decide_convolutions(layers=[{"match": "conv2", "terms": terms, "min_rank": 2}]).problems
    assert [(c.rank_low, c.rank_high) for c in problem.choices] == [(1, 3), (0, 0)]
    assert problem.rank_total_low == 2
    assert problem.least_ranks == [2, 0]
    assert problem.least_size == 2 * (12 + 8 * 9)


def test_max_rank_zero_on_every_term_keeps_the_layer_dense() -> None:
    decisions = decide(Mlp(), (20,), layers=[{"match": "fc1", "terms": [term("matrix", max_rank=0)]}, {"match": "*"}])
    assert decisions.dense["fc1"] == ReasonCode.KEPT_BY_RULE
    assert "fc1" not in forms(decisions)


def test_ranks_stay_below_break_even_in_the_budgets_metric() -> None:
    for spec in ({}, {"budget": {"max_macs_fraction": 0.5}}):
        for problem in decide_convolutions(layers=SUMS, **spec).problems:
            for choice in problem.choices:
                size = choice.term.params if not spec else choice.term.macs
                assert size(choice.rank_high) < problem.dense_size <= size(choice.rank_high + 1)


def test_cost_weights_and_factors_make_the_price() -> None:
    spec = {"cost": {"macs": 2.0, "params": 3.0}, "layers": [{"match": "fc", "cost_factor": 5.0}, *SUMS]}
    for problem in decide_convolutions(**spec).problems:
        factor = 5.0 if problem.layer.name == "fc" else 1.0
        for choice in problem.choices:
            expected = factor * (2 * choice.term.macs_per_rank + 3 * choice.term.params_per_rank) / 1e6
            assert choice.unit_price == pytest.approx(expected)
        assert problem.metric == "params"


def test_a_composed_term_is_left_out_under_a_macs_budget() -> None:
    across = {"view": [80, 8], "permute": [0, 1], "matrix": [80, 8]}  # 80 cuts across 32 × 20
    spec = {"layers": [{"match": "fc1", "terms": [term(across)]}]}
    (problem,) = decide(Mlp(), (20,), **spec).problems
    assert problem.choices[0].term.form == Form.COMPOSED
    decisions = decide(Mlp(), (20,), budget={"max_macs_fraction": 0.5}, **spec)
    assert decisions.dense["fc1"] == ReasonCode.NOT_CHEAPER


class Stacked(nn.Module):
    """The weights of four experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 20, 60))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bd,edh->bh", x, self.experts)


def test_a_parameter_of_three_axes_is_a_matrix_by_default() -> None:
    (problem,) = decide(Stacked(), (20,), budget={"max_params_fraction": 0.5}).problems
    assert (problem.layer.kind, problem.choices[0].term.units_max) == ("parameter", 60)  # of 80 × 60


class Zoo(nn.Module):
    """One layer for each reason that a layer's own nature gives."""

    def __init__(self) -> None:
        super().__init__()
        self.unsupported = nn.LayerNorm(20)
        self.shared = nn.Linear(20, 20)
        self.computed = nn.Parameter(torch.randn(20, 20))
        self.table = nn.Parameter(torch.arange(400).reshape(20, 20), requires_grad=False)
        self.other_branch = nn.Linear(20, 20)
        self.fc = nn.Linear(20, 20)
        self.narrow = nn.Linear(20, 1)
        self.spare = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        aside = torch.jit.fork(self.shared, x)
        y = self.unsupported(x) + self.shared(x) + torch.jit.wait(aside)
        y = y + F.linear(x, torch.tanh(self.computed)) + self.narrow(x)
        y = y + F.embedding(torch.zeros([x.size(0)], dtype=torch.int64), self.table).to(x.dtype)
        if x.dim() == 17:
            y = self.other_branch(y)
        return self.fc(y)


class Scalar(nn.Module):
    """A layer whose output has no dimensions leaves every cost unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(20))
        self.fc = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * F.linear(x[0], self.v)


def test_every_reason_is_given_by_some_layer_or_term(tmp_path: Path) -> None:
    """The list is closed: what is in it happens, and what happens is in it."""
    given: set[ReasonCode] = set()
    zoo = decide(Zoo(), (20,))
    assert {name.partition(".")[0]: reason for name, reason in zoo.dense.items()} == {
        "unsupported": ReasonCode.UNSUPPORTED_KIND,
        "shared": ReasonCode.SHARED_WEIGHT,
        "forward": ReasonCode.WEIGHT_NOT_PARAMETER,  # its weight is tanh of `computed`
        "table": ReasonCode.NOT_FLOATING,
        "other_branch": ReasonCode.NOT_EXECUTED,
        "narrow": ReasonCode.NOT_CHEAPER,
        "spare": ReasonCode.UNUSED,
    }
    assert [problem.layer.name for problem in zoo.problems] == ["fc"]
    given |= set(zoo.dense.values())
    given |= set(decide(Scalar(), (20,)).dense.values())
    ruled = decide_convolutions(
        layers=[
            {"match": "conv1", "keep": "dense"},
            {"match": "conv2", "terms": [term("chunked")]},
            {"match": "bn"},
        ]
    )
    given |= set(ruled.dense.values())
    model = tmp_path / "model.pt"
    model.write_bytes(archive(ConvNet()))
    examples = [{"shape": [1, 2, 8, 8]}]
    rules = [
        {"match": "conv1", "terms": [term("matrix"), term("spatial", rank=2)]},
        {
            "match": "conv2",
            "terms": [term("channel"), term("spatial", max_rank=0), term("spatial_transposed", rank=99)],
        },
        {"match": "fc", "cost_factor": 1e-9},  # dense costs next to nothing
    ]
    same = {"view": [8, 2, 9], "permute": [0, 1, 2], "matrix": [8, 18]}
    twice = [term("channel", rank=2), term(same, rank=1)]
    for position, spec in enumerate(
        [
            quick(layers=rules, method={"lambda": 2000.0}, example_inputs=examples),
            quick(layers=[{"match": "conv1", "terms": twice}, {"match": "*", "rank": 2}], example_inputs=examples),
        ]
    ):
        rows = run_learn(tmp_path / str(position), model, spec).final_rows
        given |= {row.reason for row in rows if row.reason is not None}
        assert {row.layer for row in rows} == {"conv1", "bn", "conv2", "fc"}
        assert all(row.reason is not None for row in rows)
    assert given == set(ReasonCode), sorted(set(ReasonCode) - given)


def test_every_reason_is_documented() -> None:
    assert set(REASON_MEANINGS) == set(ReasonCode)
    page = (Path(__file__).parents[2] / "docs" / "reasons.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z_]+)`", page, re.MULTILINE)) == {code.value for code in ReasonCode}


def test_no_layer_to_compress_says_why(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(archive(nn.LayerNorm(8)))
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path / "w", model, quick(**HALF, example_inputs=[{"shape": [1, 8]}]))
    assert caught.value.code == ErrorCode.NO_COMPRESSIBLE_LAYER
    assert "UNSUPPORTED_KIND" in caught.value.detail


class Odd(nn.Module):
    """Parameters that rules may name, and some of which nothing can be made less."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(20, 4)
        self.empty = nn.Parameter(torch.ones(0, 5))
        self.codes = nn.Parameter(torch.ones(20, 20, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.codes.float()) + self.empty.sum()


def test_parameters_without_elements_or_floating_point_numbers(tmp_path: Path) -> None:
    (model := tmp_path / "odd.pt").write_bytes(archive(Odd()))
    spec = quick(
        layers=[{"match": "parameter:empty"}, {"match": "parameter:codes"}, {"match": "nothing"}],
        budget={"max_params_fraction": 0.9},
        example_inputs=[{"shape": [2, 20]}],
    )
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path / "work", model, spec)
    assert caught.value.code == ErrorCode.NO_COMPRESSIBLE_LAYER
    said = caught.value.detail
    assert "rule 0" not in said  # it decides the empty one
    assert "rule 1 ('parameter:codes') decides no parameter" in said
    assert "rule 2 ('nothing') decides no layer" in said
    assert "NOT_CHEAPER" in said


def test_a_kind_that_no_term_fits_is_shown(tmp_path: Path) -> None:
    (model := tmp_path / "mlp.pt").write_bytes(archive(Mlp()))
    spec = quick(
        layers=[{"terms": [{"type": "tucker2"}, {"reshape": "spatial"}]}],
        budget={"max_params_fraction": 0.9},
        example_inputs=[{"shape": [2, 20]}],
    )
    with pytest.raises(ProblemError, match=r"fc1 is of kind linear .* 32×20; .* 0 \(tucker2\), 1 \(low"):
        run_learn(tmp_path / "work", model, spec)
    codes = quick(layers=[{"terms": [{"type": "quantize", "values": 4}]}], example_inputs=[{"shape": [2, 20]}])
    with pytest.raises(ProblemError, match="need a budget in bytes"):
        run_learn(tmp_path / "work", model, codes | {"budget": {"max_macs_fraction": 0.5}})
    with pytest.raises(ProblemError, match="code and places in the file"):
        run_learn(tmp_path / "work", model, codes | {"budget": {"max_bytes_fraction": 0.5}})
