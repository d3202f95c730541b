"""The networks that are trained and compressed here."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, the CIFAR form)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images)))))
        return F.relu(inner + self.shortcut(images))


class ResNet(nn.Module):
    """ResNet-(6·blocks + 2) for 32×32 images; with 3 blocks and a width of 16 it is ResNet-20."""

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                wanted = width * 2**stage
                layers.append(ResidualBlock(channels, wanted, 2 if stage > 0 and block == 0 else 1))
                channels = wanted
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.features(images).mean(dim=[2, 3]))
        return scores


class LeNet300(nn.Module):
    """The 784-300-100-10 network of the papers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.layers(images)
        return scores


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers for 8×8 scans."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * width * 16, 128), nn.ReLU(), nn.Linear(128, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.classifier(self.features(images))
        return scores


@dataclass(frozen=True)
class Workload:
    """A network, and how much random data it is trained on."""

    name: str
    network: nn.Module
    image_shape: tuple[int, int, int]
    samples: int
    batch_size: int


def workloads(*, quick: bool) -> list[Workload]:
    """A mid-sized convolutional network, and a small one of linear layers."""
    torch.manual_seed(0)
    if quick:
        return [
            Workload("resnet", ResNet(blocks=1, width=4), (3, 32, 32), 48, 16),
            Workload("lenet300", LeNet300(), (1, 28, 28), 256, 64),
        ]
    return [
        Workload("resnet20", ResNet(), (3, 32, 32), 512, 128),
        Workload("lenet300", LeNet300(), (1, 28, 28), 8192, 256),
    ]
