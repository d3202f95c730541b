"""Budgets of networks with an LSTM: its multiply-adds are seen, and composing its weights does not lower them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import Learned, quick, run_learn, save_model
from torch import Tensor, nn

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import make_plan
from worker.engine.emission import emit
from worker.engine.network.costs import count_macs
from worker.engine.network.load import load_model

STEPS, WIDTH, HIDDEN, STATE, TAGS = 5, 48, 96, 8, 4
FRONT, RNN, HEAD = WIDTH * HIDDEN, 4 * STATE * (HIDDEN + STATE), STATE * TAGS


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(WIDTH, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, STATE, batch_first=True)
        self.head = nn.Linear(STATE, TAGS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.relu(self.front(x)))[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tagger") / "model.pt", Tagger())


def learned_with(model: Path, work_dir: Path, **spec: Any) -> Learned:
    return run_learn(work_dir, model, quick(example_inputs=[{"shape": [1, STEPS, WIDTH]}], **spec))


def macs_of(path: Path) -> int:
    return count_macs(load_model(path), (torch.randn(1, STEPS, WIDTH),))


def test_a_budget_in_macs_is_of_the_whole_network(model: Path, tmp_path: Path) -> None:
    whole = STEPS * (FRONT + RNN + HEAD)
    assert macs_of(model) == whole
    learned = learned_with(model, tmp_path, budget={"max_macs_fraction": 0.6})
    emit(model, tmp_path)
    assert learned.plan["limit"] == int(0.6 * whole)
    reached = macs_of(tmp_path / "artifact.pt")
    assert learned.plan["limit"] - STEPS * (WIDTH + HIDDEN) < reached <= learned.plan["limit"]
    assert sum(row.macs for row in learned.final_rows) == reached


def test_what_the_lstm_takes_cannot_be_saved(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as refused:
        learned_with(model, tmp_path, budget={"max_macs": STEPS * RNN})
    assert refused.value.code == ErrorCode.CONSTRAINT_UNREACHABLE


def test_composed_weights_keep_their_multiply_adds(model: Path, tmp_path: Path) -> None:
    learned = learned_with(model, tmp_path, budget={"max_params_fraction": 0.5})
    emit(model, tmp_path)
    plan = {layer.name: layer for layer in make_plan(learned.recorder.facts, learned.final_rows)}
    weight = plan["rnn.weight_ih_l0"]
    assert weight.macs == STEPS * 4 * STATE * HIDDEN
    assert all(term.macs_stay for term in weight.terms)
    assert weight.compressed_macs == weight.macs
    assert (plan["rnn"].kind, plan["rnn"].macs, plan["rnn"].calls) == ("lstm", 0, 1)
    assert sum(layer.compressed_macs or 0 for layer in plan.values()) == macs_of(tmp_path / "artifact.pt")
