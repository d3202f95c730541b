"""What the loop holds beside the network, its gradients, its momentum and the reference: bytes of every live tensor."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import quick, run_learn, save_data, save_model
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from worker.engine.observer import Recorder, Saved
from worker.engine.training import Penalty

SIZE = 160
STATE_MAX = 16.0  # bytes per weight, with two terms
OTHERS = 4 * 4.0  # weights, gradients, momentum, reference


class Wide(nn.Module):
    """Nearly all of its weights are in layers that are compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(4)))
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(x)))


class Forgetful(Recorder):
    """Keeps no checkpoint: those would count as state."""

    def checkpoint(self, save: Callable[[], Saved], position: int, *, must: bool = False) -> None:
        """Do nothing."""


def live_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once."""
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and not isinstance(each, UninitializedTensorMixin) and not each.is_meta:
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_at_most_16_bytes_per_weight_with_two_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model.pt", Wide())
    data = save_data(tmp_path / "data.npz", model, (SIZE,), count=32, parts=("val_",))
    weights = sum(parameter.numel() for parameter in torch.jit.load(str(model)).parameters())
    gc.collect()
    before, measured = live_bytes(), []
    add_gradient = Penalty.add_gradient

    def add_and_measure(penalty: Penalty) -> None:
        add_gradient(penalty)
        measured.append((live_bytes() - before) / weights)

    monkeypatch.setattr(Penalty, "add_gradient", add_and_measure)
    terms = [{"type": "low_rank", "reshape": "matrix"}, {"type": "low_rank", "reshape": "chunked"}]
    spec: dict[str, Any] = quick(
        budget={"max_params_fraction": 0.6},
        layers=[{"match": "*", "terms": terms}],
        method={"mu": {"steps": 3, "initial": 1e-3}},
        training={"batch_size": 8},
        fine_tune={"epochs": 0},
    )
    run_learn(tmp_path / "work", model, spec, data, observer=Forgetful())
    assert len(measured) >= 3 * 4
    assert max(measured) > OTHERS + 4  # what is there is counted
    assert max(measured) - OTHERS <= STATE_MAX
