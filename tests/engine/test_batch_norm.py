"""Re-estimated batch-norm statistics are those that PyTorch's own cumulative averages become, whatever the momentum."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from service.contract.spec import DataSpec
from worker.engine import batch_norm
from worker.engine.batch_norm import reestimate, statistics_of
from worker.engine.data import Dataset, epoch_order

CPU = torch.device("cpu")


class Normed(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.first = nn.BatchNorm2d(6, momentum=momentum)
        self.dropout = nn.Dropout(0.2)
        self.second = nn.BatchNorm1d(6, momentum=0.3, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(self.conv(x))).mean(dim=(2, 3))
        return self.head(self.second(self.dropout(hidden)))


def loaded(module: nn.Module, example: torch.Tensor | None = None) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.jit.script(module) if example is None else torch.jit.trace(module, example)
        torch.jit.save(made, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def images(count: int = 100) -> Dataset:
    random = np.random.default_rng(0)
    x = 3 + 2 * random.standard_normal((count, 2, 5, 5)).astype(np.float32)
    return Dataset({"inputs": x, "targets": random.integers(0, 3, count)}, DataSpec(), 0, ["x"])


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
def test_statistics_are_those_of_all_samples(momentum: float | None) -> None:
    torch.manual_seed(1)
    net = Normed(momentum)
    net.dropout.p = 0.0
    module, data = loaded(net), images()
    module.eval()
    count = module.first.num_batches_tracked.clone()
    assert reestimate(module, data, 16, CPU, 0)
    rows = epoch_order(data.size("train"), 0, 0xB9)
    net.train()
    with torch.no_grad():
        hidden = net.conv(data.rows("train", rows, CPU).inputs[0])
        assert torch.allclose(module.first.running_mean, hidden.mean(dim=(0, 2, 3)), atol=1e-5)
        assert torch.allclose(module.first.running_var, hidden.var(dim=(0, 2, 3)), rtol=1e-2)
        net(data.rows("train", rows, CPU).inputs[0])
    assert torch.allclose(module.second.running_mean, net.second.running_mean / 0.3, rtol=2e-2, atol=1e-4)
    assert torch.equal(module.first.num_batches_tracked, count)
    assert not module.training


def test_it_repeats_and_leaves_the_random_states_alone() -> None:
    module, data = loaded(Normed()), images()
    before = torch.get_rng_state()
    assert reestimate(module, data, 32, CPU, 5)
    once = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert torch.equal(torch.get_rng_state(), before)
    assert reestimate(module, data, 32, CPU, 5)
    assert all(torch.equal(buffer, once[name]) for name, buffer in module.named_buffers())


def test_layers_that_do_not_follow_keep_their_statistics() -> None:
    data = images()
    module = loaded(Normed().eval(), torch.randn(2, 2, 5, 5))  # traced: training mode changes nothing any more
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    assert statistics_of(module)
    assert not reestimate(module, data, 32, CPU, 0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    plain = loaded(nn.Linear(3, 3))
    assert not statistics_of(plain)
    assert not reestimate(plain, data, 32, CPU, 0)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = batch_norm.call

    def small(module: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(module, inputs)

    monkeypatch.setattr(batch_norm, "call", small)
    assert reestimate(loaded(Normed()), images(), 32, CPU, 0)
    assert sizes[:3] == [32, 16, 8]
    assert set(sizes[2:]) == {8}
