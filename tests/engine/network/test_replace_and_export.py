import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from network_corpus import CASES, build, factor_pair, saved
from torch import nn

from worker.engine.network.costs import take_census
from worker.engine.network.export import export_bytes
from worker.engine.network.load import load_model, reload
from worker.engine.network.replace import replace_layers

REPLACED = [
    (name, how)
    for name, case in CASES.items()
    for how in ("scripted", "traced")
    if case.replaceable and (how == "scripted" or case.traceable)
]


def edited(file: bytes, name: str, rank: int | None = None) -> torch.jit.ScriptModule:
    module = load_model(file)
    census = take_census(module, CASES[name].inputs(1))
    state = module.state_dict()
    replace_layers(
        module, {layer.name: factor_pair(layer, state, rank) for layer in census.layers if layer.reason is None}
    )
    return module


def tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items for tensor in tensors(item)]


def assert_same(left: torch.nn.Module, right: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    for training in (False, True):
        left.train(training)
        right.train(training)
        torch.manual_seed(3)
        expected = tensors(left(*inputs))
        torch.manual_seed(3)
        found = tensors(right(*inputs))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "how"), REPLACED)
def test_full_rank_factors_change_nothing(name: str, how: str) -> None:
    file = build(name, how)
    assert_same(load_model(file), reload(edited(file, name)), CASES[name].inputs(4))


@pytest.mark.parametrize(("name", "how"), REPLACED)
def test_the_exported_file_behaves_like_the_original(name: str, how: str) -> None:
    file = build(name, how)
    exported = torch.jit.load(io.BytesIO(export_bytes(edited(file, name))))
    reference = load_model(file)
    assert exported.training == reference.training
    assert_same(reference, exported, CASES[name].inputs(4))
    # Batch norm's statistics and every other buffer were updated alike in the train pass above.
    buffers = dict(exported.named_buffers())
    for buffer_name, value in reference.named_buffers():
        torch.testing.assert_close(value, buffers[buffer_name])
    replaced = {f"{layer}.weight" for layer in CASES[name].replaceable} | {"w"}
    assert not replaced & {parameter for parameter, _ in exported.named_parameters()}


@pytest.mark.parametrize(("name", "how"), REPLACED)
def test_gradients_reach_every_parameter_of_the_exported_file(name: str, how: str) -> None:
    exported = torch.jit.load(io.BytesIO(export_bytes(edited(build(name, how), name))))
    sum(t.float().sum() for t in tensors(exported(*CASES[name].inputs(4))) if t.is_floating_point()).backward()
    missing = {parameter for parameter, value in exported.named_parameters() if value.grad is None}
    assert missing <= {"negative.weight", "negative.bias", "extra.weight", "extra.bias"}
    assert all(value.requires_grad for value in exported.parameters())


def test_methods_and_plain_attributes_stay() -> None:
    file = build("several_methods", "scripted")
    reference = load_model(file).eval()
    exported = torch.jit.load(io.BytesIO(export_bytes(edited(file, "several_methods")))).eval()
    x = CASES["several_methods"].inputs(2)[0]
    assert exported.classes == ["cat", "dog"]
    assert exported.scale == 2.0
    assert exported.label(1) == "dog"
    torch.testing.assert_close(exported.features(x), reference.features(x))
    torch.testing.assert_close(exported.embed(x), reference.embed(x))
    assert exported.seen == 0
    exported(x)
    assert exported.seen == 1
    torch.testing.assert_close(exported.mean, torch.full((3,), 0.1))


def test_the_mode_of_the_upload_is_the_mode_of_the_artifact() -> None:
    torch.manual_seed(0)
    model = CASES["conv_net"].build()
    model.bn1.eval()
    exported = torch.jit.load(io.BytesIO(export_bytes(edited(saved(torch.jit.script(model)), "conv_net"))))
    assert exported.training
    assert not exported.bn1.training
    assert exported.bn2.training
    assert not torch.jit.load(io.BytesIO(export_bytes(edited(build("conv_net", "traced"), "conv_net")))).training


def test_the_file_is_smaller_when_the_layers_are() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    file = saved(torch.jit.script(Wide()))
    module = load_model(file)
    layer = take_census(module, (torch.randn(1, 256),)).layers[0]
    replace_layers(module, {layer.name: factor_pair(layer, module.state_dict(), rank=8)})
    assert len(export_bytes(module)) < len(file) / 3


def test_recurrent_weights_beside_a_replaced_layer_stay_trainable() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    module = load_model(saved(torch.jit.script(Tagger())))
    head = next(layer for layer in take_census(module, (torch.randn(1, 6, 4),)).layers if layer.name == "head")
    assert head.rows == (6,)
    replace_layers(module, {"head": factor_pair(head, module.state_dict())})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    exported(torch.randn(2, 6, 4)).sum().backward()
    trained = {name for name, value in exported.named_parameters() if value.grad is not None}
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"} < trained


