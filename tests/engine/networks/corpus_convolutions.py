"""Networks of rarer convolutions: padded otherwise, grouped, of one and of three dimensions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PaddingModes(nn.Module):
    """Every way to pad: zeros, "same" with an even kernel, "valid", reflected, circular, replicated."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.uneven = nn.Conv2d(3, width, 3, padding=(2, 0), stride=(1, 2))
        self.same = nn.Conv2d(width, width, 4, padding="same", dilation=2)
        self.valid = nn.Conv2d(width, width, 3, padding="valid")
        self.reflect = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.replicate = nn.Conv2d(width, width, 3, padding=1, stride=2, padding_mode="replicate")
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.same(F.relu(self.uneven(x))))
        x = F.relu(self.reflect(F.relu(self.valid(x))))
        x = F.relu(self.replicate(F.relu(self.circular(x))))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt-like: convolutions in groups, one of them transposed, and one that is depthwise with a multiplier."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.groups4 = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.groups2 = nn.Conv2d(width, 2 * width, 3, 2, 1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(2 * width, 4 * width, 3, padding=1, groups=2 * width)
        self.up = nn.ConvTranspose2d(4 * width, width, 4, 2, 1, groups=4)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.groups4(F.relu(self.stem(x))))
        x = F.relu(self.depthwise(F.relu(self.groups2(x))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


class ConvNext(nn.Module):
    """7×7 depthwise convolutions, normalised and mixed over the channels as linear layers do (Liu et al. 2022)."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.depthwise = nn.ModuleList([nn.Conv2d(width, width, 7, padding=3, groups=width) for _ in range(depth)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.widen = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(depth)])
        self.narrow = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(depth)])
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mix, norm, widen, narrow in zip(self.depthwise, self.norms, self.widen, self.narrow, strict=True):
            y = norm(mix(x).permute(0, 2, 3, 1))
            x = x + (self.scale * narrow(F.gelu(widen(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Conv1dNet(nn.Module):
    """Waveforms: strided and dilated 1-D convolutions with batch norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, width, 9, 2, 4, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, 2 * width, 5, 1, 4, dilation=2, bias=False),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(2 * width, 2 * width, 3, padding="same"),
            nn.ReLU(),
            nn.Conv1d(2 * width, 2 * width, 1),
        )
        self.up = nn.ConvTranspose1d(2 * width, width, 4, 2, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.body(x)))).mean(2))


class Conv3dNet(nn.Module):
    """Short clips: 3-D convolutions, one factored in time and space, and a transposed one."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, 3, (1, 2, 2), 1)
        self.space = nn.Conv3d(width, 2 * width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(2 * width, 2 * width, (3, 1, 1), padding=(1, 0, 0))
        self.conv2 = nn.Conv3d(2 * width, 4 * width, 3, 2, 1)
        self.up = nn.ConvTranspose3d(4 * width, width, 2, 2)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.time(F.relu(self.space(F.relu(self.conv1(x)))))
        x = F.relu(self.up(F.relu(self.conv2(F.relu(x)))))
        return self.head(x.mean((2, 3, 4)))
