"""Small networks of the kinds that users upload, and factor pairs that equal a layer at full rank."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.engine.network.layers import Layer
from worker.engine.network.replace import Replacement


class Halves(nn.Module):
    """A weight as the sum of two stored halves."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(weight.detach() * 0.25)
        self.right = nn.Parameter(weight.detach() * 0.75)

    def forward(self) -> Tensor:
        return self.left + self.right


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + F.relu(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class Block(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(3, 6), Block(6, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(x).mean((2, 3)))


class Looped(nn.Module):
    """One layer that one node calls several times."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        image = x.reshape(-1, 2, 3, 1).repeat(1, 1, 2, 6)
        for _ in range(times):
            x = torch.tanh(self.step(x))
            image = F.max_pool2d(self.conv(image), 2, ceil_mode=True)
        return x + image.mean()


class Branched(nn.Module):
    """A layer in each arm of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Linear(6, 4)
        self.negative = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):  # noqa: SIM108 - a branch is what is wanted
            y = self.positive(x)
        else:
            y = self.negative(x)
        return y


class Functional(nn.Module):
    """Bare parameters, module containers, and layer after layer without anything between."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 6) / 3)
        self.b = nn.Parameter(torch.randn(7))
        self.blocks = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.w, self.b)
        for block in self.blocks:
            x = block(x)
        return x


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(5, 4)
        self.right = nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.left(x), self.right(y)
        return {"sum": a + b, "product": a * b}


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = self.fc(x)
        return y, (y.softmax(1), y.argmax(1))


class SamePadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        self.valid = nn.Conv2d(4, 4, 3, padding="valid")
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.reflect(self.valid(self.same(x)))


class SeveralMethods(nn.Module):
    """Exported methods, plain attributes, a buffer that forward updates, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.extra = nn.Linear(4, 4)
        self.classes = ["cat", "dog"]
        self.scale = 2.0
        self.seen = 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean.add_(0.1)
        return self.head(self.features(x)) * self.scale

    @torch.jit.export
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x - self.mean[:, None, None]))).mean((2, 3))

    @torch.jit.export
    def embed(self, x: Tensor) -> Tensor:
        return self.extra(self.features(x))

    @torch.jit.export
    def label(self, index: int) -> str:
        return self.classes[index]


class Shared(nn.Module):
    """The same layer at two places of the code, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.free = nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.free(self.first(self.fc(x)) - self.second(self.fc(y)))


class Normed(nn.Module):
    """A weight that is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(4, 4))
        self.length = nn.Parameter(torch.ones(4, 1))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.direction * (self.length / self.direction.norm(2, 1, keepdim=True)), self.bias)


class ManyKinds(nn.Module):
    """An operator of every kind, and what stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.conv1d = nn.Conv1d(6, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 6, 2)
        self.half_step = nn.Conv2d(6, 6, (1, 2), padding="same")
        self.norm = nn.LayerNorm(6)
        self.projection = nn.Parameter(torch.randn(6, 4))
        self.normed = Normed()
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lstm(self.embedding(x))[0]
        h = self.conv1d(h.transpose(1, 2)).unsqueeze(2)
        h = self.half_step(self.up(self.grouped(h)))
        return self.normed(self.norm(h.mean((2, 3))) @ self.projection)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    traceable: bool
    replaceable: tuple[str, ...]


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _rows(*widths: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(torch.randn(batch, width) for width in widths)


def _tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (batch, 7)),)


CASES: dict[str, Case] = {
    "mlp": Case(Mlp, _rows(12), True, ("body.0", "body.2", "head")),
    "conv_net": Case(ConvNet, _images(9), True, ("conv1", "conv2", "fc")),
    "resnet": Case(
        ResNet,
        _images(16),
        True,
        tuple(f"layer1.{i}.{name}" for i in (0, 1) for name in ("conv1", "conv2", "shortcut.0")) + ("fc",),
    ),
    "looped": Case(Looped, _rows(6), False, ("step", "conv")),
    "branched": Case(Branched, lambda batch: (torch.rand(batch, 6),), False, ("positive",)),
    "functional": Case(Functional, _rows(6), True, ("w", "blocks.0", "blocks.1", "blocks.2")),
    "two_inputs": Case(TwoInputs, _rows(5, 3), True, ("left", "right")),
    "tuple_output": Case(TupleOutput, _rows(5), True, ("fc",)),
    "same_padding": Case(SamePadding, _images(9), True, ("same", "valid", "reflect")),
    "several_methods": Case(SeveralMethods, _images(7), False, ("conv", "head")),
    "shared": Case(Shared, _rows(6, 6), True, ("fc", "first", "free")),
    "many_kinds": Case(
        ManyKinds,
        _tokens,
        True,
        ("embedding", "lstm.weight_ih_l0", "lstm.weight_hh_l0")
        + ("conv1d", "grouped", "up", "half_step", "projection"),
    ),
}


def saved(module: torch.jit.ScriptModule) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def build(name: str, how: str) -> bytes:
    """Make a case's file: "scripted" in train mode or "traced" in eval mode."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.build()
    if how == "scripted":
        return saved(torch.jit.script(model))
    inputs = case.inputs(2)
    return saved(torch.jit.trace(model.eval(), inputs, strict=False))


