"""Models and data that cannot be served end as problems with their own words, never as errors of the engine."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, Mlp, archive, quick, run_learn, run_stage, save_data, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.plan import Form, RankRow
from worker.engine.methods.learning_rate import what_to_change

BUDGET = {"budget": {"max_params_fraction": 0.5}}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 32)
        self.head = nn.Linear(32, 4)


class Raises(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 0:
            raise RuntimeError("I do not feel like it")
        return self.head(self.fc(x))


class RaisesInTraining(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not to be trained")
        return self.head(self.fc(x))


class RaisesOnSomeSamples(_Net):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] > 90).any()):
            raise ValueError("a sample is out of bounds")
        return self.head(self.fc(x))


class Loops(_Net):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.abs().sum() >= 0):
            x = x + self.fc(x).mean()
        return x


class Greedy(_Net):
    def forward(self, x: Tensor) -> Tensor:
        held = torch.zeros([1 << 34])
        return self.head(self.fc(x)) + held[0]


class GrowsInTraining(_Net):
    """Needs memory by the batch: one sample fits, a quarter of a batch does not."""

    def forward(self, x: Tensor) -> Tensor:
        held = torch.zeros([1 << 28, x.size(0)]) if x.size(0) > 2 else torch.zeros([1, 1])
        return self.head(self.fc(x)) + held[0, 0]


class Writes(_Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "/tmp/not-written")
        return self.head(self.fc(x))


class NoTensor(_Net):
    def forward(self, x: Tensor) -> str:
        return "text" if bool(self.head(self.fc(x)).sum() > 0) else "other"


class WholeNumbers(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x)).argmax(1)


class TakesADict(_Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(F.relu(self.fc(batch["x"])))


class NeedsANumber(_Net):
    def forward(self, x: Tensor, scale: float, mask: Tensor | None = None, rounds: int = 1) -> Tensor:
        return self.head(F.relu(self.fc(x))) * scale


class NoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] * self.scale


class NotANumber(_Net):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.fc.weight[3, 4] = float("nan")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x)))


class Good(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x)))


def numbers(folder: Path, x: np.ndarray | None = None, y: np.ndarray | None = None) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((96, 20)).astype(np.float32) if x is None else x
    np.savez(folder / "data.npz", inputs=x, targets=generator.integers(0, 4, len(x)) if y is None else y)
    return folder / "data.npz"


def refusal(folder: Path, net: nn.Module, data: Path | None, **spec: Any) -> ProblemError:
    model = folder / "model.pt"
    model.write_bytes(archive(net))
    with pytest.raises(ProblemError) as caught:
        run_learn(folder / "w", model, quick(**{**BUDGET, **spec}), data)
    return caught.value


CASES = [
    (Raises, ErrorCode.MODEL_RAISED, "I do not feel like it"),
    (RaisesInTraining, ErrorCode.MODEL_RAISED, "not to be trained"),
    (NoTensor, ErrorCode.MODEL_UNSUPPORTED, "str"),
    (TakesADict, ErrorCode.MODEL_UNSUPPORTED, "forward's argument 'batch' is Dict[str, Tensor]; expected tensors"),
    (NeedsANumber, ErrorCode.MODEL_UNSUPPORTED, "forward's argument 'scale' is float"),
    (WholeNumbers, ErrorCode.MODEL_UNSUPPORTED, "whole numbers"),
    (NoLayers, ErrorCode.NO_COMPRESSIBLE_LAYER, "0 layers|UNSUPPORTED_KIND"),
    (NotANumber, ErrorCode.MODEL_UNSUPPORTED, "fc.weight"),
]


@pytest.mark.parametrize(("net", "code", "words"), CASES)
def test_models_that_cannot_be_compressed(net: type[nn.Module], code: ErrorCode, words: str, tmp_path: Path) -> None:
    problem = refusal(tmp_path, net(), numbers(tmp_path))
    assert problem.code == code, problem.detail
    assert any(word in problem.detail for word in words.split("|")), problem.detail


def test_a_model_that_raises_on_some_samples_only(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((96, 20)).astype(np.float32)
    x[50, 0] = 100
    problem = refusal(tmp_path, RaisesOnSomeSamples(), numbers(tmp_path, x))
    assert problem.code == ErrorCode.MODEL_RAISED
    assert "out of bounds" in problem.detail


DATA = [
    (np.zeros((96, 21), np.float32), None, {ErrorCode.INPUT_SHAPE_MISMATCH}, "21"),
    (np.zeros((96, 3, 8, 8), np.float32), None, {ErrorCode.INPUT_SHAPE_MISMATCH}, "8"),
    (np.zeros((96, 20), np.int64), None, {ErrorCode.INPUT_SHAPE_MISMATCH, ErrorCode.MODEL_RAISED}, "dtype"),
    (None, np.full(96, 4), {ErrorCode.DATASET_INVALID}, "class 4"),
    (None, np.full(96, -1), {ErrorCode.DATASET_INVALID}, "class -1"),
    (None, np.zeros((96, 2), np.int64), {ErrorCode.INPUT_SHAPE_MISMATCH}, "(96, 2)"),
    (None, np.zeros((96, 5)), {ErrorCode.INPUT_SHAPE_MISMATCH}, "(96, 5)"),
    (np.full((96, 20), np.nan, np.float32), None, {ErrorCode.DATASET_INVALID}, "row 0"),
]


@pytest.mark.parametrize(("x", "y", "codes", "words"), DATA)
def test_data_that_does_not_fit(
    x: np.ndarray | None, y: np.ndarray | None, codes: set[ErrorCode], words: str, tmp_path: Path
) -> None:
    problem = refusal(tmp_path, Good(), numbers(tmp_path, x, y))
    assert problem.code in codes, problem.detail
    assert words in problem.detail


def test_example_inputs_that_do_not_fit(tmp_path: Path) -> None:
    problem = refusal(tmp_path, Good(), None, example_inputs=[{"shape": [1, 21]}])
    assert problem.code == ErrorCode.INPUT_SHAPE_MISMATCH
    assert "example_inputs" in problem.detail
    problem = refusal(tmp_path, Good(), None, example_inputs=[{"shape": [1, 20]}, {"shape": [1, 20]}])
    assert problem.code in {ErrorCode.INPUT_SHAPE_MISMATCH, ErrorCode.MODEL_RAISED}


def test_a_cuda_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    problem = refusal(tmp_path, Good(), numbers(tmp_path), device="cuda")
    assert problem.code == ErrorCode.DEVICE_UNAVAILABLE


def test_a_rate_at_which_everything_diverges(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp())
    data = save_data(tmp_path / "data.npz", model)
    with pytest.raises(ProblemError) as caught:
        run_learn(
            tmp_path / "w",
            model,
            quick(**BUDGET, training={"optimizer": {"lr": 1e12}}, method={"mu": {"initial": 1e-12}}),
            data,
        )
    assert caught.value.code == ErrorCode.DIVERGED
    assert "lower training.optimizer.lr" in caught.value.detail


def test_what_diverges_because_its_values_are_far_away_is_not_told_to_train_slower() -> None:
    """±1 for weights of a hundredth: no learning rate helps, another scheme does."""
    rows = [
        RankRow(step=1, layer=name, term=0, form=Form.QUANTIZED, relative_error=error)
        for name, error in (("near", 0.4), ("far", 7.96), ("less", 3.0))
    ]
    assert "weight of far is 8.0 times as far from the trained one as zeros are" in what_to_change(rows)
    assert "scaled_binary" in what_to_change(rows)
    assert what_to_change(rows[:1]) == what_to_change([])
    assert "lower training.optimizer.lr" in what_to_change([])


def test_a_step_that_diverges_is_repeated_at_half_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine.training import Trainer

    model = save_model(tmp_path / "model.pt", ConvNet())
    data = save_data(tmp_path / "data.npz", model, (2, 8, 8))
    rates = []
    epoch = Trainer.epoch

    def once(
        self: Trainer, optimizer: torch.optim.Optimizer, stream: tuple[int, ...], *args: Any, **more: Any
    ) -> float:
        rates.append((tuple(stream), optimizer.param_groups[0]["lr"]))
        if len(rates) == 2:
            with torch.no_grad():
                next(iter(self.module.parameters())).fill_(float("nan"))
        return epoch(self, optimizer, stream, *args, **more)

    monkeypatch.setattr(Trainer, "epoch", once)
    learned = run_learn(tmp_path / "w", model, quick(budget={"max_macs_fraction": 0.6}), data)
    assert rates[1][0] == rates[2][0]
    assert rates[2][1] == pytest.approx(rates[1][1] / 2)
    warnings = [data["code"] for kind, data in learned.recorder.events if kind == EventKind.WARNING]
    assert warnings == ["L_STEP_DIVERGED"]
    assert all(torch.isfinite(tensor).all() for tensor in learned.state.values() if tensor.is_floating_point())


# --- as real children -------------------------------------------------------------------------------------------------


def test_a_child_whose_model_raises_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(archive(Raises()))
    made = run_stage("learn", tmp_path / "w", tmp_path / "model.pt", quick(**BUDGET), data=numbers(tmp_path))
    assert made.exit_code == 65
    assert made.last["type"] == "failed"
    assert made.last["permanent"] is True
    assert made.last["problem"]["code"] == "MODEL_RAISED"
    assert "I do not feel like it" in made.last["problem"]["detail"]
    assert [message["phase"] for message in made.of("phase")] == ["starting", "inspecting"]


@pytest.mark.parametrize("net", [Greedy, GrowsInTraining])
def test_a_child_that_wants_too_much_memory_says_so(net: type[nn.Module], tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(archive(net()))
    spec = quick(**BUDGET)
    memory = {"memory_bytes_max": 8 << 30}
    made = run_stage("learn", tmp_path / "w", tmp_path / "model.pt", spec, data=numbers(tmp_path), **memory)
    assert made.last["type"] == "failed"
    assert made.last["problem"]["code"] == "OUT_OF_MEMORY", made.last
    assert made.last["permanent"] is True


def test_a_model_with_operators_that_reach_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(archive(Writes()))
    began = time.time()
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path / "w", tmp_path / "model.pt", quick(**BUDGET), numbers(tmp_path))
    assert caught.value.code == ErrorCode.MODEL_REJECTED_UNSAFE
    assert "aten::save" in caught.value.detail
    written = Path("/tmp/not-written")
    assert not written.exists() or written.stat().st_mtime < began


def test_a_model_that_loops_has_said_where_it_is(tmp_path: Path) -> None:
    """The supervisor's clock for the first forward starts with the phase `inspecting` and ends with the layers."""
    import subprocess
    import sys

    (tmp_path / "model.pt").write_bytes(archive(Loops()))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from tiny_jobs import *\n"
        "class Printer(Recorder):\n"
        "    def phase(self, phase): print(phase, flush=True)\n"
        "    def layers(self, facts): print('layers', flush=True)\n"
        "w = Path(sys.argv[2]); spec = quick(budget={'max_params_fraction': 0.5})\n"
        "learn(Sources(w / 'model.pt', w / 'data.npz', 'npz', w), parse_spec(spec), Printer())\n"
    )
    numbers(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent), str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(2)] == ["starting", "inspecting"]
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
        child.kill()
        assert child.stdout.read() == ""
