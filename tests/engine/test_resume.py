"""A run taken up again from any of its checkpoints ends with the same numbers, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Learned, Looped, Mlp, quick, run_learn, save_data, save_model
from torch import nn

from worker.checkpoint import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("plain_executor")

SPECS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    # dropout, batch norm, sums of two terms, a budget, multipliers
    "convnet": (ConvNet, (2, 8, 8), quick(budget={"max_macs_fraction": 0.5}, method={"mu": {"steps": 5}})),
    # a given λ, a rate that is tested for, no distillation
    "mlp": (
        Mlp,
        (20,),
        quick(
            method={"lambda": 40.0, "multipliers": False, "mu": {"initial": 0.01}},
            training={"optimizer": {"lr": "auto"}},
            objective={"distillation": 0.0},
            fine_tune={"epochs": 3},
        ),
    ),
    # the literal mode, a layer in a loop
    "looped": (
        Looped,
        (20,),
        quick(
            method={"lambda": 1000.0, "multipliers": False, "c_step": {"sweeps": 2}, "mu": {"initial": 0.01}},
            fine_tune={"epochs": 0},
        ),
    ),
}


def same(one: Learned, other: Learned) -> None:
    assert one.state.keys() == other.state.keys()
    for name, tensor in one.state.items():
        assert torch.equal(tensor, other.state[name]), name
    assert one.plan["recipe"] == other.plan["recipe"]
    assert one.plan["resolved"] == other.plan["resolved"]
    assert one.plan["rows"] == other.plan["rows"]
    assert one.plan["notes"] == other.plan["notes"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_from_every_checkpoint(name: str, tmp_path: Path) -> None:
    make, shape, spec = SPECS[name]
    model = save_model(tmp_path / "model.pt", make())
    data = save_data(tmp_path / "data.npz", model, shape, count=96)
    whole = run_learn(tmp_path / "whole", model, spec, data)
    same(whole, run_learn(tmp_path / "again", model, spec, data))
    count = spec["method"]["mu"]["steps"] + spec["fine_tune"]["epochs"]
    assert len(whole.recorder.checkpoints) == count
    for number, saved in enumerate(whole.recorder.checkpoints):
        message = write_checkpoint(saved, tmp_path / "checkpoints", number)
        resumed = run_learn(tmp_path / str(number), model, spec, data, read_checkpoint(Path(message.path)))
        same(whole, resumed)
        assert len(resumed.recorder.checkpoints) == count - number - 1
        fractions = [progress.fraction for progress in resumed.recorder.progresses]
        assert all(fraction > number / count - 1e-9 for fraction in fractions)


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp())
    data = save_data(tmp_path / "data.npz", model, count=96)
    learned = run_learn(tmp_path / "w", model, quick(budget={"max_params_fraction": 0.5}), data)
    saved = learned.recorder.checkpoints[0]
    message = write_checkpoint(saved, tmp_path / "c", 1)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["position-000000001.safetensors"]
    back = read_checkpoint(Path(message.path))
    assert back.state == saved.state
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in saved.tensors.items())
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no state"):
        read_checkpoint(tmp_path / "other.safetensors")