def test_a_model_that_cannot_be_frozen_is_emptied_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise RuntimeError("not supported")

    file = build("conv_net", "scripted")
    whole = edited(file, "conv_net")
    size = len(saved(whole))
    monkeypatch.setattr(torch._C, "_freeze_module", cannot)
    content = export_bytes(whole)
    exported = torch.jit.load(io.BytesIO(content))
    assert_same(load_model(file), exported, CASES["conv_net"].inputs(4))
    assert exported.conv1.weight.numel() == 0
    assert len(content) < size


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Linear(4, 4)
        self.now = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        future = torch.jit.fork(self.later, x)
        return self.now(x) + torch.jit.wait(future)


@torch.jit.interface
class Step(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pass


class Later(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class ThroughInterface(nn.Module):
    later: Step

    def __init__(self) -> None:
        super().__init__()
        self.later = Later(4, 4)
        self.now = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.now(x) + self.later.forward(x)


@pytest.mark.parametrize("model", [Forked(), ThroughInterface()], ids=["fork", "interface"])
def test_layers_that_are_handed_on_keep_a_reason_and_their_weights(model: nn.Module) -> None:
    file = saved(torch.jit.script(model))
    module = load_model(file)
    layers = take_census(module, (torch.randn(1, 4),)).layers
    assert {layer.weight: layer.reason is None for layer in layers} == {"now.weight": True, "later.weight": False}
    replace_layers(module, {layer.name: factor_pair(layer, module.state_dict()) for layer in layers[:1]})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    assert_same(load_model(file), exported, (torch.randn(3, 4),))
    assert sum(value.numel() for value in exported.parameters()) == 20 + 16 + 20


def test_a_sequential_at_the_root_has_numbers_for_names() -> None:
    torch.manual_seed(0)
    file = saved(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))))
    module = load_model(file)
    state = module.state_dict()
    layers = take_census(module, (torch.randn(1, 6),)).layers
    assert [(layer.name, layer.reason is None) for layer in layers] == [("0", True), ("1", True), ("2", False)]
    replace_layers(module, {layer.name: factor_pair(layer, state) for layer in layers[:2]})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    assert_same(load_model(file), exported, (torch.randn(4, 6),))
    assert "0__factors.0.weight" in dict(exported.named_parameters())


def test_edits_are_whole_while_the_executor_may_not_optimise() -> None:
    # A run for equal bytes turns the executor's optimisation off; torch then inlines one level of calls only.
    file = build("resnet", "scripted")
    with torch.jit.optimized_execution(False):
        module = edited(file, "resnet")
        content = export_bytes(module)
        exported = torch.jit.load(io.BytesIO(content))
        assert_same(load_model(file), exported, CASES["resnet"].inputs(4))
    assert "layer1.0.conv1.weight" not in dict(exported.named_parameters())
    assert "prim::CallMethod" not in str(exported.forward.graph)


def test_training_resumes_bit_for_bit_while_the_executor_may_not_optimise() -> None:
    file = build("conv_net", "scripted")

    def train(module: torch.jit.ScriptModule, steps: range) -> torch.jit.ScriptModule:
        for step in steps:
            torch.manual_seed(step)
            module.zero_grad()
            module(torch.randn(4, 3, 9, 9)).square().mean().backward()
            with torch.no_grad():
                for value in module.parameters():
                    value.sub_(value.grad, alpha=0.1)
        return module

    with torch.jit.optimized_execution(False):
        whole = train(load_model(file), range(5))
        resumed = train(reload(train(load_model(file), range(2))), range(2, 5))
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.state_dict().items())


def test_names_that_do_not_exist_and_layers_without_one_input_are_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        replace_layers(load_model(build("shared", "scripted")), {"nothing": nn.Linear(6, 6)})
    with pytest.raises(ValueError, match="takes no branch"):
        replace_layers(load_model(build("many_kinds", "scripted")), {"unused.weight": nn.Linear(6, 6)})


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_layer_at_two_places_is_replaced_at_both(how: str) -> None:
    file = build("shared", how)
    module = load_model(file)
    layer = next(each for each in take_census(module, CASES["shared"].inputs(1)).layers if each.name == "fc")
    replace_layers(module, {"fc": factor_pair(layer, module.state_dict())})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    assert_same(load_model(file), exported, CASES["shared"].inputs(4))
    assert "fc.weight" not in dict(exported.named_parameters())


FRESH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from network_corpus import CASES
from test_replace_and_export import edited
from worker.engine.network.export import export_bytes
import torch
torch.set_num_threads(1)
Path(sys.argv[4]).write_bytes(export_bytes(edited(Path(sys.argv[3]).read_bytes(), sys.argv[2], rank=2)))
"""
STOCK = "import sys, torch; torch.jit.load(sys.argv[1])(torch.randn(2, 3, 7, 7)); print('ran')"


def test_fresh_processes_write_the_same_bytes_and_stock_torch_loads_them(tmp_path: Path) -> None:
    source = tmp_path / "model.pt"
    source.write_bytes(build("several_methods", "scripted"))
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    digests = set()
    for attempt in range(2):
        target = tmp_path / f"artifact-{attempt}.pt"
        arguments = [str(Path(__file__).parent), "several_methods", str(source), str(target)]
        subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, env=environment, timeout=120)
        digests.add(hashlib.sha256(target.read_bytes()).hexdigest())
    assert len(digests) == 1
    environment.pop("PYTHONPATH")
    stock = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(target)], check=True, capture_output=True, text=True, timeout=120
    )
    assert stock.stdout.strip() == "ran"
