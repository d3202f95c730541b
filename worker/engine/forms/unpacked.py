"""The plain modules that packed weights are emitted as: codes and indices are buffers, values are parameters.

Each scripts, saves, trains and loads in stock PyTorch. `forward()` gives the weight. Gradients go to the values. One
value stands for many weights, and its gradient is divided by their number (by Σ level² for a scale): a step along it
is the step that gradient descent makes on the weight, projected back onto such weights. The plain sum would need a
learning rate of its own, thousands of times smaller.
"""

import torch
from torch import Tensor, nn

from worker.engine.forms.packing import unpack_codes, unpack_positions


def _with_gradient_over(values: Tensor, numbers: Tensor) -> Tensor:
    """The same values; what flows back through them is divided by the numbers.

    `data`, because freezing takes `detach` out of a model.
    """
    return values + (1.0 / numbers - 1.0) * (values - values.data)


def element_count(shape: list[int]) -> int:
    """Product of the lengths; TorchScript has no `math.prod`."""
    count = 1
    for length in shape:
        count *= length
    return count


class CodebookWeight(nn.Module):
    """A weight of k learned values, with one codebook or one for each slice along an axis."""

    codes: Tensor

    def __init__(self, values: Tensor, codes: Tensor, *, size: int, shape: list[int], axis: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)  # (g, k)
        self.register_buffer("codes", codes)  # packed, of the weight with `axis` first
        self.size = size
        self.shape = shape
        self.axis = axis

    def forward(self) -> Tensor:
        """Look the values up."""
        count = element_count(self.shape)
        codes = unpack_codes(self.codes, self.size, count).to(torch.int32)
        groups = self.values.size(0)
        if groups > 1:
            starts = torch.arange(groups, dtype=torch.int32, device=codes.device) * self.size
            codes = (codes.reshape(groups, -1) + starts.unsqueeze(1)).reshape(-1)
        values: Tensor = self.values
        if values.element_size() < 4:  # a gradient is the sum over all weights of one code: not in 16 bits
            values = values.to(torch.float32)
        values = values.reshape(-1)
        if torch.is_grad_enabled():
            numbers = torch.bincount(codes, minlength=values.numel()).clamp(min=1).to(values.dtype)
            values = _with_gradient_over(values, numbers)
        weight = values.index_select(0, codes).to(self.values.dtype)
        return weight.reshape(self.shape).movedim(0, self.axis)

    def sources(self) -> list[Tensor]:
        """What the weight depends on and training changes."""
        return [self.values]


class GridWeight(nn.Module):
    """A weight on the grid a·(slope·code − origin), with one scale a or one for each slice along an axis."""

    values: Tensor
    codes: Tensor

    def __init__(
        self,
        values: Tensor,
        codes: Tensor,
        *,
        size: int,
        slope: int,
        origin: int,
        shape: list[int],
        axis: int,
        learned: bool,
    ) -> None:
        super().__init__()
        if learned:
            self.values = nn.Parameter(values)  # (g, 1)
        else:
            self.register_buffer("values", values)
        self.register_buffer("codes", codes)
        self.size = size
        self.slope = slope
        self.origin = origin
        self.shape = shape
        self.axis = axis

    def forward(self) -> Tensor:
        """Scale the levels."""
        count = element_count(self.shape)
        levels = unpack_codes(self.codes, self.size, count).to(torch.int32) * self.slope - self.origin
        values: Tensor = self.values
        if values.element_size() < 4:
            values = values.to(torch.float32)
        grid = levels.reshape(values.size(0), -1).to(values.dtype)
        if torch.is_grad_enabled():
            values = _with_gradient_over(values, grid.square().sum(dim=1, keepdim=True).clamp(min=1.0))
        weight = (grid * values).to(self.values.dtype)
        return weight.reshape(self.shape).movedim(0, self.axis)

    def sources(self) -> list[Tensor]:
        """What the weight depends on and training changes."""
        return [self.values]


