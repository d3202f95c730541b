"""The plain modules that compressed layers are emitted as; each scripts, saves, trains and loads in stock PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class SumOfBranches(nn.Module):
    """Independent branches on the same input, summed: Θ₁x + Θ₂x and so on."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches[1:])
        self.first = branches[0]

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches' outputs."""
        total: Tensor = self.first(x)
        for branch in self.branches:
            total = total + branch(x)
        return total


class SumOfWeights(nn.Module):
    """Modules whose `forward()` gives a weight, summed: Δ₁(Θ₁) + Δ₂(Θ₂) and so on."""

    def __init__(self, weights: list[nn.Module]) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights[1:])
        self.first = weights[0]

    def forward(self) -> Tensor:
        """Sum of the weights."""
        total: Tensor = self.first()
        for weight in self.weights:
            total = total + weight()
        return total


class Factor(nn.Module):
    """A factor kept in a dtype of its own; `forward()` gives it in the dtype of the network around it.

    While it is trained it may be `widened`: steps of training are smaller than what 16 bits can tell apart. Then it is
    rounded at each call, so that the network answers as it will from the file, and gradients pass as if it were not.
    """

    like: Tensor

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone().contiguous())
        self.register_buffer("like", torch.empty(0, dtype=dtype))
        self.float16 = value.dtype == torch.float16

    def forward(self) -> Tensor:
        """Cast the factor."""
        if self.value.dtype != self.like.dtype:
            return self.value.to(self.like.dtype)
        rounded = self.value.detach().to(torch.float16 if self.float16 else torch.bfloat16).to(self.like.dtype)
        return rounded + (self.value - self.value.detach())  # nothing is added but the way of the gradients

    def sources(self) -> list[Tensor]:
        """What the factor depends on."""
        return [self.value]

    def widened(self) -> None:
        """Hold the factor in the dtype of the network."""
        self.value = nn.Parameter(self.value.detach().to(self.like.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Factor":  # noqa: FBT001, FBT002
        """Keep the factor's own dtype where the network around it changes its."""
        dtype = self.value.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.value.data = self.value.data.to(dtype)
        return self


def widen_factors(module: nn.Module) -> None:
    """Hold every factor of a module in the dtype of its network, for training."""
    for part in module.modules():
        if isinstance(part, Factor):
            part.widened()


class ArrangedFactor(nn.Module):
    """A factor as the weight of an operator: viewed, permuted, reshaped."""

    def __init__(self, factor: nn.Module, *, view: list[int], permute: list[int], shape: list[int]) -> None:
        super().__init__()
        self.factor = factor
        self.view = view
        self.permute = permute
        self.shape = shape

    def forward(self) -> Tensor:
        """Arrange the factor."""
        value: Tensor = self.factor()
        return value.reshape(self.view).permute(self.permute).reshape(self.shape)


class WeightedLinear(nn.Module):
    """A linear layer whose weight a module gives."""

    def __init__(self, weight: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return functional.linear(x, self.weight(), self.bias)


class WeightedEmbedding(nn.Module):
    """An embedding whose table a module gives."""

    def __init__(self, weight: nn.Module) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Look the rows up."""
        return functional.embedding(x, self.weight())


class WeightedConvolution(nn.Module):
    """A convolution, transposed or not, of any number of axes, whose weight a module gives.

    `before` are zeros to put around the input where both sides of an axis differ, as ``functional.pad`` takes them.
    """

    before: list[int]

    def __init__(
        self,
        weight: nn.Module,
        bias: nn.Parameter | None,
        *,
        stride: list[int],
        padding: list[int],
        before: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stride = stride
        self.padding = padding
        self.before = before
        self.dilation = dilation
        self.transposed = transposed
        self.output_padding = output_padding
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator to a batch or to one sample."""
        alone = x.dim() == len(self.stride) + 1
        if alone:
            x = x.unsqueeze(0)
        if sum(self.before) > 0:
            x = functional.pad(x, self.before)
        y = torch.convolution(
            x,
            self.weight(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return y.squeeze(0) if alone else y


class ContractedLinear(nn.Module):
    """A linear layer as two contractions over factors of its axes (chunked, Kronecker and the like).

    The input's features are viewed as `in_view`, permuted to (kept, contracted); `first` maps the contracted part to
    (o_first, rank); `second` maps (kept, rank) to o_second; the pair (o_first, o_second) is permuted to the output's
    order.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        bias: nn.Parameter | None,
        *,
        in_view: list[int],
        in_permute: list[int],
        kept: int,
        contracted: int,
        outer: int,
        rank: int,
        out_view: list[int],
        out_permute: list[int],
    ) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.bias = bias
        self.in_view = in_view
        self.in_permute = in_permute
        self.kept = kept
        self.contracted = contracted
        self.outer = outer
        self.rank = rank
        self.out_view = out_view
        self.out_permute = out_permute

    def forward(self, x: Tensor) -> Tensor:
        """Apply both contractions to the last axis of ``(…, n)``; gives ``(…, m)``."""
        lead = list(x.shape[:-1])
        rows = x.reshape([-1] + self.in_view).permute([0] + [axis + 1 for axis in self.in_permute])
        batch = rows.size(0)  # sizes are written out: an empty batch has none to infer
        hidden = self.first(rows.reshape(batch, self.kept, self.contracted))  # (B, kept, o_first·rank)
        hidden = hidden.reshape(batch, self.kept, self.outer, self.rank).permute(0, 2, 1, 3)
        y: Tensor = self.second(hidden.reshape(batch, self.outer, self.kept * self.rank))  # (B, o_first, o_second)
        features = self.outer * y.size(2)
        y = y.reshape([batch] + self.out_view).permute([0] + [axis + 1 for axis in self.out_permute])
        y = y.reshape(lead + [features])
        bias = self.bias
        if bias is not None:
            y = y + bias
        return y


class ContractedConvolution(nn.Module):
    """A convolution as two over factors of its channels: as `ContractedLinear`, with the places of an image kept."""

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        bias: nn.Parameter | None,
        *,
        axes: int,
        in_view: list[int],
        in_permute: list[int],
        kept: int,
        contracted: int,
        outer: int,
        rank: int,
        out_view: list[int],
        out_permute: list[int],
    ) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.bias = bias
        self.in_view = in_view
        self.in_permute = [0, *(axis + 1 for axis in in_permute), *(axis + 1 + len(in_view) for axis in range(axes))]
        self.kept = kept
        self.contracted = contracted
        self.outer = outer
        self.rank = rank
        self.out_view = out_view
        self.out_permute = [0, *(axis + 1 for axis in out_permute), *(axis + 1 + len(out_view) for axis in range(axes))]
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Apply both convolutions to a batch or to one sample."""
        alone = x.dim() == self.axes + 1
        if alone:
            x = x.unsqueeze(0)
        batch, places = x.size(0), list(x.shape[2:])
        x = x.reshape([batch] + self.in_view + places).permute(self.in_permute)
        hidden: Tensor = self.first(x.reshape([batch * self.kept, self.contracted] + places))
        places = list(hidden.shape[2:])
        hidden = hidden.reshape([batch, self.kept, self.outer, self.rank] + places).transpose(1, 2)
        y: Tensor = self.second(hidden.reshape([batch * self.outer, self.kept * self.rank] + places))
        places, channels = list(y.shape[2:]), self.outer * y.size(1)
        y = y.reshape([batch] + self.out_view + places).permute(self.out_permute).reshape([batch, channels] + places)
        bias = self.bias
        if bias is not None:
            y = y + bias.reshape([-1] + [1] * self.axes)
        return y.squeeze(0) if alone else y


class ComposedWeight(nn.Module):
    """A weight rebuilt from its factors under a reshape that cuts across the weight's own axes."""

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        *,
        permuted: list[int],
        inverse: list[int],
        weight_shape: list[int],
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.permuted = permuted
        self.inverse = inverse
        self.weight_shape = weight_shape

    def forward(self) -> Tensor:
        """Compose the weight."""
        matrix = torch.matmul(self.left, self.right)
        return matrix.reshape(self.permuted).permute(self.inverse).reshape(self.weight_shape)

    def sources(self) -> list[Tensor]:
        """What the weight depends on."""
        return [self.left, self.right]


class ComposedOfModules(nn.Module):
    """A weight rebuilt from its factors under a reshape, where modules give the factors."""

    def __init__(
        self, left: nn.Module, right: nn.Module, *, permuted: list[int], inverse: list[int], weight_shape: list[int]
    ) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.permuted = permuted
        self.inverse = inverse
        self.weight_shape = weight_shape

    def forward(self) -> Tensor:
        """Compose the weight."""
        matrix = torch.matmul(self.left(), self.right())
        return matrix.reshape(self.permuted).permute(self.inverse).reshape(self.weight_shape)

    def sources(self) -> list[Tensor]:
        """What the weight depends on."""
        left: list[Tensor] = self.left.sources()  # type: ignore[operator]
        right: list[Tensor] = self.right.sources()  # type: ignore[operator]
        return left + right
