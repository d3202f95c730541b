"""Agreement with the reference, which takes the place of accuracy where there are no targets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import Mlp, quick, run_learn, save_data, save_model

from service.contract.spec import parse_spec
from worker.engine.agreement import same_answers
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.verification import verify


def test_same_answers_are_counted_per_sample() -> None:
    output = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 5.0], [0.0, 2.0]]])
    other = torch.tensor([[[9.0, 0.0], [0.0, 3.0]], [[0.0, 5.0], [1.0, 2.0]]])
    same = same_answers(output, other, 1)
    assert same is not None
    assert same.tolist() == [1.0, 0.5]
    assert torch.equal(same, same_answers(output, other, -2))


@pytest.mark.parametrize("output", [torch.ones(3), torch.ones(3, 1), torch.ones(3, 2, dtype=torch.int64)])
def test_an_output_without_classes_has_no_agreement(output: torch.Tensor) -> None:
    assert same_answers(output, output, 1) is None


def test_without_targets_the_report_has_error_and_agreement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save_model(tmp_path / "model.pt", Mlp(20, 64))
    with np.load(save_data(tmp_path / "labelled.npz", model)) as labelled:
        np.savez(data := tmp_path / "data.npz", inputs=labelled["inputs"])
    spec = quick(budget={"max_params_fraction": 0.4}, training={"optimizer": {"lr": 0.01}})
    learned = run_learn(tmp_path / "w", model, spec, data=data)
    emit(model, tmp_path / "w")
    report = verify(Sources(model, data, "npz", tmp_path / "w"), parse_spec(spec), {}, list)
    error, agreement = report.differences
    assert (error.name, agreement.name) == ("relative_output_error", "agreement")
    assert error.samples == agreement.samples == report.report_samples
    steps = {row.step for row in learned.recorder.rank_rows if not row.chosen}
    final = {row.step for row in learned.recorder.rank_rows if row.chosen}
    assert 1 in steps <= {1, 2, 3}  # as the events count C steps
    assert final == {4}
    assert -1 <= agreement.low <= agreement.difference <= agreement.high <= 0
