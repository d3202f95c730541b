"""A loss that explodes without becoming NaN counts as diverged, and the step is repeated more slowly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.spec import parse_spec
from worker.engine.learn import Sources, learn
from worker.engine.observer import Recorder


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    torch.jit.script(network).save(str(tmp_path / "model.pt"))
    inputs = np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs)
    return Sources(tmp_path / "model.pt", tmp_path / "data.npz", "npz", tmp_path)


def test_a_rate_far_too_high_fails_as_diverged_and_says_what_to_change(sources: Sources) -> None:
    spec = parse_spec(
        {
            "budget": {"max_macs_fraction": 0.5},
            "method": {"mu": {"steps": 2}},
            "training": {"optimizer": {"lr": 5.0}, "batch_size": 32},
        }
    )
    recorder = Recorder()
    with pytest.raises(ProblemError) as caught:
        learn(sources, spec, recorder)
    assert caught.value.code == ErrorCode.DIVERGED
    assert "training.optimizer.lr" in caught.value.detail
    warnings = [data["code"] for kind, data in recorder.events if kind == EventKind.WARNING]
    assert warnings.count("L_STEP_DIVERGED") >= 2