def factor_pair(layer: Layer, state: dict[str, Tensor], rank: int | None = None) -> nn.Module | Replacement:
    """Two layers that do what one did, cut to `rank` if one is given; a composed weight where there is no operator."""
    assert layer.weight is not None
    weight = state[layer.weight].detach()
    if layer.kind == "parameter":
        return Replacement(weight=Halves(weight))
    if layer.kind in {"linear", "conv2d"} and layer.groups == 1 and layer.padding != "same":
        return _svd_pair(layer, weight, state, rank)
    pair = _identity_pair(layer, weight)
    with torch.no_grad():
        pair[0].weight.copy_(weight.t() if layer.kind == "matmul" else weight)
        if layer.bias is not None:
            pair[1].bias.copy_(state[layer.bias])
    return pair.to(weight.dtype)


def _svd_pair(layer: Layer, weight: Tensor, state: dict[str, Tensor], rank: int | None) -> nn.Sequential:
    u, s, vh = torch.linalg.svd(weight.reshape(weight.shape[0], -1).double(), full_matrices=False)
    rank = len(s) if rank is None else min(rank, len(s))
    left, right = (u[:, :rank] * s[:rank]).to(weight.dtype), vh[:rank].to(weight.dtype)
    if layer.kind == "linear":
        pair = nn.Sequential(
            nn.Linear(weight.shape[1], rank, bias=False), nn.Linear(rank, weight.shape[0], bias=layer.bias is not None)
        )
        shapes = (right, left)
    else:
        kernel = tuple(weight.shape[2:])
        pair = nn.Sequential(
            nn.Conv2d(weight.shape[1], rank, kernel, layer.stride, layer.padding, layer.dilation, bias=False),
            nn.Conv2d(rank, weight.shape[0], 1, bias=layer.bias is not None),
        )
        shapes = (right.reshape(rank, *weight.shape[1:]), left[:, :, None, None])
    with torch.no_grad():
        for part, value in zip(pair, shapes, strict=True):
            part.weight.copy_(value)
        if layer.bias is not None:
            pair[1].bias.copy_(state[layer.bias])
    return pair.to(weight.dtype)


def _identity_pair(layer: Layer, weight: Tensor) -> nn.Sequential:
    biased = layer.bias is not None
    if layer.kind in {"embedding", "matmul"}:
        rows, width = weight.shape
        first = nn.Embedding(rows, width) if layer.kind == "embedding" else nn.Linear(rows, width, bias=False)
        second: nn.Module = nn.Linear(width, width, bias=biased)
        nn.init.eye_(second.weight)
        return nn.Sequential(first, second)
    axes, transposed = int(layer.kind[-2]), layer.kind.startswith("conv_transpose")
    name = ("ConvTranspose" if transposed else "Conv") + f"{axes}d"
    channels = (weight.shape[0], weight.shape[1] * layer.groups)
    outputs, inputs = channels[::-1] if transposed else channels
    more = {"output_padding": layer.output_padding} if transposed else {}
    first = getattr(nn, name)(
        inputs,
        outputs,
        tuple(weight.shape[2:]),
        layer.stride,
        layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=False,
        **more,
    )
    second = getattr(nn, f"Conv{axes}d")(outputs, outputs, 1, bias=biased)
    nn.init.dirac_(second.weight)
    return nn.Sequential(first, second)
