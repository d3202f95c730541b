"""A job for the real engine that is over in seconds and still passes every kind of step several times."""

from pathlib import Path

import numpy as np
import torch
from fleet import RealJob
from torch import nn

FEATURES, CLASSES, SAMPLES = 16, 4, 384
SPEC = {
    "budget": {"max_params_fraction": 0.5},
    "method": {"mu": {"steps": 6}},
    "training": {"epochs_per_step": 3, "batch_size": 32, "optimizer": {"lr": 0.02}},
    "fine_tune": {"epochs": 2},
    "device": "cpu",
}


def make_real_job(folder: Path) -> RealJob:
    """Points around four centres, and a perceptron with dropout: its random states must be resumed too."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, FEATURES)) * 2
    targets = random.integers(0, CLASSES, SAMPLES)
    inputs = (centres[targets] + random.normal(size=(SAMPLES, FEATURES))).astype(np.float32)
    np.savez(folder / "train.npz", inputs=inputs, targets=targets)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.from_numpy(inputs)), torch.from_numpy(targets)).backward()
        optimizer.step()
    torch.jit.script(network.eval()).save(str(folder / "net.pt"))
    return RealJob(folder / "net.pt", folder / "train.npz", SPEC)


def read_real_job(folder: Path) -> RealJob | None:
    """The job that was made in this folder before."""
    model = folder / "net.pt"
    return RealJob(model, folder / "train.npz", SPEC) if model.exists() else None
