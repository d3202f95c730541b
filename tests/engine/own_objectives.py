"""Small networks whose losses are none of ours, each with its own objective and data that it can learn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.tiny_jobs import archive, save_model

Batch = dict[str, Tensor]


class CrossEntropy(nn.Module):
    """Of classes: what the service itself computes."""

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["targets"])

    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        return (outputs.argmax(1) == batch["targets"]).sum(), len(outputs)


class NotOfOutputs(nn.Module):
    """Of a parameter of its own and the targets: no gradient reaches the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return batch["targets"].mean() * self.scale


class Tagger(nn.Module):
    """Several labels for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 96)
        self.fc2 = nn.Linear(96, 96)
        self.head = nn.Linear(96, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class TaggerLoss(nn.Module):
    higher_is_better: bool

    def __init__(self) -> None:
        super().__init__()
        self.higher_is_better = True
        self.register_buffer("pos_weight", torch.linspace(1.0, 2.0, 6))

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch["targets"], pos_weight=self.pos_weight)

    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        right = (outputs > 0) == (batch["targets"] > 0.5)
        return right.sum(), right.numel()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        coarse = F.relu(self.middle(F.relu(self.down(fine))))
        return self.last(torch.cat([F.relu(self.up(coarse)), fine], dim=1))


class UNetLoss(nn.Module):
    """Cross entropy over pixels; the metric is the mean over the classes' intersections over their unions, pooled."""

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["masks"])

    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        found = F.one_hot(outputs.argmax(1), 3) > 0
        wanted = F.one_hot(batch["masks"], 3) > 0
        return (found & wanted).sum(), (found | wanted).sum()


class Detector(nn.Module):
    """One stage, two scales: a list of maps of an objectness and four numbers of a box for each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.deeper = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.heads = nn.ModuleList([nn.Conv2d(32, 5, 1), nn.Conv2d(32, 5, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = F.relu(self.body(F.relu(self.stem(x))))
        features = [fine, F.relu(self.deeper(fine))]
        outputs: list[Tensor] = []
        for index, head in enumerate(self.heads):
            outputs.append(head(features[index]))
        return outputs


class DetectorLoss(nn.Module):
    """Objectness of every cell and the box of the cell that holds the object; the metric is the box's overlap."""

    def box(self, maps: Tensor, box: Tensor) -> Tensor:
        side = maps.size(2)
        cell = (box[:, :2] * side).long().clamp(0, side - 1)
        return maps[torch.arange(len(box), device=box.device), 1:, cell[:, 1], cell[:, 0]].sigmoid()

    @torch.jit.export
    def loss(self, outputs: list[Tensor], batch: Batch) -> Tensor:
        box = batch["targets.box"]
        total = torch.zeros((), device=box.device)
        for maps in outputs:
            side = maps.size(2)
            cell = (box[:, :2] * side).long().clamp(0, side - 1)
            wanted = torch.zeros_like(maps[:, 0])
            wanted[torch.arange(len(box), device=box.device), cell[:, 1], cell[:, 0]] = 1.0
            total = total + F.binary_cross_entropy_with_logits(maps[:, 0], wanted)
            total = total + F.smooth_l1_loss(self.box(maps, box), box)
        return total

    @torch.jit.export
    def metric(self, outputs: list[Tensor], batch: Batch) -> tuple[Tensor, int]:
        wanted = batch["targets.box"]
        found = self.box(outputs[0], wanted)
        low = torch.maximum(found[:, :2] - found[:, 2:] / 2, wanted[:, :2] - wanted[:, 2:] / 2)
        high = torch.minimum(found[:, :2] + found[:, 2:] / 2, wanted[:, :2] + wanted[:, 2:] / 2)
        inside = (high - low).clamp_min(0).prod(dim=1)
        return (inside / (found[:, 2:].prod(1) + wanted[:, 2:].prod(1) - inside)).sum(), len(wanted)


class Regression(nn.Module):
    """A linear regression: no network at all."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class RegressionLoss(nn.Module):
    """Squares with a ridge would be ours; a Huber loss is not. The metric is the absolute error: less is better."""

    higher_is_better: bool

    def __init__(self) -> None:
        super().__init__()
        self.higher_is_better = False

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.huber_loss(outputs, batch["targets"], delta=0.5)

    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        return (outputs - batch["targets"]).abs().sum(), outputs.numel()


class KernelModel(nn.Module):
    """A Gaussian kernel to fixed centres, and a weight that no nn.Linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.randn(256, 8, generator=torch.Generator().manual_seed(1)))
        self.weight = nn.Parameter(torch.zeros(256, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kernel = torch.exp(-torch.cdist(x, self.centres).square() / 8)
        return torch.matmul(kernel, self.weight), kernel.sum(1)


class HingeLoss(nn.Module):
    """The largest margin of one class against the others; no metric, so the loss is measured."""

    @torch.jit.export
    def loss(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        return F.multi_margin_loss(outputs[0], batch["targets"], margin=0.2)


@dataclass(frozen=True)
class Case:
    """A network, its objective, and what its data are made of."""

    network: Callable[[], nn.Module]
    objective: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    targets: Callable[[Any, Tensor], dict[str, np.ndarray]]  # from the network's own answers and the inputs
    metric: str = "metric"
    higher_is_better: bool = True
    spec: dict[str, Any] | None = None


def _box(_outputs: Any, x: Tensor) -> dict[str, np.ndarray]:
    """A bright rectangle is drawn into the inputs."""
    generator = torch.Generator().manual_seed(3)
    size = 0.25 + 0.25 * torch.rand(len(x), 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(len(x), 2, generator=generator)
    grid = (torch.arange(16) + 0.5) / 16
    inside = ((grid - centre[:, :, None]).abs() <= size[:, :, None] / 2).float()
    x.mul_(0.1).add_(inside[:, None, 1, :, None] * inside[:, None, 0, None, :])
    return {"targets.box": torch.cat([centre, size], dim=1).numpy()}


CASES = {
    "tagger": Case(Tagger, TaggerLoss, (24,), lambda y, _: {"targets": (y > 0).float().numpy()}),
    "unet": Case(
        UNet, UNetLoss, (1, 16, 16), lambda y, _: {"masks": y.argmax(1).numpy()}, spec={"data": {"targets": "masks"}}
    ),
    "detector": Case(Detector, DetectorLoss, (1, 16, 16), _box),
    "regression": Case(Regression, RegressionLoss, (96,), lambda y, _: {"targets": y.numpy()}, higher_is_better=False),
    "kernel": Case(
        KernelModel, HingeLoss, (8,), lambda y, _: {"targets": y[0].argmax(1).numpy()}, "loss", higher_is_better=False
    ),
}


def save_case(case: Case, directory: Path, count: int = 160) -> tuple[Path, Path, Path]:
    """Write model, data and objective."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = save_model(directory / "model.pt", case.network())
    network = torch.jit.load(str(model)).eval()
    arrays: dict[str, np.ndarray] = {}
    for seed, (prefix, samples) in enumerate((("", count), ("test_", count // 2))):
        x = torch.randn(samples, *case.input_shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            targets = case.targets(network(x), x)
        arrays |= {f"{prefix}{name}": array for name, array in {"inputs": x.numpy(), **targets}.items()}
    np.savez(data := directory / "data.npz", **arrays)
    (objective := directory / "loss.pt").write_bytes(archive(case.objective()))
    return model, data, objective
