"""A run taken up again from wherever it was left, inside an epoch too, ends with the same numbers, bit for bit."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ConvNet, Learned, Looped, Mlp, quick, run_learn, run_stage, save_data, save_model
from torch import nn

from service.contract.events import EventKind
from worker.channel import DRAIN_SIGNAL
from worker.checkpoint import OtherFormatError, read_checkpoint, write_checkpoint
from worker.engine.learn import FINAL_PLAN, FINAL_STATE
from worker.engine.methods import learning_compression
from worker.engine.observer import Recorder, Saved

pytestmark = pytest.mark.usefixtures("plain_executor")

SPECS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    # dropout, batch norm, augmented images, sums, a budget, multipliers, steps of two epochs, a smaller last batch
    "convnet": (
        ConvNet,
        (2, 8, 8),
        quick(
            budget={"max_macs_fraction": 0.5},
            method={"mu": {"steps": 4}},
            training={"epochs_per_step": 2, "batch_size": 24, "augmentation": {"crop_pixels": 1, "flip": True}},
            fine_tune={"epochs": 2},
        ),
    ),
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
    # the literal mode, a layer in a loop, no momentum
    "looped": (
        Looped,
        (20,),
        quick(
            method={"lambda": 1000.0, "multipliers": False, "c_step": {"sweeps": 2}, "mu": {"initial": 0.01}},
            training={"optimizer": {"momentum": 0.0}},
            fine_tune={"epochs": 0},
        ),
    ),
}
COUNT = 98  # 78 to train on: with batches of 24, four updates an epoch
Told = tuple[str, int, int]


class Left(Exception):
    """The run was left, as by a process that ends."""


@dataclass
class Pulses(Recorder):
    """Counts the pulses, and at one of them saves the run to a file and leaves it."""

    directory: Path = Path()
    leave_at: int | None = None
    pulses: list[Told] = field(default_factory=list)
    file: Path | None = None

    def pulse(self, kind: str, done: int, total: int) -> bool:
        self.pulses.append((kind, done, total))
        return len(self.pulses) - 1 == self.leave_at

    def checkpoint(self, save: Callable[[], Saved], position: int, *, must: bool = False) -> None:
        if self.pulses and len(self.pulses) - 1 == self.leave_at:
            self.file = Path(write_checkpoint(save(), self.directory, position).path)
            raise Left
        super().checkpoint(save, position, must=must)


@dataclass
class Job:
    folder: Path
    model: Path
    data: Path
    spec: dict[str, Any]

    @classmethod
    def make(cls, name: str, folder: Path) -> "Job":
        make, shape, spec = SPECS[name]
        model = save_model(folder / "model.pt", make())
        return cls(folder, model, save_data(folder / "data.npz", model, shape, count=COUNT), spec)

    def run(self, name: str, saved: Saved | None = None, observer: Recorder | None = None) -> Learned:
        return run_learn(self.folder / name, self.model, self.spec, self.data, saved, observer)

    def whole(self) -> tuple[Learned, list[Told]]:
        observer = Pulses()
        return self.run("whole", observer=observer), observer.pulses

    def left_at(self, pulse: int, saved: Saved | None = None) -> tuple[Saved, Pulses]:
        observer = Pulses(directory=self.folder / f"left-{pulse}", leave_at=pulse)
        with pytest.raises(Left):
            self.run("left", saved, observer)
        assert observer.file is not None
        return read_checkpoint(observer.file), observer


def same(one: Learned, other: Learned) -> None:
    assert one.state.keys() == other.state.keys()
    for name, tensor in one.state.items():
        assert torch.equal(tensor, other.state[name]), name
    assert one.plan["recipe"] == other.plan["recipe"]
    assert one.plan["resolved"] == other.plan["resolved"]
    assert one.plan["rows"] == other.plan["rows"]
    assert one.plan["notes"] == other.plan["notes"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_from_checkpoints_between_epochs_and_steps(name: str, tmp_path: Path) -> None:
    job = Job.make(name, tmp_path)
    whole = job.run("whole")
    same(whole, job.run("again"))
    made = whole.recorder.checkpoints
    positions = whole.recorder.positions
    assert positions == sorted(set(positions)), "every checkpoint is further than the one before"
    steps, epochs = job.spec["method"]["mu"]["steps"], job.spec["training"]["epochs_per_step"]
    tuning = job.spec["fine_tune"]["epochs"]
    assert len(made) == 1 + steps * (epochs + 1) + (tuning + 2 if tuning else 0)
    for number, saved in list(enumerate(made))[:: max(len(made) // 4, 1)]:
        message = write_checkpoint(saved, tmp_path / "checkpoints", positions[number])
        resumed = job.run(str(number), read_checkpoint(Path(message.path)))
        same(whole, resumed)
        assert resumed.recorder.positions == positions[number + 1 :]
        told = [progress.fraction for progress in resumed.recorder.progresses]
        assert all(fraction > saved.state["done_epochs"] / (steps * epochs + tuning) - 1e-9 for fraction in told)


def places(pulses: list[Told]) -> dict[str, int]:
    """Pulses at which a run is left: by name, their numbers."""
    firsts = [at for at, (kind, done, _) in enumerate(pulses) if (kind, done) == ("l_step", 1)]
    lasts = [at for at, (kind, done, total) in enumerate(pulses) if kind == "l_step" and done == total]
    tuned = [at for at, (kind, _, _) in enumerate(pulses) if kind == "fine_tune"]
    per_epoch = pulses[0][2]
    return {
        "first update of all": 0,
        "middle of the first epoch": 1,
        "last update of an epoch": lasts[0],
        "first update of an L step's second epoch": firsts[1],
        "middle of the second L step": firsts[2] + 2,
        "last update of an L step": lasts[3],
        "in a C step": lasts[3] + 2,
        "first update of the factored network": tuned[0],
        "middle of its second epoch": tuned[per_epoch] + 1,
        "its last update": tuned[-1],
    }


def test_from_inside_of_epochs_and_c_steps(tmp_path: Path) -> None:
    job = Job.make("convnet", tmp_path)
    whole, pulses = job.whole()
    assert {kind for kind, _, _ in pulses} == {"l_step", "c_step", "fine_tune"}
    positions = []
    for place, at in places(pulses).items():
        saved, left = job.left_at(at)
        positions.append(saved.state["position"])
        observer = Pulses()
        same(whole, job.run(place, saved, observer))
        assert left.pulses == pulses[: at + 1], place
        first = at + 1 if pulses[at][0] != "c_step" else at + 1 - pulses[at][1]  # a C step begins again
        assert observer.pulses == pulses[first:], place
    assert positions[:6] == sorted(set(positions[:6]))
    assert positions[5] == positions[6] < positions[7], "a C step saves what stood before it"


def test_left_again_and_again(tmp_path: Path) -> None:
    job = Job.make("convnet", tmp_path)
    whole, pulses = job.whole()
    saved, ahead = None, 7
    while ahead < len(pulses):
        at = ahead if saved is None else 6
        saved, left = job.left_at(at, saved)
        fractions = [progress.fraction for progress in left.progresses]
        assert fractions == sorted(fractions)
        ahead += 7
        if ahead > len(pulses) - 7:
            break
    assert saved is not None
    same(whole, job.run("last", saved))


def test_a_rate_that_was_tested_for_is_not_tested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.make("mlp", tmp_path)
    whole, pulses = job.whole()
    saved, _ = job.left_at(next(at for at, pulse in enumerate(pulses) if pulse[0] == "fine_tune"))
    assert whole.recorder.positions[0] == 0, "the loop's start is kept"
    message = write_checkpoint(whole.recorder.checkpoints[0], tmp_path / "begin", 0)

    def never(*_: Any) -> float:
        raise AssertionError("a range test")

    monkeypatch.setattr("worker.engine.methods.factored.range_test", never)
    same(whole, job.run("tuning", saved))
    monkeypatch.undo()
    monkeypatch.setattr(learning_compression, "range_test", never)
    same(whole, job.run("begin", read_checkpoint(Path(message.path))))


@pytest.mark.parametrize("updates", [3, 6])  # in the try that diverges, and in the one that does not
def test_a_step_that_diverges_is_repeated_from_its_start_after_a_resume_too(
    updates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.make("convnet", tmp_path)
    job.spec = quick(
        budget={"max_macs_fraction": 0.5},
        method={"mu": {"steps": 2}},
        training={"batch_size": 24, "epochs_per_step": 1},
    )
    real = learning_compression.step_rate
    scale = job.spec["training"]["optimizer"]["lr"]
    monkeypatch.setattr(  # the first try of every step is far too fast
        learning_compression,
        "step_rate",
        lambda rate, step, *rest: 1e9 if rate > 0.9 * scale else real(rate, step, *rest),
    )
    whole, _ = job.whole()
    warned = [data for kind, data in whole.recorder.events if kind == EventKind.WARNING]
    assert [data["code"] for data in warned] == ["L_STEP_DIVERGED"]
    saved, _ = job.left_at(updates - 1)
    assert saved.state["l_step"]["repeats"] == (updates > 4)
    resumed = job.run("resumed", saved)
    same(whole, resumed)
    warned = [data for kind, data in resumed.recorder.events if kind == EventKind.WARNING]
    assert len(warned) == (updates <= 4)


def test_micro_batches_stay_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine import training
    from worker.engine.forward import call

    sizes: list[int] = []

    def small(net: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(net, inputs)

    monkeypatch.setattr(training, "call_nested", small)
    job = Job.make("convnet", tmp_path)
    whole, _ = job.whole()
    saved, _ = job.left_at(1)
    sizes.clear()
    same(whole, job.run("resumed", saved))
    assert sizes[0] == 12


def test_progress_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.methods.context.TOLD_SECONDS", 0.0)
    job = Job.make("convnet", tmp_path)
    saved, left = job.left_at(6)  # the third update of the second epoch, of ten
    resumed = job.run("resumed", saved)
    assert left.progresses[-1].fraction == pytest.approx(0.175)
    told = resumed.recorder.progresses
    assert told[0].fraction == pytest.approx(0.2)
    assert [each.fraction for each in told] == sorted(each.fraction for each in told)
    assert all(each.eta_seconds is not None and isfinite(each.eta_seconds) for each in told)
    assert told[-1].eta_seconds == 0


def test_a_fresh_process_goes_on_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    job = Job.make("convnet", tmp_path)
    options = {"data": job.data, "checkpoint_seconds": 0.0, "checkpoint_spacing_seconds": 0.0}
    whole = run_stage("learn", tmp_path / "whole", job.model, job.spec, **options)
    told = {message["position"]: message for message in whole.of("checkpoint")}
    middle = told[10 + 1]  # ten updates, and one C step
    state = read_checkpoint(Path(middle["path"])).state
    assert (state["step"], state["l_step"]["course"]["epochs"], state["l_step"]["course"]["updates"]) == (1, 0, 2)
    resumed = run_stage("learn", tmp_path / "resumed", job.model, job.spec, resume_path=middle["path"], **options)
    assert (whole.exit_code, resumed.exit_code) == (0, 0)
    for name in (FINAL_STATE, FINAL_PLAN):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    again = [(message["position"], message["sha256"]) for message in resumed.of("checkpoint")]
    assert again == [(at, message["sha256"]) for at, message in told.items() if at > 11]


def test_a_drained_process_leaves_in_the_middle_of_a_long_step(tmp_path: Path) -> None:
    job = Job.make("convnet", tmp_path)
    job.spec = quick(budget={"max_macs_fraction": 0.5}, training={"batch_size": 24, "epochs_per_step": 10_000})
    asked: list[float] = []
    saved: list[float] = []

    def ask(child: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        if message["type"] == "progress" and not asked:
            asked.append(time.monotonic())
            child.send_signal(DRAIN_SIGNAL)
        elif message["type"] == "checkpoint" and asked:
            saved.append(time.monotonic())

    left = run_stage("learn", tmp_path / "left", job.model, job.spec, data=job.data, on_message=ask)
    assert left.exit_code == 0, left.errors
    assert len(saved) == 1
    assert saved[0] - asked[0] < 2
    assert left.last["type"] == "checkpoint"
    state = read_checkpoint(Path(left.last["path"])).state
    assert (state["step"], state["position"]) == (0, left.last["position"])
    course = state["l_step"]["course"]
    assert course["epochs"] * 4 + course["updates"] == state["position"] > 0


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


def test_another_file_or_another_format_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no state"):
        read_checkpoint(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors", metadata={"rankpress_state": "{}"})
    with pytest.raises(OtherFormatError, match="format 1"):
        read_checkpoint(tmp_path / "old.safetensors")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(20, 20)
        self.two = nn.Linear(20, 20)
        self.two.weight = self.one.weight
        self.head = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))))


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Tied())
    data = save_data(tmp_path / "data.npz", model, count=COUNT)
    job = Job(tmp_path, model, data, quick(budget={"max_params_fraction": 0.97}, fine_tune={"epochs": 1}))
    whole, pulses = job.whole()
    for at in (1, len(pulses) - 1):
        saved, _ = job.left_at(at)
        same(whole, job.run(str(at), saved))
