"""The literal mode against a literal transcription of the slides' pseudocode: plain PyTorch, full SVD, fixed sweeps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny_jobs import Learned, archive, run_learn
from torch import Tensor, nn
from torch.nn import functional as F

from worker.engine.data import epoch_order
from worker.engine.methods.learning_compression import LEARNING_STREAM
from worker.engine.methods.learning_rate import step_rate

STEPS, EPOCHS, BATCH, RATE, SEED, SWEEPS = 5, 2, 32, 0.05, 7, 10
MU_FIRST, GROWTH = 1e-3, 1.1
Reshape = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(F.relu(self.conv(x)), 4).flatten(1))


# --- the transcription ------------------------------------------------------------------------------------------------


def low_rank(matrix: Tensor, threshold: float) -> tuple[Tensor, int]:
    """argmin over r and Θ of threshold·r + ‖matrix − Θ‖², rank Θ = r."""
    u, s, v = scipy.linalg.svd(matrix.numpy(), full_matrices=False)
    rank = int((s**2 > threshold).sum())
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]), rank


def pseudocode(
    net: nn.Module, terms: dict[str, Sequence[Reshape]], lam: float, x: Tensor, y: Tensor
) -> list[tuple[list[int], list[Tensor]]]:
    """W ← reference; Θ ← 0, r ← 0; for μ₁ < μ₂ < …: L step, C step; ranks and Θ of every term at every step."""
    weights = {name: net.get_parameter(f"{name}.weight") for name in terms}
    theta = {name: [torch.zeros_like(w, dtype=torch.float64) for _ in terms[name]] for name, w in weights.items()}
    history = []
    for step in range(STEPS):
        mu = MU_FIRST * GROWTH**step
        rate = step_rate(RATE, step, STEPS, mu)
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, nesterov=True)
        for epoch in range(EPOCHS):  # W ← argmin L(W) + (μ/2) Σ ‖W − Θ‖²
            order = torch.from_numpy(epoch_order(len(x), SEED, LEARNING_STREAM, step, epoch))
            for rows in order.split(BATCH):
                loss = F.cross_entropy(net(x[rows]), y[rows])
                for name, w in weights.items():
                    loss = loss + mu / 2 * (w - sum(theta[name]).to(w.dtype)).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        ranks = []
        for name, w in weights.items():
            own = [0] * len(terms[name])
            for _ in range(SWEEPS if len(own) > 1 else 1):
                for i, (there, back) in enumerate(terms[name]):  # (Θᵢ, rᵢ) ← argmin λ C + (μ/2) ‖(W − Σ others) − Θᵢ‖²
                    residual = w.detach().double() - (sum(theta[name]) - theta[name][i])
                    matrix = there(residual)
                    alpha = sum(matrix.shape) / 1e6  # parameters of one rank, λ being per million
                    made, own[i] = low_rank(matrix, 2 * lam * alpha / mu)
                    theta[name][i] = back(made)
            ranks += own
        history.append((ranks, [part.clone() for name in terms for part in theta[name]]))
    return history


CHANNEL: Reshape = (lambda w: w.reshape(8, 27), lambda m: m.reshape(8, 3, 3, 3))
SPATIAL: Reshape = (
    lambda w: w.permute(0, 2, 1, 3).reshape(24, 9),
    lambda m: m.reshape(8, 3, 3, 3).permute(0, 2, 1, 3),
)
MATRIX: Reshape = (lambda w: w, lambda m: m)
NAMED = {"channel": CHANNEL, "spatial": SPATIAL, "matrix": MATRIX}

# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Small, Tensor, Tensor]:
    folder = tmp_path_factory.mktemp("literal")
    torch.manual_seed(3)
    net = Small()
    with torch.no_grad():  # something for each reshape to find
        for _ in range(2):
            net.conv.weight += torch.randn(8, 1, 3, 1) @ torch.randn(1, 3, 1, 3) * 0.3  # rank 1 under `spatial`
            net.conv.weight += torch.randn(8, 1, 1, 1) * torch.randn(1, 3, 3, 3) * 0.3  # rank 1 under `channel`
    generator = np.random.default_rng(3)
    x = generator.standard_normal((160, 3, 8, 8)).astype(np.float32)
    y = generator.integers(0, 10, 160)
    held = {f"{p}_{n}": a[:16] for p in ("val", "test") for n, a in (("inputs", x), ("targets", y))}
    np.savez(folder / "data.npz", inputs=x, targets=y, **held)
    (folder / "model.pt").write_bytes(archive(net))
    return folder / "model.pt", folder / "data.npz", net, torch.from_numpy(x), torch.from_numpy(y)


def literal_spec(lam: float, order: Sequence[str]) -> dict[str, object]:
    return {
        "layers": [{"match": "conv", "terms": [{"reshape": name} for name in order]}, {"match": "*"}],
        "method": {
            "multipliers": False,
            "c_step": {"sweeps": SWEEPS},
            "mu": {"initial": MU_FIRST, "growth": GROWTH, "steps": STEPS},
            "lambda": lam,
        },
        "objective": {"distillation": 0.0},
        "training": {"epochs_per_step": EPOCHS, "batch_size": BATCH, "optimizer": {"lr": RATE}},
        "fine_tune": {"epochs": 0},
        "seed": SEED,
        "device": "cpu",
    }


def terms_of_step(learned: Learned, step: int, order: Sequence[str]) -> list[tuple[int, Tensor]]:
    """Rank and Θ of every term after a step, from the checkpoint."""
    tensors = learned.after_steps[step].tensors
    made = []
    for key, name in zip(("0.0", "0.1", "1.0"), (*order, "matrix"), strict=True):
        left, right = tensors[f"theta.{key}.left"], tensors[f"theta.{key}.right"]
        made.append((left.shape[1], NAMED[name][1](left @ right)))
    return made


@pytest.mark.parametrize("order", [("channel", "spatial"), ("spatial", "channel")])
@pytest.mark.parametrize("lam", [4.0, 10.0, 25.0])  # past break-even within the loop; in the middle; from rank zero
def test_equals_the_pseudocode(
    lam: float, order: tuple[str, str], problem: tuple[Path, Path, Small, Tensor, Tensor], tmp_path: Path
) -> None:
    model, data, net, x, y = problem
    net.load_state_dict(torch.jit.load(str(model)).state_dict())
    terms = {"conv": [NAMED[name] for name in order], "fc": [MATRIX]}
    history = pseudocode(net.train(), terms, lam, x, y)
    learned = run_learn(tmp_path, model, literal_spec(lam, order), data)
    assert len(learned.after_steps) == STEPS
    for step, (ranks, theta) in enumerate(history):
        found = terms_of_step(learned, step, order)
        assert [rank for rank, _ in found] == ranks, f"step {step}"
        for (_, mine), theirs in zip(found, theta, strict=True):
            assert float((mine - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1e-3), f"step {step}"
