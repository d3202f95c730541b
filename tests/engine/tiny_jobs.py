"""Tiny networks, data that they can learn, and jobs on them: in this process, or stage by stage as real children."""

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.plan import RankRow
from service.contract.spec import parse_spec
from worker.engine.learn import FINAL_PLAN, FINAL_STATE, Sources, learn
from worker.engine.observer import Recorder, Saved

CLASSES = 4


class Mlp(nn.Module):
    def __init__(self, features: int = 20, hidden: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ConvNet(nn.Module):
    """Strides, padding, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(12 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        return self.fc(self.dropout(F.relu(self.conv2(x)).flatten(1)))


class Looped(nn.Module):
    """One layer that a loop calls, and one inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 20)
        self.extra = nn.Linear(20, 20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x)) + x
        if x.size(0) > 0:
            x = x + self.extra(x)
        return self.head(x)


IMAGE = (2, 8, 8)


def save_model(path: Path, module: nn.Module, seed: int = 0) -> Path:
    """Script a network with weights of a seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:  # a spectrum that falls, as that of a trained network does
                matrix = torch.randn(parameter.shape[0], parameter[0].numel())
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                s = s[0] * 0.75 ** torch.arange(len(s))
                parameter.copy_(((u * s) @ v).reshape(parameter.shape) / matrix.shape[1] ** 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), path)
    return path


def save_data(path: Path, model: Path, shape: Sequence[int] = (20,), count: int = 192, **options: Any) -> Path:
    """Inputs by a seed, with the network's own answers as classes."""
    generator = np.random.default_rng(options.pop("seed", 0))
    module = torch.jit.load(str(model)).eval()

    def part(prefix: str, samples: int) -> dict[str, np.ndarray]:
        x = generator.standard_normal((samples, *shape)).astype(np.float32)
        with torch.no_grad():
            y = module(torch.from_numpy(x)).argmax(dim=1).numpy()
        return {f"{prefix}inputs": x, f"{prefix}targets": y}

    arrays = part("", count)
    for prefix in options.pop("parts", ()):
        arrays |= part(prefix, count // 3)
    np.savez(path, **arrays)
    return path


QUICK: dict[str, Any] = {
    "method": {"mu": {"steps": 3}},
    "training": {"epochs_per_step": 1, "batch_size": 64, "optimizer": {"lr": 0.05}},
    "fine_tune": {"epochs": 1},
    "device": "cpu",
}


def quick(**changes: Any) -> dict[str, Any]:
    """Make a spec of few and short steps; nested objects are merged."""
    return _merged(QUICK, changes)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made = json.loads(json.dumps(base))
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict) and key not in {"budget"}
        made[key] = _merged(made[key], value) if both else value
    return made


@dataclass
class Learned:
    """What `learn` told and left."""

    recorder: Recorder
    work_dir: Path
    result: dict[str, Any]

    @property
    def plan(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.work_dir / FINAL_PLAN).read_text())
        return made

    @property
    def state(self) -> dict[str, Tensor]:
        return load_file(self.work_dir / FINAL_STATE)

    @property
    def after_steps(self) -> list[Saved]:
        """What was saved after each step of the loop."""
        kept = [saved for saved in self.recorder.checkpoints if saved.state["stage"] == "learning"]
        return [saved for saved in kept if saved.state["step"] > 0 and saved.state["l_step"] is None]

    @property
    def final_rows(self) -> list[RankRow]:
        return [row for row in self.recorder.rank_rows if row.chosen]


def format_of(data: Path) -> str:
    suffix = data.suffix.removeprefix(".")
    return "webdataset" if suffix == "tar" else suffix


def run_learn(
    work_dir: Path,
    model: Path,
    spec: Mapping[str, Any],
    data: Path | None = None,
    saved: Saved | None = None,
    observer: Recorder | None = None,
) -> Learned:
    """Run the first stage in this process."""
    work_dir.mkdir(parents=True, exist_ok=True)
    recorder = observer if observer is not None else Recorder()
    kind = None if data is None else format_of(data)
    result = learn(Sources(model, data, kind, work_dir), parse_spec(dict(spec)), recorder, saved)
    return Learned(recorder, work_dir, result)


@dataclass
class Stage:
    """What one child said."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int = 0
    errors: str = ""

    @property
    def last(self) -> dict[str, Any]:
        return self.messages[-1]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]


def run_stage(stage: str, work_dir: Path, model: Path, spec: Mapping[str, Any], **options: Any) -> Stage:
    """Run one stage as a supervisor does: a fresh child that gets its assignment and answers over a pipe."""
    work_dir.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    data: Path | None = options.pop("data", None)
    on_message = options.pop("on_message", None)  # called with the process and each thing that it says
    assignment = {
        "stage": stage,
        "job_id": "job_tiny",
        "epoch": 1,
        "model_path": str(model),
        "data_path": None if data is None else str(data),
        "data_format": None if data is None else format_of(data),
        "spec": dict(spec),
        "work_dir": str(work_dir),
        **options,
    }
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RANKPRESS_CHANNEL_FD": str(writing),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    made = Stage()
    with subprocess.Popen(
        [sys.executable, "-m", "worker.runner"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writing,),
        env=environment,
        cwd=work_dir,
    ) as child:
        os.close(writing)
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(json.dumps(assignment).encode() + b"\n")
        child.stdin.flush()
        with os.fdopen(reading, "rb") as stream:
            for line in stream:
                made.messages.append(json.loads(line))
                if on_message is not None:
                    on_message(child, made.last)
        made.errors = child.stderr.read().decode()
        made.exit_code = child.wait()
    return made


def run_job(work_dir: Path, model: Path, spec: Mapping[str, Any], **options: Any) -> dict[str, Stage]:
    """Run the stages of a job, each in its own child."""
    stages: dict[str, Stage] = {}
    resume = options.pop("resume_path", None)
    for stage in options.pop("only", ("learn", "emit", "verify")):
        extra = {"resume_path": str(resume)} if resume is not None and stage == "learn" else {}
        stages[stage] = run_stage(stage, work_dir, model, spec, **options, **extra)
        assert stages[stage].exit_code == 0, (stage, stages[stage].messages[-1:], stages[stage].errors[-3000:])
    return stages


def archive(module: nn.Module) -> bytes:
    """Script a network as it stands."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()
