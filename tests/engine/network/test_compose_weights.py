import io

import pytest
import torch
from network_corpus import CASES, Halves, build, saved
from torch import Tensor, nn

from worker.engine.network.export import export_bytes
from worker.engine.network.load import load_model, reload
from worker.engine.network.replace import Replacement, replace_layers


class NoBranch(nn.Module):
    """A linear branch that gives nothing."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rows, bias=False)
        nn.init.ones_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def composed(file: bytes, *names: str) -> torch.jit.ScriptModule:
    module = load_model(file)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    replace_layers(module, {name: Replacement(weight=Halves(parameters[name])) for name in names})
    return module


def check(file: bytes, names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> torch.jit.ScriptModule:
    exported = torch.jit.load(io.BytesIO(export_bytes(composed(file, *names))))
    for training in (False, True):
        torch.manual_seed(3)
        expected = load_model(file).train(training)(*inputs)
        for module in (reload(composed(file, *names)), exported):
            torch.manual_seed(3)
            torch.testing.assert_close(module.train(training)(*inputs), expected, rtol=1e-5, atol=1e-5)
    left = {name for name, _ in exported.named_parameters()}
    assert not left & set(names)
    halves = [value for name, value in exported.named_parameters() if name.endswith((".left", ".right"))]
    assert len(halves) == 2 * len(names)
    output = exported.train()(*inputs)
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    output.sum().backward()
    assert all(value.grad is not None for value in halves)
    return exported


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_convolution_s_weight_is_composed(how: str) -> None:
    check(build("conv_net", how), ("conv1.weight", "fc.weight"), CASES["conv_net"].inputs(3))


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_recurrent_weights_are_composed_inside_their_list(how: str) -> None:
    exported = check(
        build("many_kinds", how), ("lstm.weight_ih_l0", "lstm.weight_hh_l0"), CASES["many_kinds"].inputs(2)
    )
    assert "lstm.bias_ih_l0" in dict(exported.named_parameters())


def test_several_readers_in_a_loop_call_the_weight_once() -> None:
    module = composed(build("looped", "scripted"), "step.weight", "conv.weight")
    lines = str(module.forward.graph).splitlines()
    calls = [line for line in lines if "prim::CallMethod" in line]
    assert len(calls) == 2
    assert all(line.startswith("  %") for line in calls)  # outside of the loop
    check(build("looped", "scripted"), ("step.weight", "conv.weight"), CASES["looped"].inputs(2))


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_all_sites_and_all_names_of_a_weight_are_composed(how: str) -> None:
    check(build("shared", how), ("fc.weight", "first.weight"), CASES["shared"].inputs(3))


def test_a_weight_of_a_computed_weight_is_composed() -> None:
    check(build("many_kinds", "traced"), ("normed.direction", "projection"), CASES["many_kinds"].inputs(2))


def test_every_method_reads_the_composed_weight() -> None:
    file = build("several_methods", "scripted")
    exported = torch.jit.load(io.BytesIO(export_bytes(composed(file, "conv.weight", "extra.weight")))).eval()
    x = CASES["several_methods"].inputs(2)[0]
    reference = load_model(file).eval()
    torch.testing.assert_close(exported.embed(x), reference.embed(x))
    torch.testing.assert_close(exported.features(x), reference.features(x))


def test_a_branch_is_added_beside_a_composed_weight() -> None:
    torch.manual_seed(0)
    file = saved(torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.ReLU())))
    module = load_model(file)
    weight = module.state_dict()["0.weight"]
    branch = NoBranch(5, 6)
    replace_layers(module, {"0": Replacement(branch=branch, weight=Halves(weight - 1.0))})
    x = torch.randn(4, 6)
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    torch.testing.assert_close(exported(x), load_model(file)(x), rtol=1e-5, atol=1e-5)
    assert sorted(dict(exported.named_parameters())) == [
        "0.bias",
        "0__factors.inner.weight",
        "0__weight.left",
        "0__weight.right",
    ]


def test_a_parameter_that_nothing_reads_is_no_place_for_a_weight() -> None:
    module = load_model(build("many_kinds", "scripted"))
    with pytest.raises(KeyError, match=r"no method reads .*unused"):
        replace_layers(module, {"unused.weight": Replacement(weight=Halves(torch.zeros(3, 3)))})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.fc(x)))


def test_a_weight_goes_where_another_layer_of_its_class_keeps_its_own() -> None:
    torch.manual_seed(0)
    file = saved(torch.jit.script(nn.Sequential(nn.Sequential(Block(), Block()), Block(), nn.Linear(8, 8))))
    x = torch.randn(4, 8)
    exported = check(file, ("0.1.fc.weight",), (x,))
    names = [name for name, _ in exported.named_parameters()]
    assert [name for name in names if ".fc." in name] == [
        "0.0.fc.weight",
        "0.0.fc.bias",
        "0.1.fc.bias",
        "1.fc.weight",
        "1.fc.bias",
    ]
    assert all(value.requires_grad for value in exported.parameters())
    assert [name for name, _ in exported.named_buffers()] == [name for name, _ in load_model(file).named_buffers()]


def test_parameters_that_are_one_stay_one_where_a_weight_goes() -> None:
    class Ties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    file = saved(torch.jit.script(Ties()))
    exported = torch.jit.load(io.BytesIO(export_bytes(composed(file, "first.weight"))))
    x = torch.randn(2, 6)
    torch.testing.assert_close(exported(x), load_model(file)(x))
    assert sum(value.numel() for value in exported.parameters()) == 2 * 36 + 36 + 6
