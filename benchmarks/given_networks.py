"""The reference networks and datasets that a benchmark is given in a folder, as the files that a job takes."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MNIST_CLASSES = 10
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MEAN, CIFAR_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
TRAINED_BATCH = 128
_SHUFFLE_SEED = 0x5EED  # the given files are in the order of their classes


def lenet300() -> nn.Sequential:
    """784-300-100-10 with tanh."""
    return nn.Sequential(nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 100), nn.Tanh(), nn.Linear(100, MNIST_CLASSES))


def lenet5() -> nn.Sequential:
    """LeNet5: two convolutions of 5×5 and two linear layers (20-50-500-10)."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, MNIST_CLASSES),
    )


class SmallResNet(nn.Module):
    """A residual network of three stages for 28×28 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = CifarBlock(width, width, 1)
        self.layer2 = CifarBlock(width, 2 * width, 2)
        self.layer3 = CifarBlock(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, MNIST_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        maps = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        scores: Tensor = self.linear(maps.mean(dim=[2, 3]))
        return scores


def small_resnet() -> nn.Module:
    """Seven convolutions, 16 to 64 channels."""
    return SmallResNet(16)


class CifarBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.added = (channels_out - channels_in) // 2

    def forward(self, images: Tensor) -> Tensor:
        """Feature maps."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        if self.added > 0:
            shortcut = F.pad(shortcut, [0, 0, 0, 0, self.added, self.added])
        return F.relu(inner + shortcut)


class CifarResNet(nn.Module):
    """ResNet-(6·blocks + 2) for 32×32 images, with parameters named as in the given files."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        maps = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        scores: Tensor = self.linear(maps.mean(dim=[2, 3]))
        return scores


def _stage(channels_in: int, channels_out: int, blocks: int) -> nn.Sequential:
    first = CifarBlock(channels_in, channels_out, 1 if channels_in == channels_out else 2)
    return nn.Sequential(first, *(CifarBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def given_lenet300(data: Path) -> nn.Module:
    """LeNet300 with the given weights."""
    return _loaded(lenet300(), data / "lenet300-mnist-tanh.safetensors")


def given_resnet(data: Path, depth: int) -> nn.Module:
    """ResNet-20, -32 or -56 with the given weights."""
    return _loaded(CifarResNet((depth - 2) // 6), data / f"resnet{depth}-cifar10.safetensors")


def _loaded(network: nn.Module, path: Path) -> nn.Module:
    if not path.exists():
        raise SystemExit(f"there is no {path.name} in {path.parent}; give the folder that holds it with --data")
    network.load_state_dict(load_file(path))
    return network.eval()


def script(network: nn.Module, path: Path) -> Path:
    """Save a network as the TorchScript file that a job takes; a file that is there is kept."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.jit.save(torch.jit.script(network.eval()), str(partial))
        partial.replace(path)
    return path


def mnist(
    data: Path, path: Path, *, held_out: int, flat: bool, train_most: int | None = None, test_most: int | None = None
) -> Path:
    """Write MNIST as a job's dataset: pixels/255 less their mean over the training images, in another order.

    Parameters
    ----------
    data : Path
        Folder with ``mnist.npz``.
    path : Path
        The file to write; one that is there is kept.
    held_out : int
        Training images that choose between iterates (``val_``) and are not trained on.
    flat : bool
        Rows of 784 pixels, else 1×28×28 images.
    train_most, test_most : int, optional
        So many training and test images alone.
    """
    if path.exists():
        return path
    with np.load(data / "mnist.npz") as file:
        arrays = {name: file[name] for name in file.files}
    mean = arrays["x_train"].astype(np.float32).mean(axis=0) / 255
    shape = (784,) if flat else (1, 28, 28)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(arrays["x_train"]))
    held, trained = order[:held_out], order[held_out:][:train_most]
    test = np.random.default_rng(_SHUFFLE_SEED).permutation(len(arrays["x_test"]))[:test_most]
    test = np.sort(test)

    def inputs(raw: np.ndarray) -> np.ndarray:
        made: np.ndarray = (raw.astype(np.float32) / 255 - mean).reshape(len(raw), *shape)
        return made

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        inputs=inputs(arrays["x_train"][trained]),
        targets=arrays["y_train"][trained].astype(np.int64),
        val_inputs=inputs(arrays["x_train"][held]),
        val_targets=arrays["y_train"][held].astype(np.int64),
        test_inputs=inputs(arrays["x_test"][test]),
        test_targets=arrays["y_test"][test].astype(np.int64),
    )
    return path


def cifar_test(data: Path, path: Path, *, most: int) -> Path:
    """Write CIFAR-10's test images as a job's dataset, as many of each class: normalised as the networks take them."""
    if path.exists():
        return path
    inputs, targets = _cifar_images(data / "cifar10-jpeg.tar.xz", "test", most // 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, test_inputs=inputs, test_targets=targets)
    return path


def cifar(data: Path, path: Path, *, train_most: int, test_most: int, held_out: float = 0.04) -> Path:
    """Write CIFAR-10 as a job's dataset: as many of each class, normalised, a part of the training images held out."""
    if path.exists():
        return path
    inputs, targets = _cifar_images(data / "cifar10-jpeg.tar.xz", "train", train_most // 10)
    test_inputs, test_targets = _cifar_images(data / "cifar10-jpeg.tar.xz", "test", test_most // 10)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(len(inputs))
    held, trained = np.split(order, [round(held_out * len(order))])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        inputs=inputs[trained],
        targets=targets[trained],
        val_inputs=inputs[held],
        val_targets=targets[held],
        test_inputs=test_inputs,
        test_targets=test_targets,
    )
    return path


def _cifar_images(archive: Path, part: str, each_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(n, 3, 32, 32)`` float32, normalised, and their classes, in the order of the classes."""
    inputs, targets, found = [], [], [0] * len(CIFAR_CLASSES)
    with tarfile.open(archive) as files:
        for member in files:
            parts = member.name.split("/")
            if not member.isfile() or parts[0] != part:
                continue
            label = CIFAR_CLASSES.index(parts[1])
            if found[label] == each_class:
                continue
            found[label] += 1
            with Image.open(io.BytesIO(files.extractfile(member).read())) as image:  # type: ignore[union-attr]
                pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
            inputs.append(((pixels - CIFAR_MEAN) / CIFAR_STD).transpose(2, 0, 1))
            targets.append(label)
    order = np.argsort(targets, kind="stable")
    return np.stack(inputs).astype(np.float32)[order], np.array(targets, dtype=np.int64)[order]


def trained_on(network: nn.Module, data: Path, path: Path, *, epochs: int, rate: float = 0.05) -> Path:
    """Train a small reference on a job's dataset, once, and save it as the TorchScript file that a job takes."""
    if path.exists():
        return path
    torch.manual_seed(0)
    with np.load(data) as file:
        inputs, targets = torch.from_numpy(file["inputs"]), torch.from_numpy(file["targets"])
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    updates = epochs * -(-len(inputs) // TRAINED_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(TRAINED_BATCH):
            optimizer.zero_grad()
            torch.autograd.backward([F.cross_entropy(network(inputs[rows]), targets[rows])])
            optimizer.step()
            schedule.step()
    return script(network, path)
