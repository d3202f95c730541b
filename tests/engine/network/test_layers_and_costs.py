import pytest
import torch
from network_corpus import CASES, build, saved
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import ReasonCode
from worker.engine.network.costs import count_macs, count_params, take_census
from worker.engine.network.layers import COMPRESSIBLE_KINDS, Layer, find_layers
from worker.engine.network.load import load_model
from worker.engine.network.operators import reject_unsafe_operators

ALL = [
    (name, how) for name, case in CASES.items() for how in ("scripted", "traced") if how == "scripted" or case.traceable
]


def census_of(name: str, how: str) -> dict[str, Layer]:
    module = load_model(build(name, how))
    return {layer.name: layer for layer in take_census(module, CASES[name].inputs(1)).layers}


@pytest.mark.parametrize(("name", "how"), ALL)
def test_finds_every_layer_with_its_own_name(name: str, how: str) -> None:
    module = load_model(build(name, how))
    reject_unsafe_operators(module)
    census = take_census(module, CASES[name].inputs(1))
    assert tuple(layer.name for layer in census.layers if layer.reason is None) == CASES[name].replaceable
    assert all(layer.kind in COMPRESSIBLE_KINDS for layer in census.layers if layer.reason is None)
    assert len({layer.name for layer in census.layers}) == len(census.layers)
    # Every parameter belongs to exactly one layer of the plan.
    assert sum(layer.params for layer in census.layers) == census.total_params == count_params(module)
    assert {layer.name for layer in find_layers(module)} == {layer.name for layer in census.layers}


@pytest.mark.parametrize(("name", "how"), ALL)
def test_total_macs_are_half_the_flop_counter(name: str, how: str) -> None:
    module = load_model(build(name, how))
    torch.manual_seed(1)
    inputs = CASES[name].inputs(1)
    census = take_census(module, inputs)
    stock = load_model(build(name, how)).eval()
    # Without oneDNN a recurrent layer is the products that the counter knows.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        stock(*inputs)
    assert census.total_macs == counter.get_total_flops() // 2 == count_macs(module, inputs)
    assert sum(layer.macs or 0 for layer in census.layers) == census.total_macs


def test_census_leaves_the_module_alone() -> None:
    module = load_model(build("several_methods", "scripted"))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    take_census(module, CASES["several_methods"].inputs(1))
    assert module.training
    assert module.seen == 0
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_shapes_and_macs_of_a_strided_convolution() -> None:
    layer = census_of("resnet", "scripted")["layer1.0.conv1"]
    assert (layer.kind, layer.weight, layer.bias) == ("conv2d", "layer1.0.conv1.weight", None)
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((2, 2), (1, 1), (1, 1), 1)
    assert (layer.input_shape, layer.output_shape) == ((1, 3, 16, 16), (1, 6, 8, 8))
    assert (layer.input_hw, layer.output_hw) == (((16, 16),), ((8, 8),))
    assert layer.macs == 6 * 3 * 9 * 64
    assert layer.params == 6 * 3 * 9


def test_a_layer_in_a_loop_is_one_layer_with_all_its_calls() -> None:
    layers = census_of("looped", "scripted")
    assert layers["step"].calls == 3
    assert layers["step"].macs == 3 * 36
    assert layers["step"].rows == (1, 1, 1)
    assert layers["conv"].output_hw == ((6, 6), (3, 3), (2, 2))
    assert layers["conv"].macs == 2 * 2 * 9 * (36 + 9 + 4)


def test_the_arm_that_did_not_run_says_so() -> None:
    layers = census_of("branched", "scripted")
    assert layers["positive"].reason is None
    assert layers["negative"].reason is ReasonCode.NOT_EXECUTED
    assert layers["negative"].calls == 0


