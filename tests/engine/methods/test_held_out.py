"""Whether held-out rows are new to the reference decides which iterate `fine_tune.keep: auto` keeps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import CLASSES, Mlp, quick, run_learn, save_model
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("plain_executor")

SAMPLES = 160


def noisy_rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose classes are random, so that they can only be remembered."""
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((SAMPLES, 20)).astype(np.float32),
        generator.integers(0, CLASSES, SAMPLES).astype(np.int64),
    )


@pytest.fixture(scope="module")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on the rows of seed 0 until it knew them."""
    torch.manual_seed(0)
    network = nn.Sequential(Mlp(hidden=64))
    inputs, targets = (torch.from_numpy(each) for each in noisy_rows(0))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        torch.autograd.backward([F.cross_entropy(network(inputs), targets)])
        optimizer.step()
    assert (network(inputs).argmax(dim=1) == targets).all()
    path = tmp_path_factory.mktemp("reference") / "model.pt"
    torch.jit.save(torch.jit.script(network), path)
    return path


def kept(tmp_path: Path, model: Path, arrays: dict[str, np.ndarray], **changes: Any) -> tuple[str, dict[str, Any]]:
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    spec = quick(budget={"max_params_fraction": 0.6}, fine_tune={"epochs": 3}, **changes)
    learned = run_learn(tmp_path / "w", model, spec, data)
    return learned.recorder.specs[-1]["fine_tune"]["keep"], learned.plan["notes"]


def test_rows_that_the_reference_was_trained_on_keep_the_last_iterate(tmp_path: Path, remembering: Path) -> None:
    inputs, targets = noisy_rows(0)
    keep, notes = kept(tmp_path, remembering, {"inputs": inputs, "targets": targets})
    assert (keep, notes["fine_tune_best_epoch"]) == ("last", 3)


def test_new_rows_choose_between_iterates(tmp_path: Path, remembering: Path) -> None:
    (inputs, targets), (new_inputs, new_targets) = noisy_rows(0), noisy_rows(1)
    arrays = {"inputs": inputs, "targets": targets, "val_inputs": new_inputs, "val_targets": new_targets}
    assert kept(tmp_path, remembering, arrays)[0] == "best"


@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_a_choice_of_the_spec_stands(tmp_path: Path, remembering: Path, distillation: float) -> None:
    inputs, targets = noisy_rows(0)
    changes = {"objective": {"distillation": distillation}}
    spec = quick(budget={"max_params_fraction": 0.6}, fine_tune={"keep": "best"}, **changes)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=targets)
    learned = run_learn(tmp_path / "w", remembering, spec, tmp_path / "data.npz")
    assert learned.recorder.specs[-1]["fine_tune"]["keep"] == "best"


def test_outputs_to_match_are_remembered_by_nobody(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp())
    assert kept(tmp_path, model, {"inputs": noisy_rows(0)[0]})[0] == "best"
