"""Losses that users bring, on networks of five kinds: learned with, emitted, verified, reported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from own_objectives import CASES, Case, save_case
from safetensors.torch import load_file
from tiny_jobs import quick

from service.contract.ids import MODEL, new_id
from service.contract.plan import Form
from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import FINAL_STATE, Sources, learn
from worker.engine.observer import Recorder
from worker.engine.verification import summarise, verify

OWN = {"module": new_id(MODEL)}


def asked(case: Case, **changes: Any) -> dict[str, Any]:
    training = {"optimizer": {"lr": 0.02}}
    return quick(
        budget={"max_params_fraction": 0.5}, objective={"loss": OWN}, training=training, **(case.spec or {}), **changes
    )


def run(case: Case, directory: Path, **changes: Any) -> Report:
    """Learn, emit and verify in this process."""
    model, data, objective = save_case(case, directory)
    spec, work_dir = parse_spec(asked(case, **changes)), directory / "work"
    work_dir.mkdir()
    sources = Sources(model, data, "npz", work_dir, objective)
    recorder = Recorder()
    learn(sources, spec, recorder)
    assert recorder.specs[-1]["objective"]["loss"] == OWN
    emit(model, work_dir)
    return verify(sources, spec, {}, list)


@pytest.mark.parametrize("name", list(CASES))
def test_a_loss_of_ones_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    report = run(case, tmp_path)
    assert any(layer.form is not Form.DENSE for layer in report.layers)
    assert report.params_fraction <= 0.5
    assert (report.metric_name, report.higher_is_better) == (case.metric, case.higher_is_better)
    first = report.differences[0]
    assert (first.name, first.higher_is_better, first.samples) == (case.metric, case.higher_is_better, 80)
    assert first.unit_samples == 1
    assert first.low < first.difference < first.high
    assert first.difference == pytest.approx(report.compressed.metric - report.reference.metric, abs=1e-6)
    assert first.verdict in {"better", "worse", "unclear"}
    assert summarise(report).metric_difference_low == first.low
    assert [each.name for each in report.differences] == ([case.metric, "loss"] if case.metric != "loss" else ["loss"])


def test_what_is_learned_is_the_loss(tmp_path: Path) -> None:
    """The same job without an L step or fine-tuning is worse in the module's own loss."""
    losses = [
        run(CASES["unet"], tmp_path / name, fine_tune={"epochs": epochs}, method={"mu": {"steps": steps}})
        for name, epochs, steps in (("trained", 6, 3), ("untrained", 0, 1))
    ]
    assert losses[0].compressed.loss < 0.9 * losses[1].compressed.loss
    assert losses[0].reference.loss == losses[1].reference.loss


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    case = CASES["unet"]
    model, data, objective = save_case(case, tmp_path)
    spec, ends = parse_spec(asked(case)), []
    saved = None
    for name in ("whole", "resumed"):
        (work_dir := tmp_path / name).mkdir()
        recorder = Recorder()
        learn(Sources(model, data, "npz", work_dir, objective), spec, recorder, saved)
        kept = [each for each in recorder.checkpoints if each.state["stage"] == "learning" and each.state["step"] == 1]
        saved = kept[-1] if kept else None
        ends.append(load_file(work_dir / FINAL_STATE))
    assert list(ends[0]) == list(ends[1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("name", list(CASES))
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    report = run(CASES[name], tmp_path, device="cuda")
    assert report.params_fraction <= 0.5
    assert report.differences[0].low <= report.differences[0].difference <= report.differences[0].high
