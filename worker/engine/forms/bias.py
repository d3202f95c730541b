"""What is left of a layer whose terms all have rank 0: its bias, in the shape of its output."""

import torch
from torch import Tensor, nn

from worker.engine.forms.geometry import CONVOLUTIONS, TRANSPOSED, Geometry


class BiasRow(nn.Module):
    """The bias for every vector of the last axis: ``(…, n)`` → ``(…, m)``."""

    bias: Tensor

    def __init__(self, bias: Tensor, *, trained: bool) -> None:
        super().__init__()
        _hold(self, bias, trained=trained)

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the bias."""
        return self.bias.expand(list(x.shape[:-1]) + [self.bias.size(0)]).clone()  # what follows may write into it


class BiasEntry(nn.Module):
    """The bias for every index: an embedding of rank 0, ``(…)`` → ``(…, d)``."""

    bias: Tensor

    def __init__(self, bias: Tensor, *, trained: bool) -> None:
        super().__init__()
        _hold(self, bias, trained=trained)

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the bias."""
        return self.bias.expand(list(x.shape) + [self.bias.size(0)]).clone()


class BiasMap(nn.Module):
    """The bias at every place of a convolution's output: ``(…, c, spatial)`` → ``(…, n, spatial')``.

    The output's size is (L + 2p − d(k − 1) − 1)/s + 1 on each axis, of a transposed convolution
    (L − 1)s − 2p + d(k − 1) + o + 1.
    """

    bias: Tensor

    def __init__(self, bias: Tensor, geometry: Geometry, *, trained: bool) -> None:
        super().__init__()
        _hold(self, bias, trained=trained)
        self.kernel = list(geometry.kernel)
        self.stride = list(geometry.stride)
        self.same = geometry.padding == "same"
        self.padding = [0] * len(self.kernel) if isinstance(geometry.padding, str) else list(geometry.padding)
        self.dilation = list(geometry.dilation)
        self.output_padding = list(geometry.output_padding)
        self.transposed = geometry.kind in TRANSPOSED

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the bias."""
        axes = len(self.kernel)
        sizes: list[int] = []
        for axis in range(axes):
            size = x.size(axis - axes)
            reach = self.dilation[axis] * (self.kernel[axis] - 1)
            if self.transposed:
                size = (size - 1) * self.stride[axis] - 2 * self.padding[axis] + reach + self.output_padding[axis] + 1
            elif not self.same:
                size = (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1
            sizes.append(size)
        lead = list(x.shape[: x.dim() - axes - 1])
        return self.bias.reshape([-1] + [1] * axes).expand(lead + [self.bias.size(0)] + sizes).clone()


class ZeroWeight(nn.Module):
    """A weight that is zero: of a parameter whose operators are not looked at."""

    like: Tensor

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype))  # the network's dtype and device, wherever it goes
        self.shape = shape

    def forward(self) -> Tensor:
        """Give the weight."""
        return torch.zeros(self.shape, dtype=self.like.dtype, device=self.like.device)


def bias_alone(geometry: Geometry, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """Make the module of a layer that keeps its bias alone.

    Parameters
    ----------
    geometry : Geometry
        The layer.
    bias : Tensor or None
        ``(m,)``; without one the output is zero, and nothing is trained.
    dtype : torch.dtype
        Of the output.
    """
    trained = bias is not None
    held = torch.zeros(_outputs(geometry), dtype=dtype) if bias is None else bias.detach().clone().to(dtype)
    if geometry.kind in (*CONVOLUTIONS, *TRANSPOSED):
        return BiasMap(held, geometry, trained=trained)
    return BiasEntry(held, trained=trained) if geometry.kind == "embedding" else BiasRow(held, trained=trained)


def _hold(module: nn.Module, bias: Tensor, *, trained: bool) -> None:
    """Hold a bias as a parameter; zeros in place of one are no parameter of the network."""
    if trained:
        module.bias = nn.Parameter(bias)
    else:
        module.register_buffer("bias", bias)


def _outputs(geometry: Geometry) -> int:
    if geometry.kind in TRANSPOSED:
        return geometry.weight_shape[1] * geometry.groups
    return geometry.weight_shape[1] if geometry.kind in {"matmul", "embedding"} else geometry.weight_shape[0]
