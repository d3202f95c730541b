"""The plain modules that compressed layers are emitted as; each scripts, saves, trains and loads in stock PyTorch."""

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


class SharedDepthwise(nn.Module):
    """The same r spatial filters on every channel: (…, c, H, W) → (…, c·r, H', W')."""

    def __init__(self, filters: nn.Conv2d) -> None:
        super().__init__()
        self.filters = filters

    def forward(self, x: Tensor) -> Tensor:
        """Fold the channels into the batch, filter, and unfold."""
        y: Tensor = self.filters(x.reshape(-1, 1, x.size(-2), x.size(-1)))
        return y.reshape(list(x.shape[:-3]) + [x.size(-3) * y.size(-3), y.size(-2), y.size(-1)])


class ContractedLinear(nn.Module):
    """A linear layer as two contractions over factors of its axes (chunked, Kronecker and the like).

    The input's features are viewed as `in_view`, permuted to (kept, contracted); `right` maps the contracted part to
    (rank, o_c); `left` maps (kept, rank) to o_r; the pair (o_c, o_r) is permuted to the output's order.
    """

    def __init__(
        self,
        right: nn.Linear,
        left: nn.Linear,
        bias: nn.Parameter | None,
        *,
        in_view: list[int],
        in_permute: list[int],
        kept: int,
        rank: int,
        out_view: list[int],
        out_permute: list[int],
    ) -> None:
        super().__init__()
        self.right = right
        self.left = left
        self.bias = bias
        self.in_view = in_view
        self.in_permute = in_permute
        self.kept = kept
        self.rank = rank
        self.out_view = out_view
        self.out_permute = out_permute

    def forward(self, x: Tensor) -> Tensor:
        """Apply both contractions to the last axis of ``(…, n)``; gives ``(…, m)``."""
        lead = list(x.shape[:-1])
        rows = x.reshape([-1] + self.in_view).permute([0] + [axis + 1 for axis in self.in_permute])
        batch = rows.size(0)
        outer = self.right.weight.size(0) // self.rank  # sizes are written out: an empty batch has none to infer
        hidden = self.right(rows.reshape(batch, self.kept, self.right.weight.size(1)))  # (B, i_r, o_c·rank)
        hidden = hidden.reshape(batch, self.kept, outer, self.rank).permute(0, 2, 1, 3)  # (B, o_c, i_r, rank)
        y: Tensor = self.left(hidden.reshape(batch, outer, self.kept * self.rank))  # (B, o_c, o_r)
        y = y.reshape([batch] + self.out_view).permute([0] + [axis + 1 for axis in self.out_permute])
        y = y.reshape(lead + [outer * self.left.weight.size(0)])
        bias = self.bias
        if bias is not None:
            y = y + bias
        return y


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


class ComposedLinear(nn.Module):
    """A linear layer whose weight is composed at each call."""

    def __init__(self, weight: ComposedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dense operator with the composed weight."""
        return functional.linear(x, self.weight(), self.bias)


class ComposedConv2d(nn.Module):
    """A 2-D convolution whose weight is composed at each call."""

    def __init__(
        self,
        weight: ComposedWeight,
        bias: nn.Parameter | None,
        *,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stride = stride
        self.padding = padding
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dense operator with the composed weight."""
        return functional.conv2d(x, self.weight(), self.bias, self.stride, self.padding, self.dilation)
