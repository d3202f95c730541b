import io

import pytest
import torch
from network_corpus import factor_pair, saved
from torch import Tensor, nn

from worker.engine.network.costs import count_macs, take_census
from worker.engine.network.export import export_bytes
from worker.engine.network.load import load_model
from worker.engine.network.replace import Replacement, replace_layers


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory)[0]


class WidthsApart(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, kdim=6, vdim=6, batch_first=True)
        if bias:
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def fused(module: torch.jit.ScriptModule) -> bool:
    graph = module.forward.inlined_graph
    return "_transformer_encoder_layer_fwd" in str(graph) or "_native_multi_head_attention" in str(graph)


def check(file: bytes, inputs: tuple[Tensor, ...], expected: dict[str, str]) -> torch.jit.ScriptModule:
    """Replace every layer at full rank; compare with gradients and without, where the fused path ran."""
    module = load_model(file)
    census = take_census(module, tuple(x[:1] for x in inputs))
    assert {layer.name: layer.kind for layer in census.layers if layer.reason is None} == expected
    assert sum(layer.params for layer in census.layers) == census.total_params
    assert count_macs(module, tuple(x[:1] for x in inputs)) == census.total_macs
    state = dict(module.named_parameters(remove_duplicate=False))
    replace_layers(module, {layer.name: factor_pair(layer, state) for layer in census.layers if layer.reason is None})
    exported = torch.jit.load(io.BytesIO(export_bytes(module))).eval()
    reference = load_model(file).eval()
    torch.testing.assert_close(exported(*inputs), reference(*inputs), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(exported(*inputs), reference(*inputs), rtol=1e-5, atol=1e-5)
    weights = {name for layer in census.layers if layer.reason is None for name in layer.names}
    assert not weights & {name for name, _ in exported.named_parameters()}
    return exported


@pytest.mark.parametrize("how", ["scripted", "traced", "scripted in train mode"])
def test_the_fused_projection_of_self_attention_is_a_linear_layer(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    model = SelfAttention().train(how == "scripted in train mode")
    file = saved(torch.jit.trace(model, (x,), check_trace=False) if how == "traced" else torch.jit.script(model))
    names = {"attention.in_proj_weight": "linear", "attention.out_proj": "linear"}
    exported = check(file, (x,), names)
    assert not fused(exported)


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_a_projection_that_is_chunked_before_its_use_is_composed(how: str) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 8), torch.randn(3, 4, 8))
    model = CrossAttention().eval()
    file = saved(torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, inputs, check_trace=False))
    check(file, inputs, {"attention.in_proj_weight": "parameter", "attention.out_proj": "linear"})


@pytest.mark.parametrize(("how", "bias"), [("scripted", True), ("traced", True), ("traced", False)])
def test_keys_and_values_of_other_widths_have_projections_whose_biases_stay(how: str, bias: bool) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 8), torch.randn(3, 4, 6))
    model = WidthsApart(bias=bias).eval()
    file = saved(torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, inputs, check_trace=False))
    names = dict.fromkeys([f"attention.{which}_proj_weight" for which in "qkv"] + ["attention.out_proj"], "linear")
    check(file, inputs, names)


def test_an_encoder_with_a_mask_runs_its_plain_path() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    file = saved(torch.jit.script(Encoder().eval()))
    reference = load_model(file)
    names = {
        f"encoder.layers.{at}.{name}": "linear"
        for at in (0, 1)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    }
    module = load_model(file)
    x = torch.randn(3, 5, 8)
    census = take_census(module, (x[:1], mask[:1]))
    assert {layer.name: layer.kind for layer in census.layers if layer.reason is None} == names
    state = dict(module.named_parameters())
    replace_layers(module, {layer.name: factor_pair(layer, state) for layer in census.layers if layer.reason is None})
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    assert not fused(exported)
    with torch.no_grad():
        expected, found = reference(x, mask), exported(x, mask)
    # The nested path gives zeros where the mask says so, the plain one what it computes there.
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-5, atol=1e-5)


def test_fused_attention_stays_where_weights_are_composed_or_untouched() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    file = saved(torch.jit.script(nn.Sequential(SelfAttention(), SelfAttention(), nn.Linear(8, 8)).eval()))
    module = load_model(file)
    census = take_census(module, (x,))
    weight = module.state_dict()["0.attention.in_proj_weight"]
    last = next(layer for layer in census.layers if layer.name == "2")

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(weight.clone())

        def forward(self) -> Tensor:
            return self.values * 1.0

    replace_layers(
        module,
        {"0.attention.in_proj_weight": Replacement(weight=Whole()), "2": factor_pair(last, module.state_dict())},
    )
    exported = torch.jit.load(io.BytesIO(export_bytes(module)))
    assert str(exported.forward.inlined_graph).count("aten::_native_multi_head_attention(") == 2
    with torch.no_grad():
        torch.testing.assert_close(exported(x), load_model(file)(x), rtol=1e-5, atol=1e-5)


def test_a_trace_of_the_fused_operator_has_composed_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        file = saved(torch.jit.trace(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (x,)))
    assert fused(load_model(file))
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    check(file, (x,), dict.fromkeys(names, "parameter"))
