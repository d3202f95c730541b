"""Losses that users bring, on networks of five kinds: learned with, emitted, verified, reported."""

from pathlib import Path

import pytest
from own_objectives import CASES, save_case
from tiny_jobs import quick

from service.contract.ids import MODEL, new_id
from service.contract.plan import Form
from service.contract.spec import parse_spec
from worker.engine.emission import emit
from worker.engine.learn import Sources, learn
from worker.engine.observer import Recorder
from worker.engine.verification import summarise, verify


@pytest.mark.parametrize("name", list(CASES))
def test_a_loss_of_ones_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, data, objective = save_case(case, tmp_path)
    loss = {"module": new_id(MODEL)}
    document = quick(
        budget={"max_params_fraction": 0.5},
        objective={"loss": loss},
        training={"optimizer": {"lr": 0.02}},
        **(case.spec or {}),
    )
    spec, work_dir = parse_spec(document), tmp_path / "work"
    work_dir.mkdir()
    sources = Sources(model, data, "npz", work_dir, objective)
    recorder = Recorder()
    learn(sources, spec, recorder)
    assert recorder.specs[-1]["objective"]["loss"] == loss
    emit(model, work_dir)
    report = verify(sources, spec, {}, list)
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
