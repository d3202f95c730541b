"""Random crops, flips and shifts of image batches; which one a sample gets follows from its place in the run alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.errors import ErrorCode, ProblemError
from service.contract.training_spec import Augmentation
from worker.engine.data import Batch, Dataset

AUGMENTATION_STREAM = 0xA6  # apart from the order of samples, which follows from the same path


@dataclass(frozen=True)
class Moves:
    """What happens to each sample of the train part in one epoch; int16 each, by its position in the part.

    Parameters
    ----------
    crop, shift : ndarray
        ``(n, 2)``: pixels downwards and to the right.
    flip : ndarray
        ``(n,)``: 1 where left and right change places.
    """

    crop: np.ndarray
    shift: np.ndarray
    flip: np.ndarray

    @classmethod
    def draw(cls, spec: Augmentation, count: int, path: Sequence[int]) -> Self:
        """Draw an epoch's moves from the seed and the place in the run (stage, step, epoch)."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*path, AUGMENTATION_STREAM])))

        def pixels(most: int) -> np.ndarray:
            return random.integers(-most, most, (count, 2), dtype=np.int16, endpoint=True)

        return cls(
            pixels(spec.crop_pixels),
            pixels(spec.shift_pixels),
            random.integers(0, 2, count, dtype=np.int16) * spec.flip,
        )


class Augmenter:
    """Moves the images of prepared batches, on the device where they lie.

    Parameters
    ----------
    spec : Augmentation
        How far.
    dataset : Dataset
        Whose batches come; black is what its preparation makes of zeros.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` when an input is no image batch, or targets are laid out as images, which would have to
        move with them.
    """

    def __init__(self, spec: Augmentation, dataset: Dataset) -> None:
        self.spec = spec
        self._count = dataset.size("train")
        arrays = zip(dataset.input_names, dataset.part("train").inputs, strict=True)
        self._black = [_black(name, array, dataset, spec) for name, array in arrays]
        for name, array in zip(dataset.target_names, dataset.part("train").targets, strict=True):
            if array.ndim > 2:
                raise ProblemError(
                    ErrorCode.DATASET_INVALID,
                    f"training.augmentation moves images, but not the targets '{name}' of shape {array.shape[1:]}, "
                    "which would no longer fit; remove training.augmentation",
                )

    def moves(self, path: Sequence[int]) -> Moves:
        """Draw the moves of one epoch."""
        return Moves.draw(self.spec, self._count, path)

    def apply(self, batch: Batch, positions: np.ndarray, moves: Moves) -> Batch:
        """Move the images of a batch that stands at `positions` of the train part; several inputs move alike."""
        made = [
            self._moved(images, black.to(images.device), positions, moves)
            for images, black in zip(batch.inputs, self._black, strict=True)
        ]
        return Batch(tuple(made), batch.targets)

    def _moved(self, images: Tensor, black: Tensor, positions: np.ndarray, moves: Moves) -> Tensor:
        device, spec = images.device, self.spec
        if spec.crop_pixels:
            images = _crop(images, _taken(moves.crop, positions, device), spec.crop_pixels, black)
        if spec.shift_pixels:
            images = _shift(images, _taken(moves.shift, positions, device), spec.shift_pixels)
        if spec.flip:
            flipped = _taken(moves.flip, positions, device).bool()
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return images


def _black(name: str, array: np.ndarray, dataset: Dataset, spec: Augmentation) -> Tensor:
    """What a black pixel is once prepared, ``(1, C, 1, 1)``."""
    if array.ndim != 4 or not (array.dtype.kind == "f" or array.dtype == np.uint8):
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"training.augmentation needs images, N×C×H×W in uint8 or floating point; '{name}' has shape {array.shape} "
            f"and dtype {array.dtype}. Remove training.augmentation",
        )
    prepared = dataset.prepare(np.zeros((1, *array.shape[1:]), array.dtype))
    height, width = prepared.shape[2:]
    if max(spec.crop_pixels, spec.shift_pixels) >= min(height, width):
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"training.augmentation moves images by up to {max(spec.crop_pixels, spec.shift_pixels)} pixels, but those "
            f"of '{name}' are {height}×{width}; expected less than a side (with data.layout, the axes after channels)",
        )
    return prepared[:, :, :1, :1]


def _taken(numbers: np.ndarray, positions: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers[positions].astype(np.int64)).to(device)


def _crop(images: Tensor, offsets: Tensor, most: int, black: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    padded = black.expand(count, channels, height + 2 * most, width + 2 * most).clone()
    padded[:, :, most:-most, most:-most] = images
    return _window(padded, offsets + most, height, width)


def _shift(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    return _window(functional.pad(images, [most] * 4, mode="replicate"), offsets + most, *images.shape[2:])


def _window(padded: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Windows of ``(B, C, H', W')`` with their corners at ``(B, 2)``; gives ``(B, C, height, width)``."""
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(len(padded), device=padded.device)
    return windows[rows, :, corners[:, 0], corners[:, 1]]