def test_padding_by_name_is_written_in_zeros() -> None:
    layers = census_of("same_padding", "traced")
    assert layers["same"].padding == (2, 2)
    assert layers["valid"].padding == (0, 0)
    # The reflection is an operator of its own before the convolution.
    assert layers["reflect"].padding == (0, 0)


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_every_kind_has_its_name_and_what_stays_dense_its_reason(how: str) -> None:
    layers = census_of("many_kinds", how)
    found = {name: (layer.kind, layer.reason) for name, layer in layers.items()}
    assert found == {
        "embedding": ("embedding", None),
        "lstm.weight_ih_l0": ("parameter", None),
        "lstm.weight_hh_l0": ("parameter", None),
        "lstm": ("lstm", ReasonCode.UNSUPPORTED_KIND),
        "conv1d": ("conv1d", None),
        "grouped": ("conv2d", None),
        "up": ("conv_transpose2d", None),
        "half_step": ("conv2d", None),
        "norm": ("norm", ReasonCode.UNSUPPORTED_KIND),
        "projection": ("matmul", None),
        "normed": ("linear", ReasonCode.WEIGHT_NOT_PARAMETER),
        "unused": ("other", ReasonCode.UNUSED),
    }
    assert layers["projection"].macs == 24
    assert layers["lstm.weight_hh_l0"].input_shape == (1, 7, 6)
    assert layers["lstm.weight_hh_l0"].macs == 7 * 24 * 6
    assert (layers["lstm"].params, layers["lstm"].calls, layers["lstm"].macs) == (48, 1, 0)  # its biases
    assert layers["grouped"].groups == 2
    assert layers["half_step"].padding == "same"
    assert (layers["up"].stride, layers["up"].output_padding, layers["up"].dilation) == ((1, 1), (0, 0), (1, 1))
    assert layers["embedding"].dtype_bits == 32


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_weight_with_several_sites_is_one_layer(how: str) -> None:
    layers = census_of("shared", how)
    assert set(layers) == {"fc", "first", "first.bias", "free"}
    assert (layers["fc"].calls, layers["fc"].macs, layers["fc"].bias) == (2, 72, "fc.bias")
    # One weight, two biases: these stay with the operators.
    assert (layers["first"].calls, layers["first"].macs, layers["first"].bias) == (2, 72, None)
    assert layers["fc"].reason is layers["first"].reason is None


def test_half_precision_is_found_and_a_frozen_weight_is_lifted() -> None:
    half = load_model(saved(torch.jit.script(nn.Sequential(nn.Linear(4, 4)).half())))
    assert [(layer.reason, layer.dtype_bits) for layer in find_layers(half)] == [(None, 16)]


def test_a_submodule_used_by_fork_too_stays_dense() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            later = torch.jit.fork(self.a, x)
            return self.a(self.b(x)) + torch.jit.wait(later)

    layers = {layer.name: layer.reason for layer in find_layers(load_model(saved(torch.jit.script(Forked()))))}
    assert layers == {"a": ReasonCode.SHARED_WEIGHT, "b": None}


def test_output_structure_is_described() -> None:
    module = load_model(build("two_inputs", "scripted"))
    output = take_census(module, CASES["two_inputs"].inputs(1)).output
    tensor = {"type": "tensor", "shape": [1, 4], "dtype": "float32"}
    assert output == {"type": "dict", "items": {"sum": tensor, "product": tensor}}


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(0) < 2:
            raise ValueError("this model wants pairs")
        return self.fc(x)


def test_a_model_that_raises_gives_its_own_message() -> None:
    module = load_model(saved(torch.jit.script(Raises())))
    with pytest.raises(ProblemError, match="this model wants pairs") as caught:
        take_census(module, (torch.randn(1, 3),))
    assert caught.value.code is ErrorCode.MODEL_RAISED


@pytest.mark.parametrize("shape", [(1, 13), (1, 3, 4)])
def test_inputs_of_the_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    module = load_model(build("mlp", "scripted"))
    with pytest.raises(ProblemError) as caught:
        take_census(module, (torch.randn(shape),))
    assert caught.value.code is ErrorCode.INPUT_SHAPE_MISMATCH
    assert str(list(shape)) in caught.value.detail


def test_an_argument_that_is_missing_is_named() -> None:
    with pytest.raises(ProblemError) as caught:
        count_macs(load_model(build("two_inputs", "scripted")), (torch.randn(1, 5),))
    assert caught.value.code is ErrorCode.INPUT_SHAPE_MISMATCH
