import io
import math

import pytest
import torch
import torch.nn.functional as F
from network_corpus import CASES, Halves, build, factor_pair, saved
from torch import Tensor, nn

from service.contract.plan import ReasonCode
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.network.costs import Census, take_census
from worker.engine.network.export import export_bytes
from worker.engine.network.layers import Layer
from worker.engine.network.load import load_model
from worker.engine.network.replace import Replacement, replace_layers

Kinds = dict[str, str]


def round_trip(model: nn.Module, inputs: tuple[Tensor, ...], how: str) -> tuple[Census, torch.jit.ScriptModule]:
    """Replace every layer that can be; compare in eval mode, and that the dense weights are gone."""
    model.eval()
    made = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, inputs, check_trace=False)
    return check_file(saved(made), inputs)


def check_file(file: bytes, inputs: tuple[Tensor, ...]) -> tuple[Census, torch.jit.ScriptModule]:
    module = load_model(file)
    census = take_census(module, tuple(x[:1] for x in inputs))
    assert sum(layer.params for layer in census.layers) == census.total_params
    assert len({layer.name for layer in census.layers}) == len(census.layers)
    state = dict(module.named_parameters(remove_duplicate=False))
    taken = [layer for layer in census.layers if layer.reason is None]
    replace_layers(module, {layer.name: factor_pair(layer, state) for layer in taken})
    content = export_bytes(module)
    expected = load_model(file).eval()(*inputs)
    torch.testing.assert_close(torch.jit.load(io.BytesIO(content)).eval()(*inputs), expected, rtol=1e-5, atol=1e-5)
    exported = torch.jit.load(io.BytesIO(content))
    assert not {name for layer in taken for name in layer.names} & {name for name, _ in exported.named_parameters()}
    return census, exported


def kinds(census: Census) -> Kinds:
    return {layer.name: layer.kind for layer in census.layers if layer.reason is None}


def layer_of(census: Census, name: str) -> Layer:
    return next(layer for layer in census.layers if layer.name == name)


BOTH = pytest.mark.parametrize("how", ["scripted", "traced"])


@BOTH
def test_convolutions_of_every_rank_and_direction(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)),
        nn.ConvTranspose3d(4, 4, 2, stride=2, groups=2),
        nn.Flatten(2, 3),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, padding="same"),
        nn.Conv2d(6, 3, (2, 3), padding="same", padding_mode="reflect"),
        nn.Flatten(2, 3),
        nn.Conv1d(3, 6, 3, stride=2, groups=3),
        nn.ConvTranspose1d(6, 2, 4, stride=3, output_padding=1),
    )
    census, _ = round_trip(model, (torch.randn(2, 2, 2, 3, 3),), how)
    assert list(kinds(census).values()) == [
        "conv3d",
        "conv_transpose3d",
        "conv_transpose2d",
        "conv2d",
        "conv2d",
        "conv1d",
        "conv_transpose1d",
    ]
    up = layer_of(census, "3")
    assert (up.stride, up.padding, up.output_padding, up.dilation) == ((2, 2), (1, 1), (1, 1), (2, 2))
    assert layer_of(census, "4").groups == 6
    for layer in census.layers:
        calls = tuple(Call(given, made) for given, made in layer.call_shapes)
        assert Geometry(layer.kind, layer.weight_shape, calls, groups=layer.groups).dense_macs == layer.macs


class Products(nn.Module):
    """Products with matrices: as GPT-2's Conv1D writes them, transposed, with scaled sums, from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.ParameterDict({"weight": torch.randn(6, 5), "bias": torch.randn(5)})
        self.turned = nn.Parameter(torch.randn(6, 5))
        self.scaled = nn.Parameter(torch.randn(6, 4))
        self.left = nn.Parameter(torch.randn(3, 4))
        self.stack = nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.c_attn["bias"], x, self.c_attn["weight"])
        x = torch.matmul(x, self.turned.t())
        x = torch.addmm(x[:, :4], x, self.scaled, beta=0.5)
        x = torch.matmul(self.left, x.t()).t()
        return torch.matmul(x, self.stack)


def test_products_with_matrices() -> None:
    torch.manual_seed(0)
    census, _ = round_trip(Products(), (torch.randn(4, 6),), "traced")
    assert kinds(census) == {
        "c_attn": "matmul",
        "turned": "linear",
        "scaled": "parameter",
        "left": "parameter",
        "stack": "parameter",
    }
    assert layer_of(census, "c_attn").bias == "c_attn.bias"
    assert layer_of(census, "c_attn").weight_shape == (6, 5)
    assert layer_of(census, "scaled").macs == 24
    assert layer_of(census, "left").macs == 12


class LanguageModel(nn.Module):
    """An embedding whose matrix is the output's too, and an untied one."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6, padding_idx=0)
        self.wpe = nn.Embedding(8, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wte(x) + self.wpe(torch.arange(x.size(1))))


