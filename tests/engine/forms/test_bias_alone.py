"""A layer of rank 0 gives what its operator gives with a weight of zeros."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from worker.engine.forms.bias import ZeroWeight, bias_alone
from worker.engine.forms.geometry import Geometry


def same(geometry: Geometry, bias: Tensor | None, x: Tensor, expected: Tensor) -> None:
    module = torch.jit.script(bias_alone(geometry, bias, torch.float32))
    made = module(x)
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)
    assert len(list(module.parameters())) == (bias is not None), "zeros in place of a bias are no parameter"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x).relu_()  # no view of the bias
    assert counter.get_total_flops() == 0
    assert torch.equal(module(x), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions_of_every_kind(data: st.DataObject) -> None:
    axes, back = data.draw(st.integers(1, 3)), data.draw(st.booleans())

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    groups = data.draw(st.integers(1, 3))
    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 1), each(1, 2)
    output_padding = tuple(data.draw(st.integers(0, step - 1)) for step in stride) if back else (0,) * axes
    shape = (2 * groups, 4, *kernel) if back else (4 * groups, 2, *kernel)
    same_size = not back and set(stride) == {1} and data.draw(st.booleans())
    geometry = Geometry(
        f"conv_transpose{axes}d" if back else f"conv{axes}d",
        shape,
        (),
        stride,
        "same" if same_size else padding,
        dilation,
        output_padding,
        groups,
    )
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*lead, 2 * groups, *each(6, 9))
    bias = torch.randn(4 * groups) if data.draw(st.booleans()) else None
    options = {"output_padding": output_padding} if back else {}
    operator = getattr(functional, geometry.kind)
    expected = operator(
        x, torch.zeros(shape), bias, stride, geometry.padding, dilation=dilation, groups=groups, **options
    )
    same(geometry, bias, x, expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_products_and_embeddings(lead: tuple[int, ...], bias: Tensor | None) -> None:
    x = torch.randn(*lead, 4)
    same(Geometry("linear", (5, 4), ()), bias, x, functional.linear(x, torch.zeros(5, 4), bias))
    same(Geometry("matmul", (4, 5), ()), bias, x, functional.linear(x, torch.zeros(5, 4), bias))
    if bias is None:
        index = torch.randint(0, 7, lead)
        same(Geometry("embedding", (7, 5), ()), None, index, functional.embedding(index, torch.zeros(7, 5)))


def test_a_parameter_of_zeros_follows_its_network() -> None:
    module = torch.jit.script(ZeroWeight([3, 2], torch.float32)).half()
    held = io.BytesIO()
    torch.jit.save(module, held)
    held.seek(0)
    made = torch.jit.load(held)()
    assert made.dtype == torch.float16
    assert torch.equal(made, torch.zeros(3, 2, dtype=torch.float16))
