from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from served import Service
from torch import nn

FEATURES, CLASSES, SAMPLES = 16, 4, 512


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"))
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Points around four centres: a task that any reasonable network learns at once."""
    path = tmp_path_factory.mktemp("data") / "train.npz"
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, FEATURES)) * 2
    targets = random.integers(0, CLASSES, SAMPLES)
    inputs = (centres[targets] + random.normal(size=(SAMPLES, FEATURES))).astype(np.float32)
    np.savez(path, inputs=inputs, targets=targets)
    return path


@pytest.fixture(scope="session")
def model_file(data_file: Path) -> Path:
    """A small multilayer perceptron, trained and scripted."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES)
    )
    with np.load(data_file) as data:
        inputs, targets = torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    path = data_file.with_name("model.pt")
    torch.jit.script(network.eval()).save(str(path))
    return path
