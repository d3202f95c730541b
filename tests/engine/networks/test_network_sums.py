"""Sums of terms, rules for parameters, tied weights, rank 0, and what is compressed a second time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_cases import CASES
from corpus_harness import Compressed, FreshTorch, check_fresh, check_plan, prepare, run_case
from corpus_sums import SUMS, Sum, low_rank, prune, quantize

from service.contract.plan import Form

pytestmark = pytest.mark.usefixtures("plain_executor")

MATRICES = [low_rank("channel"), low_rank("matrix")]  # of which one applies
QUICK = [name for name, made in SUMS.items() if made.quick]


def _compress_and_use(asked: Sum, folder: Path, fresh: FreshTorch) -> None:
    case = replace(CASES[asked.network], kinds=frozenset(), compressed=())
    model, data = prepare(folder, case, asked.way)
    spec: dict[str, Any] = {"layers": asked.layers}
    made = run_case(folder, model, data, case, spec if asked.budget is None else spec | {"budget": asked.budget})
    coded = any(layer.terms and _codes(layer.terms) for layer in made.plan) or "then" in str(asked.layers)
    check_plan(made, case, stored_only=coded)
    shown = made.forms()
    assert asked.forms <= set().union(*shown.values()), shown
    assert made.artifact.stat().st_size <= asked.file_fraction * made.model.stat().st_size
    check_fresh(made, case, fresh)


def _codes(terms: list[Any]) -> bool:
    return any(term.form in {Form.QUANTIZED, Form.PRUNED} for term in terms)


@pytest.mark.parametrize("name", QUICK)
def test_a_few_sums(name: str, tmp_path: Path, fresh: FreshTorch) -> None:
    _compress_and_use(SUMS[name], tmp_path, fresh)


@pytest.mark.networks
@pytest.mark.parametrize("name", [name for name in SUMS if name not in QUICK])
def test_sums(name: str, tmp_path: Path, fresh: FreshTorch) -> None:
    _compress_and_use(SUMS[name], tmp_path, fresh)


@pytest.mark.networks
@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize("terms", [MATRICES, [quantize(values=8)]], ids=["low_rank", "quantized"])
def test_tied_weights_are_one_decision(way: Any, terms: Any, tmp_path: Path, fresh: FreshTorch) -> None:
    case = replace(CASES["gpt"], kinds=frozenset(), compressed=())
    model, data = prepare(tmp_path, case, way)
    reference = torch.jit.load(str(model))
    spec = {"layers": [{"match": "*", "terms": terms}], "budget": {"max_bytes_fraction": 0.6}}
    made = run_case(tmp_path, model, data, case, spec)
    table = dict(reference.named_parameters())["wte.weight"]
    tied = [layer for layer in made.plan if layer.weight_shape == list(table.shape)]
    assert len(tied) == 1, [layer.name for layer in tied]
    assert tied[0].form is not Form.DENSE, tied[0].reason
    dense = [p for p in torch.jit.load(str(made.artifact)).parameters() if p.shape == table.shape]
    assert not dense
    check_fresh(made, case, fresh)


@pytest.mark.networks
@pytest.mark.parametrize(("network", "layer"), [("lenet300", "fc2"), ("autoencoder", "decoder.2"), ("lenet5", "conv2")])
def test_rank_zero_leaves_the_bias_alone(network: str, layer: str, tmp_path: Path, fresh: FreshTorch) -> None:
    case = replace(CASES[network], kinds=frozenset(), compressed=())
    model, data = prepare(tmp_path, case, "scripted")
    rules = [
        {"match": layer, "terms": MATRICES, "min_rank": 0},
        {"match": "*", "terms": MATRICES, "rank": 4},
    ]
    made = run_case(tmp_path, model, data, case, {"layers": rules, "method": {"lambda": 1e9}})
    plan = {one.name: one for one in made.plan}[layer]
    assert plan.form is Form.BIAS_ALONE, (plan.form, plan.reason)
    bias = dict(torch.jit.load(str(model)).named_parameters())[f"{layer}.bias"]
    assert plan.compressed_params == bias.numel()
    assert plan.compressed_macs == 0
    check_plan(made, case)
    check_fresh(made, case, fresh, cut=True)


TWICE: list[tuple[str, Any, Any]] = [
    ("lenet5", MATRICES, MATRICES),
    ("lenet300", [low_rank()], [quantize(values=8)]),
    ("lenet300", [{"match": "fc1", "terms": [quantize(values=16)]}, {"match": "*", "keep": "dense"}], [low_rank()]),
    ("lenet300", [low_rank(rank=20), prune(keep_fraction=0.05)], "auto"),
    ("resnet20", "auto", "auto"),
    ("text_encoder", "auto", "auto"),
    ("autoencoder", "auto", "auto"),
    ("lstm_tagger", "auto", [{"match": "parameter:*", "terms": [quantize(values=16)]}]),
]


@pytest.mark.networks
@pytest.mark.parametrize(("network", "first", "second"), TWICE)
def test_an_artifact_is_a_model(network: str, first: Any, second: Any, tmp_path: Path, fresh: FreshTorch) -> None:
    case = replace(CASES[network], kinds=frozenset(), compressed=())
    model, data = prepare(tmp_path, case, "scripted")
    once = run_case(tmp_path / "1", model, data, case, _half(first))
    twice = run_case(tmp_path / "2", once.artifact, data, case, _half(second, 0.8))
    assert twice.artifact.stat().st_size < once.artifact.stat().st_size
    check_fresh(twice, case, fresh)
    _same_interface(once, twice)


def _half(terms: Any, fraction: float = 0.5) -> dict[str, Any]:
    """Terms for every layer, or rules; half the size where they leave it open."""
    given = isinstance(terms, list) and "match" in terms[0]
    rules = terms if given else [{"match": "*", "terms": terms}]
    flat = [term for rule in rules if terms != "auto" and "keep" not in rule for term in rule["terms"]]
    sized = bool(flat) and all(term["type"] == "quantize" or {"keep_fraction", "rank"} & set(term) for term in flat)
    return {"layers": rules} | ({} if sized else {"budget": {"max_params_fraction": fraction}})


def _same_interface(once: Compressed, twice: Compressed) -> None:
    first, second = (torch.jit.load(str(made.artifact)) for made in (once, twice))
    assert first._c._method_names() == second._c._method_names()
    assert [str(a.type) for a in first.forward.schema.arguments[1:]] == [
        str(a.type) for a in second.forward.schema.arguments[1:]
    ]


@pytest.mark.networks
def test_methods_attributes_and_mode_stay(tmp_path: Path, fresh: FreshTorch) -> None:
    case = CASES["exported"]
    model, data = prepare(tmp_path, case, "scripted")
    rules = [{"match": "*", "terms": [low_rank()]}]
    made = run_case(tmp_path, model, data, case, {"layers": rules, "budget": {"max_params_fraction": 0.6}})
    artifact, reference = torch.jit.load(str(made.artifact)), torch.jit.load(str(model))
    x = torch.randn(3, 24)
    assert artifact.label(1) == "green"
    assert (artifact.scale, list(artifact.labels), tuple(artifact.sizes)) == (0.5, reference.labels, (24, 128))
    assert artifact.training is reference.training is False
    with torch.no_grad():
        assert artifact.embed(x).shape == (3, 8)
        features = artifact.features(x)
        assert features.shape == (3, 128)
    seen = float(artifact.seen)
    artifact(x)
    assert float(artifact.seen) == seen + 1


@pytest.mark.networks
def test_a_model_saved_in_train_mode_comes_back_in_it(tmp_path: Path, fresh: FreshTorch) -> None:
    case = CASES["train_mode"]
    model, data = prepare(tmp_path, case, "scripted")
    made = run_case(tmp_path, model, data, case)
    artifact = torch.jit.load(str(made.artifact))
    assert artifact.training
    with torch.no_grad():
        means = [buffer.clone() for name, buffer in artifact.named_buffers() if name.endswith("running_mean")]
        artifact(torch.randn(8, 3, 32, 32))
    after = [buffer for name, buffer in artifact.named_buffers() if name.endswith("running_mean")]
    assert means
    assert all(not torch.equal(one, other) for one, other in zip(means, after, strict=True))