@BOTH
def test_a_tied_embedding_is_one_parameter(how: str) -> None:
    torch.manual_seed(0)
    census, exported = round_trip(LanguageModel(), (torch.randint(0, 11, (3, 5)),), how)
    name = (
        "wte.weight" if how == "scripted" else next(layer.name for layer in census.layers if layer.kind == "parameter")
    )
    assert kinds(census) == {name: "parameter", "wpe": "embedding"}
    tied = layer_of(census, name)
    assert (tied.calls, tied.macs, tied.params) == (2, 5 * 66, 66)
    if how == "scripted":
        assert set(tied.names) == {"wte.weight", "head.weight"}
    assert sum(value.numel() for value in exported.parameters()) == 2 * 66 + 48 + 36


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = {
            "lstm": nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, proj_size=3),
            "gru": nn.GRU(4, 6, batch_first=True, bias=False),
            "rnn": nn.RNN(4, 6, batch_first=True, nonlinearity="relu"),
        }[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@BOTH
@pytest.mark.parametrize(("kind", "weights"), [("lstm", 12), ("gru", 2), ("rnn", 2)])
def test_recurrent_weights_are_parameters(kind: str, weights: int, how: str) -> None:
    torch.manual_seed(0)
    census, exported = round_trip(Recurrent(kind), (torch.randn(2, 5, 4),), how)
    found = kinds(census)
    assert len(found) == weights
    assert set(found.values()) == {"parameter"}
    assert {layer.name for layer in census.layers} - set(found) == ({"rnn"} if kind != "gru" else set())
    assert all(layer.macs is not None for layer in census.layers)
    assert sum(layer.macs or 0 for layer in census.layers) == census.total_macs
    if kind == "gru":
        assert layer_of(census, "rnn.weight_ih_l0").macs == 5 * 18 * 4
    names = {name for name, _ in exported.named_parameters()}
    assert not any(name.startswith("rnn.weight") for name in names)


class LastState(nn.Module):
    """Reads a recurrent layer's last state alone, of sequences that are packed or not."""

    __constants__ = ("packed",)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = (nn.GRU if kind == "gru" else nn.LSTM)(4, 6, batch_first=True)
        self.packed = kind == "packed lstm"

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            lengths = torch.full((x.size(0),), 3)
            x_packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            state = self.rnn(x_packed)[1]
        else:
            state = self.rnn(x)[1]
        return state[0] if isinstance(state, Tensor) else state[0][0]


@BOTH
@pytest.mark.parametrize("kind", ["gru", "lstm", "packed lstm"])
def test_recurrent_weights_have_run_where_only_the_last_state_is_read(kind: str, how: str) -> None:
    torch.manual_seed(0)
    census, _ = round_trip(LastState(kind), (torch.randn(2, 5, 4),), how)
    assert kinds(census) == dict.fromkeys(["rnn.weight_ih_l0", "rnn.weight_hh_l0"], "parameter")
    assert [layer.calls for layer in census.layers if layer.reason is None] == [1, 1]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)
        self.bag = nn.EmbeddingBag(7, 3)
        self.bilinear = nn.Bilinear(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bag = self.bag(x)
        h, c = self.cell(bag)
        for _ in range(2):
            h, c = self.cell(bag, (h, c))
        return self.bilinear(h, c)


def test_weights_without_a_kind_of_their_own_are_parameters() -> None:
    torch.manual_seed(0)
    census, _ = round_trip(Cells(), (torch.randint(0, 7, (3, 5)),), "scripted")
    names = ("bag.weight", "cell.weight_ih", "cell.weight_hh", "bilinear.weight")
    assert kinds(census) == dict.fromkeys(names, "parameter")


class Asks(nn.Module):
    """Code that asks a weight for its dtype and sizes, and reads biases that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv1d(1, 3, 3, bias=False)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        x = self.fc(x.to(weight.dtype).to(weight.device)) / math.sqrt(weight.size(1)) + weight.shape[0] + weight.dim()
        return F.conv1d(x.unsqueeze(1), self.conv.weight, torch.tanh(self.bias))


def test_questions_about_a_weight_are_answered_without_it() -> None:
    torch.manual_seed(0)
    census, exported = round_trip(Asks(), (torch.randn(4, 6),), "scripted")
    assert kinds(census) == {"fc": "linear", "conv": "conv1d"}
    assert layer_of(census, "conv").bias is None
    assert "fc.weight" not in dict(exported.named_parameters())


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.renormed = nn.Embedding(7, 3, max_norm=1.0)
        self.sparse = nn.Embedding(7, 3, sparse=True)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.renormed(x) + self.sparse(x))


def test_weights_that_are_written_or_computed_keep_a_reason() -> None:
    module = load_model(saved(torch.jit.trace(Renormed().eval(), (torch.zeros(1, 2, dtype=torch.long),))))
    census = take_census(module, (torch.zeros(1, 2, dtype=torch.long),))
    assert {layer.name: layer.reason for layer in census.layers} == {
        "renormed": ReasonCode.WEIGHT_NOT_PARAMETER,
        "sparse": ReasonCode.UNSUPPORTED_KIND,
        "fc.parametrizations.weight": ReasonCode.WEIGHT_NOT_PARAMETER,
    }
    assert sum(layer.params for layer in census.layers) == census.total_params


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_compressible(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    module = load_model(saved(torch.jit.script(model)))
    census = take_census(module, (torch.randn(1, 6, dtype=dtype),))
    assert [layer.dtype_bits for layer in census.layers] == [8 * dtype.itemsize] * 2
    replace_layers(module, {layer.name: factor_pair(layer, module.state_dict()) for layer in census.layers})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    x = torch.randn(4, 6, dtype=dtype)
    torch.testing.assert_close(exported(x), model(x), rtol=5e-2, atol=5e-2)


def test_every_floating_matrix_can_be_named_as_a_parameter() -> None:
    module = load_model(build("many_kinds", "scripted"))
    census = take_census(module, (torch.randint(0, 11, (1, 7)),))
    found = {each.name: (each.owner, each.macs, each.reason) for each in census.parameters}
    assert found["projection"] == ("projection", 24, None)
    assert found["conv1d.weight"] == ("conv1d", 6 * 6 * 3 * 7, None)
    assert found["normed.direction"] == ("normed", 0, None)
    assert found["unused.weight"] == ("unused", 0, ReasonCode.UNUSED)
    assert all(each.kind == "parameter" and len(each.weight_shape) >= 2 for each in census.parameters)
    file = build("many_kinds", "scripted")
    edited = load_model(file)
    state = edited.state_dict()
    names = [name for name, (_, _, reason) in found.items() if reason is None]
    replace_layers(edited, {name: Replacement(weight=Halves(state[name])) for name in names})
    exported = torch.jit.load(io.BytesIO(export_bytes(edited))).eval()
    x = torch.randint(0, 11, (3, 7))
    torch.testing.assert_close(exported(x), load_model(file).eval()(x), rtol=1e-5, atol=1e-5)
    assert not set(names) & {name for name, _ in exported.named_parameters()}


@pytest.mark.parametrize("name", ["resnet", "many_kinds", "several_methods", "shared", "looped"])
def test_an_artifact_is_compressed_again(name: str) -> None:
    torch.manual_seed(0)
    file = build(name, "scripted")
    inputs = CASES[name].inputs(3)
    first, exported = check_file(file, inputs)
    again, twice = check_file(saved(exported), inputs)
    before = {layer.name for layer in first.layers if layer.reason is None and layer.kind != "parameter"}
    layers = {layer.name for layer in again.layers if layer.reason is None}
    assert {f"{each.replace('.', '__')}__factors.0" for each in before} <= layers
    reference = load_model(file).eval()(*inputs)
    torch.testing.assert_close(twice.eval()(*inputs), reference, rtol=1e-5, atol=1e-5)
