"""The first stage on the kinds of models and data that users have."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_jobs import ConvNet, Mlp, archive, quick, run_learn, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import parse_spec
from worker.engine.assembly import assemble, load_state
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.verification import verify

HALF = {"budget": {"max_params_fraction": 0.5}}


class Siblings(nn.Module):
    """Two inputs, and two outputs of one shape in a dict that is not in the order of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(12, 300)
        self.right = nn.Linear(8, 300)
        self.total = nn.Linear(300, 3)
        self.product = nn.Linear(300, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = torch.tanh(self.left(x)), torch.tanh(self.right(y))
        return {"total": self.total(a + b), "product": self.product(a * b)}


def test_named_inputs_and_outputs_belong_together(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Siblings())
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((200, 12)).astype("f"), generator.standard_normal((200, 8)).astype("f")
    with torch.no_grad():
        out = torch.jit.load(str(model))(torch.from_numpy(x), torch.from_numpy(y))
    targets = {f"targets.{name}": out[name].numpy() for name in out}
    np.savez(tmp_path / "data.npz", **{"inputs.y": y, "inputs.x": x}, **targets)
    spec = quick(**HALF, objective={"distillation": 0.0}, fine_tune={"epochs": 2})
    learned = run_learn(tmp_path / "w", model, spec, tmp_path / "data.npz")
    assert learned.plan["resolved"]["objective"]["loss"] == "mse"
    emit(model, tmp_path / "w")
    report = verify(Sources(model, tmp_path / "data.npz", "npz", tmp_path / "w"), parse_spec(spec), {}, list)
    assert report.reference.metric == pytest.approx(0.0, abs=1e-10)  # its own outputs, each held against its own name
    assert report.metric_name == "mse"
    assert report.budget is not None
    assert report.budget.reached <= report.budget.limit


def test_unlabelled_data_is_matched_to_the_references_outputs(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp(64, 96))
    x = np.random.default_rng(0).standard_normal((160, 64)).astype("f")
    save_file({"inputs": x}, tmp_path / "data.safetensors")
    spec = quick(**HALF)
    learned = run_learn(tmp_path / "w", model, spec, tmp_path / "data.safetensors")
    assert learned.plan["resolved"]["objective"]["loss"] == "distillation"
    emit(model, tmp_path / "w")
    report = verify(
        Sources(model, tmp_path / "data.safetensors", "safetensors", tmp_path / "w"), parse_spec(spec), {}, list
    )
    assert report.reference.metric == 0.0
    names = [difference.name for difference in report.differences]
    assert "relative_output_error" in names
    assert report.fidelity.agreement_with_reference is not None


def test_raw_images(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", ConvNet())
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (120, 8, 8, 2), dtype=np.uint8)
    np.savez_compressed(tmp_path / "data.npz", inputs=x, targets=generator.integers(0, 4, 120, dtype=np.uint8))
    data = {"layout": "NHWC", "scale": 1 / 255, "mean": [0.5, 0.4], "std": 0.25}
    learned = run_learn(tmp_path / "w", model, quick(**HALF, data=data), tmp_path / "data.npz")
    assert learned.recorder.facts[0].input_shape == [1, 2, 8, 8]
    assert learned.plan["resolved"]["example_inputs"] == [{"shape": [1, 2, 8, 8], "dtype": "float32", "high": None}]


def test_a_double_precision_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp().double())
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", inputs=generator.standard_normal((96, 20)), targets=generator.integers(0, 4, 96))
    learned = run_learn(tmp_path / "w", model, quick(**HALF), tmp_path / "d.npz")
    assert all(tensor.dtype == torch.float64 for tensor in learned.state.values())


def test_a_traced_model_in_train_mode_is_given_back_as_it_came(tmp_path: Path) -> None:
    for training in (True, False):
        net = Mlp().train(training)
        traced = torch.jit.trace(net, torch.randn(2, 20))
        torch.jit.save(traced, tmp_path / "model.pt")
        spec = quick(**HALF, example_inputs=[{"shape": [1, 20]}])
        learned = run_learn(tmp_path / str(training), tmp_path / "model.pt", spec)
        network = assemble(tmp_path / "model.pt", learned.plan["recipe"], torch.device("cpu"))
        load_state(network, learned.state)
        assert network.training is training


class Embedded(nn.Module):
    """Whole numbers in, and a sequence of classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 24)
        self.fc = nn.Linear(24, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(self.embedding(tokens)))).transpose(1, 2)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_tokens(dtype: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Embedded())
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 5, (96, 7))
    targets[:, 3:] = np.where(generator.random((96, 4)) < 0.5, -100, targets[:, 3:])
    targets[5] = -100
    np.savez(tmp_path / "data.npz", inputs=generator.integers(0, 30, (96, 7)).astype(dtype), targets=targets)
    spec = quick(budget={"max_macs_fraction": 0.5})
    learned = run_learn(tmp_path / "w", model, spec, tmp_path / "data.npz")
    rows = {row.layer: row for row in learned.final_rows}
    assert rows["embedding"].reason is not None
    assert rows["fc"].macs < 7 * 24 * 48


def test_integer_examples_keep_to_their_bound(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Embedded())
    examples = [{"shape": [1, 7], "dtype": "int64", "high": 30}]
    learned = run_learn(tmp_path / "w", model, quick(**HALF, example_inputs=examples))
    assert learned.final_rows
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path / "x", model, quick(**HALF))
    assert caught.value.code == ErrorCode.EXAMPLE_INPUTS_MISSING
    assert '"high": 30' in caught.value.detail


def test_a_layer_in_a_loop_is_counted_for_each_call(tmp_path: Path) -> None:
    from tiny_jobs import Looped

    (tmp_path / "model.pt").write_bytes(archive(Looped()))
    spec = quick(**HALF, example_inputs=[{"shape": [1, 20]}])
    learned = run_learn(tmp_path / "w", tmp_path / "model.pt", spec)
    facts = {facts.name: facts for facts in learned.recorder.facts}
    assert (facts["inner"].calls, facts["inner"].macs) == (3, 3 * 400)
    assert (facts["extra"].calls, facts["extra"].macs) == (1, 400)
