"""Low-rank terms on every kind of layer: at full rank the dense operator, and the costs that PyTorch counts."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from service.contract.plan import Form
from service.contract.terms import LowRankTermSpec
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import TRANSPOSED, Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.modules import widen_factors
from worker.engine.forms.reshape import Reshape, named_reshape
from worker.engine.forms.term import Ask, NotApplicableError, Price

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
BACK = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@dataclass
class Layer:
    """A layer with numbers: its geometry for one sample, and what its operator gives."""

    kind: str
    weight: Tensor
    x: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, weight: Tensor) -> Tensor:
        if self.kind == "embedding":
            return functional.embedding(self.x, weight)
        if self.kind in {"linear", "matmul"}:
            return functional.linear(self.x, weight.T if self.kind == "matmul" else weight, self.bias)
        table = BACK if self.kind in TRANSPOSED else CONVOLUTION
        made: Tensor = table[weight.dim() - 2](self.x, weight, self.bias, **self.options)  # type: ignore[operator]
        return made

    @property
    def geometry(self) -> Geometry:
        axes = self.weight.dim() - 2
        fill = {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes, "output_padding": (0,) * axes}
        call = Call(tuple(self.x.shape), tuple(self(self.weight).shape))
        return Geometry(self.kind, tuple(self.weight.shape), (call,), **(fill | self.options))


def at_full_rank(term: LowRankTerm, weight: Tensor) -> Factors:
    made = term.fit(weight.double(), Ask(0.0, term.rank_max, term.rank_max))
    assert isinstance(made, Factors)
    return Factors(made.left.to(weight.dtype), made.right.to(weight.dtype))


def hold(term: LowRankTerm, layer: Layer, tolerance: float = 2e-5) -> nn.Module:
    factors = at_full_rank(term, layer.weight)
    expected = layer(layer.weight)
    close = tolerance * float(expected.abs().max())
    if term.composed:
        weight = torch.jit.script(term.emit_weight(factors).eval())
        with torch.no_grad():
            weight()  # composed once
            with FlopCounterMode(display=False) as counter:
                made = layer(weight())
        module: nn.Module = weight
        stay = term.geometry.dense_macs
    else:
        module, stay = torch.jit.script(term.emit(factors, layer.bias)), 0
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made = module(layer.x)
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    assert float((made - expected).abs().max()) <= close
    counts = term.counts_at(factors.rank)
    assert counter.get_total_flops() // 2 == counts.macs + stay
    bias = 0 if layer.bias is None or term.composed else layer.bias.numel()
    assert sum(parameter.numel() for parameter in module.parameters()) - bias == counts.params
    assert torch.allclose(term.project(factors), layer.weight, atol=10 * close)
    return module


def convolution(
    axes: int, c: int, n: int, kernel: tuple[int, ...], groups: int = 1, *, back: bool = False, **options: Any
) -> Layer:
    torch.manual_seed(0)
    shape = (c, n // groups, *kernel) if back else (n, c // groups, *kernel)
    kind = f"conv_transpose{axes}d" if back else f"conv{axes}d"
    x = torch.randn(1, c, *(9, 7, 5)[:axes])
    return Layer(kind, torch.randn(shape), x, torch.randn(n), {"groups": groups, **options})


LAYERS = {
    "conv1d": convolution(1, 4, 6, (3,), stride=(2,), padding=(1,)),
    "conv1d_same": convolution(1, 4, 6, (4,), padding="same"),
    "conv2d_same": convolution(2, 4, 6, (3, 2), padding="same", dilation=(1, 3)),
    "conv3d": convolution(3, 4, 6, (3, 2, 2), stride=(2, 1, 1), padding=(1, 0, 1)),
    "conv3d_flat": convolution(3, 4, 6, (1, 3, 2), dilation=(1, 2, 1)),
    "grouped1d": convolution(1, 4, 6, (3,), groups=2, padding=(2,)),
    "grouped2d": convolution(2, 6, 9, (3, 2), groups=3, stride=(1, 2), padding=(1, 0)),
    "depthwise": convolution(2, 6, 6, (3, 3), groups=6, padding=(1, 1)),
    "depthwise_multiplied": convolution(2, 4, 8, (3, 3), groups=4, stride=(2, 2)),
    "transposed1d": convolution(1, 4, 6, (3,), back=True, stride=(2,), padding=(1,), output_padding=(1,)),
    "transposed2d": convolution(2, 4, 6, (3, 2), back=True, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "transposed2d_grouped": convolution(2, 4, 6, (3, 2), 2, back=True, stride=(2, 3), output_padding=(1, 2)),
    "transposed2d_depthwise": convolution(2, 4, 4, (3, 3), 4, back=True, stride=(2, 2)),
    "transposed2d_one_to_many": convolution(2, 1, 5, (3, 2), back=True, stride=(2, 2)),
    "transposed2d_many_to_one": convolution(2, 5, 1, (3, 2), back=True, stride=(2, 2)),
    "transposed3d": convolution(3, 3, 4, (2, 3, 2), back=True, stride=(2, 1, 2), padding=(0, 1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_parting_of_the_axes_of_every_convolution(name: str) -> None:
    layer = LAYERS[name]
    geometry = layer.geometry
    block = (geometry.weight_shape[0] // geometry.groups, *geometry.weight_shape[1:])
    factored = 0
    for size in range(1, len(block)):
        for rows in itertools.combinations(range(len(block)), size):
            columns = tuple(axis for axis in range(len(block)) if axis not in rows)
            p = torch.Size([block[axis] for axis in rows]).numel()
            reshape = Reshape(block, (*rows, *columns), (p, torch.Size(block).numel() // p))
            term = LowRankTerm(reshape, geometry, groups=geometry.groups)
            hold(term, layer)
            factored += not term.composed
    assert factored >= 2


@pytest.mark.parametrize("reshape", ["channel", "spatial", "spatial_transposed"])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.weight.dim() > 3])
def test_named_reshapes_of_every_convolution_are_factored(name: str, reshape: str) -> None:
    layer = LAYERS[name]
    term = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": reshape}), layer.geometry)
    assert isinstance(term, LowRankTerm)
    assert not term.composed
    assert term.form in {Form(reshape), Form.CHANNEL, Form.SPATIAL, Form.MATRIX}
    module = hold(term, layer)
    one = layer.x[0]  # without a batch
    assert torch.allclose(module(one), module(layer.x)[0], atol=1e-4)
    again = type(term).from_facts(term.facts(), layer.geometry)
    assert (again.key, again.form) == (term.key, term.form)


PARTED = {
    "conv1d": ((4, 2, 2, 2, 3), (1, 2, 0, 3, 4), 4),  # 8 → 4·2 outputs, 4 → 2·2 inputs
    "conv2d": ((3, 2, 2, 2, 3, 2), (0, 2, 4, 1, 3, 5), 18),
    "conv2d_same": ((6, 2, 2, 3, 2), (1, 3, 0, 2, 4), 6),
    "conv3d": ((2, 3, 4, 3, 2, 2), (1, 3, 0, 2, 4, 5), 9),
    "transposed2d": ((2, 2, 3, 2, 3, 2), (0, 3, 4, 1, 2, 5), 12),
}
SPLIT = {
    "conv1d": convolution(1, 4, 8, (3,), stride=(2,), padding=(1,)),
    "conv2d": convolution(2, 4, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
    "conv2d_same": LAYERS["conv2d_same"],
    "conv3d": convolution(3, 4, 6, (3, 2, 2), padding=(1, 0, 1)),
    "transposed2d": convolution(2, 4, 6, (3, 2), back=True, stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
}


@pytest.mark.parametrize("name", PARTED)
def test_split_channels_are_contracted_part_by_part(name: str) -> None:
    view, permute, p = PARTED[name]
    layer = SPLIT[name]
    term = LowRankTerm(Reshape(view, permute, (p, layer.weight.numel() // p)), layer.geometry)
    assert (term.composed, term.form) == (False, Form.CONTRACTED)
    module = hold(term, layer)
    assert torch.allclose(module(layer.x[0]), module(layer.x)[0], atol=1e-4)


@pytest.mark.parametrize("name", SPLIT)
def test_kronecker_products_of_convolutions(name: str) -> None:
    layer = SPLIT[name]
    term = LowRankTerm.from_spec(LowRankTermSpec(reshape="kronecker"), layer.geometry)
    assert isinstance(term, LowRankTerm)
    assert (term.composed, term.form) == (False, Form.KRONECKER)
    hold(term, layer)


def test_costs_of_a_transposed_convolution_and_of_a_grouped_one_by_hand() -> None:
    up = Layer("conv_transpose2d", torch.randn(4, 6, 3, 2), torch.randn(1, 4, 5, 7), None, {"stride": (2, 2)})
    costs = {}
    for name in ("channel", "spatial"):
        term = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": name}), up.geometry)
        costs[name] = term.counts_at(1).params, term.counts_at(1).macs
    assert costs["channel"] == (4 + 6 * 6, (4 + 6 * 6) * 5 * 7)
    assert costs["spatial"] == (4 * 2 + 6 * 3, 4 * 2 * 5 * 7 + 6 * 3 * 5 * (6 * 2 + 2))
    grouped = LAYERS["grouped2d"].geometry  # 3 groups of 2 → 3 channels, 3×2 kernel
    term = LowRankTerm.from_spec(LowRankTermSpec(reshape="channel"), grouped)
    assert term.units_max == 3
    assert term.counts_at(2).params == 2 * 3 * (3 + 2 * 6)


@pytest.mark.parametrize("name", ["matrix", "chunked", "kronecker"])
@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_products_with_a_weight(kind: str, name: str) -> None:
    torch.manual_seed(0)
    for m, n in ((12, 8), (8, 12)):
        shape = (m, n) if kind == "linear" else (n, m)
        layer = Layer(kind, torch.randn(shape), torch.randn(1, 3, n), torch.randn(m))
        term = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": name}), layer.geometry)
        assert isinstance(term, LowRankTerm)
        assert (term.form, term.composed) == (Form(name), False)
        hold(term, layer)


def test_kronecker_costs_are_the_published_ones() -> None:
    layer = Layer("linear", torch.randn(12, 8), torch.randn(1, 8))
    term = LowRankTerm.from_spec(LowRankTermSpec(reshape="kronecker", kronecker=(3, 4)), layer.geometry)
    assert term.counts_at(1).params == 3 * 4 + 4 * 2
    assert term.counts_at(1).macs == min(3 * 4 * 2 + 3 * 4 * 2, 3 * 4 * 4 + 4 * 2 * 4)  # the cheaper order
    assert term.form == Form.KRONECKER
    left, right = torch.randn(12, 1), torch.randn(1, 8)
    made = term.project(Factors(left, right))
    assert torch.allclose(made, torch.kron(left.reshape(3, 4), right.reshape(4, 2)))
    with pytest.raises(NotApplicableError):
        LowRankTerm.from_spec(LowRankTermSpec(reshape="kronecker", kronecker=(5, 4)), layer.geometry)
    with pytest.raises(NotApplicableError):
        LowRankTerm.from_spec(LowRankTermSpec(reshape="kronecker"), Geometry("linear", (7, 8), ()))


def test_an_embedding_becomes_short_rows_and_a_matrix() -> None:
    layer = Layer("embedding", torch.randn(20, 6), torch.randint(0, 20, (1, 5)))
    term = LowRankTerm.from_spec(LowRankTermSpec(reshape="matrix"), layer.geometry)
    assert isinstance(term, LowRankTerm)
    assert (term.form, term.composed) == (Form.EMBEDDING, False)
    module = hold(term, layer)
    assert [type(part).__name__ for part in term.emit(at_full_rank(term, layer.weight), None)] == [
        "Embedding",
        "Linear",
    ]
    assert module(torch.tensor(3)).shape == (6,)
    chunked = LowRankTerm.from_spec(LowRankTermSpec(reshape="chunked"), layer.geometry)
    assert isinstance(chunked, LowRankTerm)
    assert chunked.composed
    hold(chunked, layer)


@pytest.mark.parametrize(("shape", "name"), [((8, 6), "matrix"), ((8, 6), "chunked"), ((4, 3, 2, 2), "channel")])
def test_a_parameter_is_always_composed(shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    term = LowRankTerm.from_spec(LowRankTermSpec.model_validate({"reshape": name}), Geometry("parameter", shape, ()))
    assert isinstance(term, LowRankTerm)
    assert term.composed
    weight = torch.randn(shape)
    factors = at_full_rank(term, weight)
    assert torch.allclose(term.emit_weight(factors)(), weight, atol=1e-5)
    assert term.counts_at(factors.rank).macs == 0  # those of the operators that use it stay
    with pytest.raises(NotImplementedError):
        term.emit(factors, None)


@pytest.mark.parametrize("name", ["conv1d", "grouped2d", "transposed2d", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    whole = LAYERS[name]
    assert whole.bias is not None
    layer = Layer(whole.kind, whole.weight.to(dtype), whole.x.to(dtype), whole.bias.to(dtype), whole.options)
    term = LowRankTerm.from_spec(LowRankTermSpec(reshape="channel"), layer.geometry)
    assert isinstance(term, LowRankTerm)
    factors = at_full_rank(term, layer.weight)
    module = torch.jit.script(term.emit(factors, layer.bias))
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    made, expected = module(layer.x), layer(layer.weight)
    assert made.dtype == dtype
    scale = 3 * torch.finfo(dtype).eps * max(term.reshape.matrix) ** 0.5
    assert float((made - expected).abs().max()) <= scale * float(expected.abs().max())


STORED = {
    **{name: (LAYERS[name], "channel") for name in ("conv1d_same", "conv2d_same", "grouped2d", "transposed2d")},
    "shared": (
        convolution(2, 4, 6, (3, 2), padding=(1, 1)),
        {"view": [6, 4, 6], "permute": [0, 1, 2], "matrix": [24, 6]},
    ),
    "linear": (Layer("linear", torch.randn(12, 8), torch.randn(1, 8), torch.randn(12)), "matrix"),
    "chunked": (Layer("matmul", torch.randn(12, 8), torch.randn(1, 12), torch.randn(8)), "chunked"),
    "embedding": (Layer("embedding", torch.randn(20, 6), torch.randint(0, 20, (1, 5))), "matrix"),
    "composed": (
        Layer("linear", torch.randn(3, 4), torch.randn(1, 4)),
        {"view": [2, 3, 2], "permute": [0, 2, 1], "matrix": [2, 6]},
    ),
}


@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", STORED)
def test_factors_may_be_stored_in_sixteen_bits(name: str, store_dtype: str) -> None:
    layer, reshape = STORED[name]
    spec = LowRankTermSpec.model_validate({"reshape": reshape, "store_dtype": store_dtype})
    term = LowRankTerm.from_spec(spec, layer.geometry)
    assert isinstance(term, LowRankTerm)
    assert term.counts_at(2).bits == 16 * term.counts_at(2).params
    factors = at_full_rank(term, layer.weight)
    stored = getattr(torch, store_dtype)
    assert torch.equal(factors.left.to(stored).float(), factors.left)  # the C step knows the rounding
    expected = layer(term.project(factors))
    plain = term.emit_weight(factors) if term.composed else term.emit(factors, layer.bias)
    module = torch.jit.script(plain.to(torch.float32))  # the dtype of the network, not of the file
    made = layer(module()) if term.composed else module(layer.x)
    assert made.dtype == torch.float32
    assert torch.allclose(made, expected, atol=1e-4 * float(expected.abs().max()))
    kept = [parameter for parameter in module.parameters() if parameter.dtype == stored]
    assert sum(parameter.numel() for parameter in kept) == term.counts_at(factors.rank).params
    made.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == stored for parameter in kept)
    widen_factors(plain)
    wide = torch.jit.script(plain)  # as it is trained: the same answers, gradients in single precision
    again = layer(wide()) if term.composed else wide(layer.x)
    assert torch.equal(again, made)
    again.square().sum().backward()
    assert all(parameter.grad is not None and parameter.dtype == torch.float32 for parameter in wide.parameters())
    for (name, one), other in zip(module.named_parameters(), wide.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        scale = float(other.grad.abs().max())
        assert torch.allclose(one.grad.float(), other.grad, atol=4 * torch.finfo(stored).eps * scale), name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_one_rank_for_all_groups_has_the_least_objective(data: st.DataObject) -> None:
    groups, n, c = (data.draw(st.integers(low, high)) for low, high in ((2, 4), (1, 4), (1, 3)))
    kernel = data.draw(st.sampled_from([(3,), (2, 2), (3, 1)]))
    geometry = Geometry(f"conv{len(kernel)}d", (groups * n, c, *kernel), (), groups=groups)
    reshape = named_reshape("channel", (n, c, *kernel))
    assert reshape is not None
    term = LowRankTerm(reshape, geometry, groups=groups)
    weight = torch.randn(geometry.weight_shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    weight = weight.double()
    pressure = data.draw(st.floats(0.0, 0.5))
    price = Price(params=1.0)
    objectives = []
    for rank in range(term.rank_max + 1):
        error = 0.0
        for block in term.reshape.to_matrices(weight, groups):
            error += float(torch.linalg.svdvals(block)[rank:].square().sum())
        objectives.append(pressure * rank * term.params_per_rank + error)
        assert abs(float(term.energies(weight)[rank:].sum()) - error) <= 1e-9 * (1 + error)
    made = term.fit(weight, Ask(pressure, 0, term.rank_max, price=price))
    assert isinstance(made, Factors)
    error = float((weight - term.project(made)).square().sum())
    assert pressure * made.rank * term.params_per_rank + error <= min(objectives) * (1 + 1e-9) + 1e-9