class PowerWeight(nn.Module):
    """A weight of 0 and signed powers of two; they stay such powers, so nothing of it is trained."""

    values: Tensor
    codes: Tensor
    levels: Tensor

    def __init__(self, values: Tensor, codes: Tensor, levels: Tensor, *, size: int, shape: list[int], axis: int):
        super().__init__()
        self.register_buffer("values", values)  # (g, 1)
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)  # (size,)
        self.size = size
        self.shape = shape
        self.axis = axis

    def forward(self) -> Tensor:
        """Look the powers up and scale them."""
        count = element_count(self.shape)
        levels = self.levels.index_select(0, unpack_codes(self.codes, self.size, count).to(torch.int32))
        weight = levels.reshape(self.values.size(0), -1) * self.values
        return weight.reshape(self.shape).movedim(0, self.axis)

    def sources(self) -> list[Tensor]:
        """What the weight depends on and training changes."""
        return [self.values]


class SparseWeight(nn.Module):
    """A weight that is zero but at some positions."""

    index: Tensor

    def __init__(self, values: Tensor, index: Tensor, *, bits: int, entries: int, shape: list[int]) -> None:
        super().__init__()
        self.values = nn.Parameter(values)  # (kept,)
        self.register_buffer("index", index)
        self.bits = bits
        self.entries = entries
        self.shape = shape

    def forward(self) -> Tensor:
        """Put the values in their places."""
        count = element_count(self.shape)
        positions = unpack_positions(self.index, self.bits, self.entries)
        weight = torch.zeros(count, dtype=self.values.dtype, device=self.values.device)
        return weight.index_copy(0, positions, self.values).reshape(self.shape)

    def sources(self) -> list[Tensor]:
        """What the weight depends on and training changes."""
        return [self.values]


class SlicedWeight(nn.Module):
    """A weight that is zero but in some slices along an axis."""

    index: Tensor

    def __init__(self, values: Tensor, index: Tensor, *, axis: int, length: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("index", index)
        self.axis = axis
        self.length = length

    def forward(self) -> Tensor:
        """Put the slices in their places."""
        shape = list(self.values.shape)
        shape[self.axis] = self.length
        weight = torch.zeros(shape, dtype=self.values.dtype, device=self.values.device)
        return weight.index_copy(self.axis, self.index.to(torch.int64), self.values)

    def sources(self) -> list[Tensor]:
        """What the weight depends on and training changes."""
        return [self.values]


class UnpackedOnce(nn.Module):
    """A weight that is rebuilt at the first call in evaluation mode, and again when something has changed.

    What it holds is in plain attributes: no part of the state of the module, not moved with it, and empty in a file
    that is saved before use. Where gradients are recorded, in training mode or not, the weight is rebuilt at every
    call, because they have to reach what it is made of. The module that it wraps names that in `sources`.
    """

    seen: list[Tensor]

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed
        self.cache = torch.empty(0)
        self.seen = []  # the sources that the cache was made of
        self.version = -1

    def forward(self) -> Tensor:
        """Give the weight."""
        sources: list[Tensor] = self.packed.sources()  # type: ignore[operator]
        if self.training or torch.is_grad_enabled():
            if self.cache.numel() > 0:
                self._drop()
            weight: Tensor = self.packed()
            return weight
        version = -1
        for source in sources:
            if not source.is_inference():  # such a tensor has no version
                if torch.jit.is_scripting():  # type: ignore[attr-defined]
                    version += source._version()  # type: ignore[operator]
                else:
                    version += source._version
        if self.cache.numel() == 0 or self.version != version or self._changed(sources):
            self.cache = self.packed().contiguous()
            self.seen = [source.clone() for source in sources]
            self.version = version
        return self.cache

    def sources(self) -> list[Tensor]:
        """What the weight depends on."""
        held: list[Tensor] = self.packed.sources()  # type: ignore[operator]
        return held

    def _changed(self, sources: list[Tensor]) -> bool:
        for place, source in enumerate(sources):
            seen = self.seen[place]
            if seen.dtype != source.dtype or seen.device != source.device:
                return True
            if not source.is_cuda and not torch.equal(seen, source):  # a GPU would wait for everything under way
                return True
        return False

    def _drop(self) -> None:
        self.cache = torch.empty(0)
        seen: list[Tensor] = []
        self.seen = seen


def unpacked(packed: nn.Module, unpack: str) -> nn.Module:
    """Wrap a packed weight as its spec asks: "load" or "call"."""
    return UnpackedOnce(packed) if unpack == "load" else packed
