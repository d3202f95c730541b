"""A term's plain module against the dense operator, and its costs against what PyTorch counts."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from service.contract.plan import Form
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.modules import SumOfBranches
from worker.engine.forms.reshape import Reshape, named_reshape

TOLERANCE = 2e-5


def full_rank(term: LowRankTerm, weight: Tensor) -> Factors:
    u, s, v = torch.linalg.svd(term.reshape.to_matrix(weight.double()), full_matrices=False)
    roots = s.sqrt()
    return Factors((u * roots).to(weight.dtype), (roots[:, None] * v).to(weight.dtype))


class Dense(nn.Module):
    """The layer's own operator with a composed weight."""

    def __init__(self, term: LowRankTerm, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = term.emit_weight(factors)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.convolution = term.geometry.kind == "conv2d"

    def forward(self, x: Tensor) -> Tensor:
        if self.convolution:
            return functional.conv2d(x, self.weight(), self.bias)
        return functional.linear(x, self.weight(), self.bias)


def hold(term: LowRankTerm, weight: Tensor, bias: Tensor | None, x: Tensor, expected: Tensor) -> None:
    """Full rank equals the dense operator; costs are what PyTorch counts for one sample."""
    factors = full_rank(term, weight)
    module = torch.jit.script(Dense(term, factors, bias) if term.composed else term.emit(factors, bias)).eval()
    with torch.no_grad():
        module(x)  # a weight is composed at the first call
        with FlopCounterMode(display=False) as counter:
            y = module(x)
    assert y.shape == expected.shape
    assert float((y - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    assert counter.get_total_flops() // 2 == term.macs(factors.rank)
    stored = sum(parameter.numel() for parameter in module.parameters()) - (0 if bias is None else bias.numel())
    assert stored == term.params(factors.rank)
    assert all(parameter.requires_grad for parameter in module.parameters())
    batch = torch.cat([x, 2 * x, x - 1]) if x.shape[0] == 1 else x  # the batch is free
    assert module(batch)[: len(x)].sub(expected).abs().max() <= TOLERANCE * expected.abs().max() + 1e-6


CONVOLUTIONS = [
    {},
    {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"stride": (3, 2), "padding": (0, 1)},
    {"dilation": (2, 1), "padding": (2, 0)},
]
PARTINGS = [rows for size in (1, 2, 3) for rows in itertools.combinations(range(4), size)]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("rows", PARTINGS)
def test_every_parting_of_a_convolutions_axes(rows: tuple[int, ...], options: dict[str, tuple[int, int]]) -> None:
    torch.manual_seed(0)
    shape = (6, 5, 3, 2)
    weight, bias, x = torch.randn(shape), torch.randn(6), torch.randn(1, 5, 11, 12)
    expected = functional.conv2d(x, weight, bias, **options)  # type: ignore[arg-type]
    geometry = Geometry("conv2d", shape, (Call(tuple(x.shape), tuple(expected.shape)),), **options)
    columns = tuple(axis for axis in range(4) if axis not in rows)
    p = torch.Size([shape[axis] for axis in rows]).numel()
    term = LowRankTerm(Reshape(shape, (*rows, *columns), (p, weight.numel() // p)), geometry)
    assert not term.composed
    hold(term, weight, bias, x, expected)


LINEAR_VIEWS = [(12, 8), (3, 4, 8), (12, 2, 4), (3, 4, 2, 4), (12, 8, 1)]


@pytest.mark.parametrize("view", LINEAR_VIEWS)
def test_every_parting_of_a_linear_layers_factored_axes(view: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(1, 7, 8)
    expected = functional.linear(x, weight, bias)
    geometry = Geometry("linear", (12, 8), (Call(tuple(x.shape), tuple(expected.shape)),))
    for permute in itertools.permutations(range(len(view))):
        for cut in range(1, len(view)):
            p = torch.Size([view[axis] for axis in permute[:cut]]).numel()
            term = LowRankTerm(Reshape(view, permute, (p, 96 // p)), geometry)
            assert not term.composed
            hold(term, weight, bias, x, expected)


def test_linear_layer_on_a_vector_and_on_an_empty_batch() -> None:
    weight = torch.randn(12, 8)
    for reshape in (named_reshape("matrix", (12, 8)), named_reshape("chunked", (12, 8))):
        assert reshape is not None
        term = LowRankTerm(reshape, Geometry("linear", (12, 8), (Call((1, 8), (1, 12)),)))
        module = torch.jit.script(term.emit(full_rank(term, weight), None))
        x = torch.randn(8)
        assert torch.allclose(module(x), functional.linear(x, weight), atol=1e-5)
        assert module(torch.zeros(0, 8)).shape == (0, 12)


def test_convolution_of_one_image_without_a_batch() -> None:
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(3, 9, 9)
    for rows in [(0,), (0, 2), (2, 3), (0, 1)]:
        columns = tuple(axis for axis in range(4) if axis not in rows)
        p = torch.Size([weight.shape[axis] for axis in rows]).numel()
        geometry = Geometry("conv2d", (4, 3, 3, 3), ())
        term = LowRankTerm(Reshape((4, 3, 3, 3), (*rows, *columns), (p, 108 // p)), geometry)
        module = torch.jit.script(term.emit(full_rank(term, weight), None))
        assert torch.allclose(module(x), functional.conv2d(x, weight), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "reshape"),
    [
        ("conv2d", (6, 5, 3, 2), Reshape((15, 2, 6), (1, 0, 2), (2, 90))),  # cuts across outputs and inputs
        ("conv2d", (6, 4, 4, 3), Reshape((6, 4, 2, 2, 3), (0, 1, 2, 3, 4), (48, 6))),  # splits the kernel
        ("linear", (12, 8), Reshape((8, 12), (0, 1), (8, 12))),
        ("linear", (3, 4), Reshape((2, 3, 2), (0, 2, 1), (2, 6))),  # the slides' own
    ],
)
def test_other_reshapes_are_composed_and_keep_the_dense_macs(
    kind: str, shape: tuple[int, ...], reshape: Reshape
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x = torch.randn(1, shape[1], 7, 8) if kind == "conv2d" else torch.randn(1, shape[1])
    operator = functional.conv2d if kind == "conv2d" else functional.linear
    expected = operator(x, weight, bias)
    geometry = Geometry(kind, shape, (Call(tuple(x.shape), tuple(expected.shape)),))  # type: ignore[arg-type]
    term = LowRankTerm(reshape, geometry)
    assert term.composed
    assert term.form == Form.COMPOSED
    assert term.macs(1) == geometry.dense_macs  # the weight is composed once
    assert term.macs(0) == term.params(0) == 0
    hold(term, weight, bias, x, expected)


@pytest.mark.parametrize(
    ("name", "shape", "params", "macs"),
    [  # methods L.3, for a 3×3 kernel, stride 2, input 8×10, output 4×5
        ("channel", (7, 5, 3, 3), 7 + 5 * 9, (7 + 5 * 9) * 4 * 5),
        ("spatial", (7, 5, 3, 3), 7 * 3 + 5 * 3, 5 * 3 * 8 * 5 + 7 * 3 * 4 * 5),
        ("spatial_transposed", (7, 5, 3, 3), 7 * 3 + 5 * 3, 5 * 3 * 4 * 10 + 7 * 3 * 4 * 5),
        ("matrix", (9, 4), 9 + 4, 9 + 4),
        ("chunked", (6, 12), 6 * 3 + 12 // 3, 6 * 3 + 12),  # s = 3
    ],
)
def test_costs_per_rank_are_the_published_ones(name: str, shape: tuple[int, ...], params: int, macs: int) -> None:
    reshape = named_reshape(name, shape, 3)  # type: ignore[arg-type]
    assert reshape is not None
    if len(shape) == 4:
        call = Call((1, shape[1], 8, 10), (1, shape[0], 4, 5))
        geometry = Geometry("conv2d", shape, (call,), (2, 2), (1, 1))
    else:
        geometry = Geometry("linear", shape, (Call((1, shape[1]), (1, shape[0])),))
    term = LowRankTerm(reshape, geometry)
    assert (term.params_per_rank, term.macs_per_rank) == (params, macs)
    assert term.form == Form(name)


def test_macs_are_summed_over_the_calls() -> None:
    once = Geometry("linear", (9, 4), (Call((1, 4), (1, 9)),))
    thrice = Geometry("linear", (9, 4), (Call((1, 4), (1, 9)), Call((3, 4), (3, 9))))
    reshape = named_reshape("matrix", (9, 4))
    assert reshape is not None
    assert LowRankTerm(reshape, thrice).macs_per_rank == 4 * LowRankTerm(reshape, once).macs_per_rank
    assert thrice.dense_macs == 4 * once.dense_macs


def test_a_sum_is_independent_branches_with_one_bias() -> None:
    torch.manual_seed(0)
    shape = (6, 5, 3, 3)
    weight, bias, x = torch.randn(shape), torch.randn(6), torch.randn(2, 5, 8, 8)
    geometry = Geometry("conv2d", shape, (Call((1, 5, 8, 8), (1, 6, 6, 6)),))
    branches: list[nn.Module] = []
    dense = torch.zeros(shape)
    for number, name in enumerate(("channel", "spatial", "spatial_transposed")):
        reshape = named_reshape(name, shape)  # type: ignore[arg-type]
        assert reshape is not None
        term = LowRankTerm(reshape, geometry)
        whole = full_rank(term, weight)
        part = Factors(whole.left[:, :2], whole.right[:2])
        dense += term.project(part)
        branches.append(term.emit(part, bias if number == 0 else None))
    module = torch.jit.script(SumOfBranches(branches))
    assert torch.allclose(module(x), functional.conv2d(x, dense, bias), atol=1e-4)
    assert sum(parameter.shape == (6,) for parameter in module.parameters()) == 1


@pytest.mark.parametrize(
    ("kind", "shape", "reshape", "form"),
    [
        ("linear", (12, 8), Reshape((96,), (0,), (12, 8)), Form.MATRIX),
        ("linear", (12, 8), Reshape((24, 4), (0, 1), (24, 4)), Form.CHUNKED),
        ("linear", (12, 8), Reshape((96,), (0,), (6, 16)), Form.CHUNKED),
        ("linear", (12, 8), Reshape((3, 32), (1, 0), (32, 3)), Form.CHUNKED),
        ("conv2d", (6, 4, 3, 2), Reshape((144,), (0,), (6, 24)), Form.CHANNEL),
        ("conv2d", (6, 4, 3, 2), Reshape((24, 6), (0, 1), (24, 6)), Form.CONTRACTED),
        ("conv2d", (6, 4, 3, 1), Reshape((24, 3), (1, 0), (3, 24)), Form.CONTRACTED),
        ("conv2d", (6, 4, 3, 2), Reshape((6, 1, 4, 3, 2, 1), (0, 1, 5, 2, 3, 4), (6, 24)), Form.CHANNEL),
        ("linear", (12, 1), Reshape((3, 4, 1), (1, 0, 2), (4, 3)), Form.CHUNKED),
        ("linear", (1, 12), Reshape((4, 3), (0, 1), (4, 3)), Form.CHUNKED),
    ],
)
def test_a_view_that_joins_axes_is_still_factored(
    kind: str, shape: tuple[int, ...], reshape: Reshape, form: Form
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    x = torch.randn(1, shape[1], 7, 8) if kind == "conv2d" else torch.randn(1, shape[1])
    expected = (functional.conv2d if kind == "conv2d" else functional.linear)(x, weight, bias)
    geometry = Geometry(kind, shape, (Call(tuple(x.shape), tuple(expected.shape)),))  # type: ignore[arg-type]
    term = LowRankTerm(reshape, geometry)
    assert (term.form, term.composed) == (form, False)
    hold(term, weight, bias, x, expected)
