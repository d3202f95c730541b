"""Operators of which filters or channels are left out: fewer multiply-adds, the same inputs and outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.forms.geometry import TRANSPOSED, Geometry

_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


class OutputsKept(nn.Module):
    """An operator with some of the outputs; the others are 0, or their bias."""

    index: Tensor

    def __init__(
        self, operator: nn.Module, index: Tensor, bias: nn.Parameter | None, *, dim: int, outputs: int
    ) -> None:
        super().__init__()
        self.operator = operator
        self.register_buffer("index", index)
        self.bias = bias
        self.dim = dim  # from the end
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator and put its outputs in their places."""
        y: Tensor = self.operator(x)
        shape = list(y.shape)
        shape[self.dim] = self.outputs
        total = torch.zeros(shape, dtype=y.dtype, device=y.device)
        total = total.index_copy(self.dim, self.index.to(torch.int64), y)
        bias = self.bias
        if bias is not None:
            total = total + bias.reshape([-1] + [1] * (-1 - self.dim)).to(y.dtype)
        return total


class InputsKept(nn.Module):
    """An operator that looks at some of the inputs."""

    index: Tensor

    def __init__(self, operator: nn.Module, index: Tensor, *, dim: int) -> None:
        super().__init__()
        self.operator = operator
        self.register_buffer("index", index)
        self.dim = dim  # from the end

    def forward(self, x: Tensor) -> Tensor:
        """Pick the inputs and apply the operator."""
        y: Tensor = self.operator(x.index_select(self.dim, self.index.to(torch.int64)))
        return y


def emit_outputs_kept(geometry: Geometry, values: Tensor, index: Tensor, bias: Tensor | None) -> nn.Module:
    """Emit the operator of the kept filters.

    Parameters
    ----------
    geometry : Geometry
        A linear layer, matmul, convolution without groups, or embedding.
    values : Tensor
        The weight's slices along its outputs.
    index : Tensor
        ``(κ,)``, their places.
    bias : Tensor or None
        ``(m,)``, of all outputs.
    """
    outputs = geometry.weight_shape[1] if _inputs_first(geometry) else geometry.weight_shape[0]
    parameter = None if bias is None else nn.Parameter(bias.detach().clone())
    return OutputsKept(_operator(geometry, values, None), index, parameter, dim=_feature_dim(geometry), outputs=outputs)


def emit_inputs_kept(geometry: Geometry, values: Tensor, index: Tensor, bias: Tensor | None) -> nn.Module:
    """Emit the operator of the kept channels.

    Parameters
    ----------
    geometry : Geometry
        A linear layer, matmul, or convolution without groups.
    values : Tensor
        The weight's slices along its inputs.
    index : Tensor
        ``(κ,)``, their places.
    bias : Tensor or None
        ``(m,)``.
    """
    return InputsKept(_operator(geometry, values, bias), index, dim=_feature_dim(geometry))


def slice_index_dtype(count: int) -> torch.dtype:
    """Type of a stored place along an axis."""
    return torch.int16 if count <= 2**15 else torch.int32


def slice_index_bits(count: int) -> int:
    """Bits of a stored place along an axis."""
    return 16 if count <= 2**15 else 32


def _inputs_first(geometry: Geometry) -> bool:
    return geometry.kind in {"matmul", "embedding", *TRANSPOSED}


def _feature_dim(geometry: Geometry) -> int:
    return -1 - len(geometry.kernel)


def _operator(geometry: Geometry, values: Tensor, bias: Tensor | None) -> nn.Module:
    weight = (values.T if geometry.kind == "matmul" else values).detach().clone().contiguous()
    if geometry.kind == "embedding":
        operator: Any = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif geometry.kind in {"linear", "matmul"}:
        operator = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        operator = _convolution(geometry, weight, has_bias=bias is not None)
    operator.weight = nn.Parameter(weight)
    if bias is not None:
        operator.bias = nn.Parameter(bias.detach().clone())
    return operator  # type: ignore[no-any-return]


def _convolution(geometry: Geometry, weight: Tensor, *, has_bias: bool) -> nn.Module:
    first, second = weight.shape[:2]
    options: dict[str, Any] = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "bias": has_bias,
        "device": "meta",
    }
    if geometry.kind in TRANSPOSED:
        options["output_padding"] = geometry.output_padding
        first, second = second, first
    return _CONVOLUTIONS[geometry.kind](second, first, geometry.kernel, **options)
