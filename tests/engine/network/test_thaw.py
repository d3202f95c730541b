import io
from collections.abc import Callable

import pytest
import torch
from network_corpus import CASES, factor_pair, saved
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.costs import take_census
from worker.engine.network.export import export_bytes
from worker.engine.network.load import load_model
from worker.engine.network.operators import reject_unsafe_operators
from worker.engine.network.replace import replace_layers


class Tagger(nn.Module):
    """An embedding that is tied to the output, a recurrent layer, two norms, a product with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(12)
        self.batch_norm = nn.BatchNorm1d(12)
        self.down = nn.Parameter(torch.randn(12, 6))
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.lstm(self.embedding(x))[0])
        return self.head(self.batch_norm(h.transpose(1, 2)).transpose(1, 2) @ self.down)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Mirrored(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose, and a layer that has the encoder's first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.rest = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.encoder(x))
        return F.linear(code, self.encoder.weight.t(), self.rest) + F.linear(x, self.encoder.weight[:4]).sum(1, True)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 9, (batch, 5)),)


def frozen(model: nn.Module, inputs: tuple[Tensor, ...], how: str) -> bytes:
    model.eval()
    made = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, inputs, check_trace=False)
    return saved(torch.jit.freeze(made))


def compressed(file: bytes, inputs: tuple[Tensor, ...]) -> bytes:
    module = load_model(file)
    census = take_census(module, tuple(x[:1] for x in inputs))
    assert sum(layer.params for layer in census.layers) == census.total_params
    assert sum(layer.macs or 0 for layer in census.layers) <= census.total_macs
    state = dict(module.named_parameters())
    replace_layers(module, {layer.name: factor_pair(layer, state) for layer in census.layers if layer.reason is None})
    return export_bytes(module)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]], set[str]]] = {
    "conv_net": (CASES["conv_net"].build, CASES["conv_net"].inputs, {"conv2d", "linear"}),
    "tagger": (Tagger, tokens, {"parameter", "matmul"}),
    "many_kinds": (CASES["many_kinds"].build, CASES["many_kinds"].inputs, set()),
    "mirrored": (Mirrored, lambda batch: (torch.randn(batch, 12),), {"parameter"}),
    "attends": (Attends, lambda batch: (torch.randn(batch, 4, 8),), {"linear"}),
}


@pytest.mark.parametrize("how", ["scripted", "traced"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_frozen_models_have_layers_that_can_be_replaced(name: str, how: str) -> None:
    torch.manual_seed(0)
    build, make, kinds = MODELS[name]
    inputs = make(3)
    model = build()
    for norm in [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]:
        nn.init.normal_(norm.running_mean)
    file = frozen(model, inputs, how)
    stock = torch.jit.load(io.BytesIO(file))
    thawed = load_model(file)
    reject_unsafe_operators(thawed)
    assert not thawed.training
    found = {layer.kind for layer in take_census(thawed, tuple(x[:1] for x in inputs)).layers if layer.reason is None}
    assert kinds <= found
    with torch.no_grad():
        expected = stock(*inputs)
        torch.testing.assert_close(load_model(file)(*inputs), expected)
        exported = torch.jit.load(io.BytesIO(compressed(file, inputs)))
        torch.testing.assert_close(exported(*inputs), expected, rtol=1e-5, atol=1e-5)
    exported(*inputs).sum().backward()
    assert all(value.grad is not None for value in exported.parameters())


def test_names_say_operator_and_place_and_are_the_same_each_time() -> None:
    torch.manual_seed(0)
    file = frozen(Tagger(), tokens(2), "traced")
    first, second = (dict(load_model(file).named_parameters()) for _ in range(2))
    assert list(first) == list(second)
    assert {"embedding_2.weight", "recurrent_1.weight_0", "matmul_5.weight"} <= set(first)
    # A tied matrix is one parameter; vectors that freezing has pooled by their numbers are two again.
    assert sum(value.shape == (9, 6) for value in first.values()) == 1
    assert sum(value.shape == (12,) for value in first.values()) == 4


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) * self.fc(y)


def test_a_layer_that_is_called_twice_is_one_again() -> None:
    file = frozen(Twice(), (torch.randn(2, 4), torch.randn(2, 4)), "scripted")
    layers = take_census(load_model(file), (torch.randn(1, 4), torch.randn(1, 4))).layers
    assert [(layer.name, layer.bias, layer.calls) for layer in layers] == [("linear_1", "linear_1.bias", 2)]


def test_a_frozen_encoder_keeps_one_path() -> None:
    torch.manual_seed(0)
    file = frozen(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(2, 4, 8),), "scripted")
    layers = take_census(load_model(file), (torch.randn(1, 4, 8),)).layers
    assert [layer.kind for layer in layers if layer.reason is None] == ["linear"] * 4
    assert all(layer.reason is None or layer.kind == "norm" for layer in layers)


class Blurs(nn.Module):
    """A kernel that is a constant of the trace, not a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.kernel = [torch.full((1, 1, 3), 1 / 3)]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(self.fc(x)[:, None], self.kernel[0], padding=1)


def test_models_with_parameters_keep_their_constants() -> None:
    module = load_model(saved(torch.jit.trace(Blurs(), (torch.randn(2, 3),))))
    assert [name for name, _ in module.named_parameters()] == ["fc.weight", "fc.bias"]


def test_prepacked_operators_are_refused_by_name() -> None:
    model = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()))
    torch._C._jit_pass_convert_frozen_ops_to_mkldnn(model.graph)
    with pytest.raises(ProblemError) as caught:
        reject_unsafe_operators(model)
    assert caught.value.code is ErrorCode.MODEL_REJECTED_UNSAFE
    assert "mkldnn" in caught.value.detail.lower()
