"""Batch-norm statistics made afresh for weights that have changed (Wu and Johnson 2021, "precise" batch norm)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker.engine.data import Dataset, epoch_order
from worker.engine.device import random_states, restore_random_states
from worker.engine.forward import call, out_of_memory

SAMPLES_MAX = 8192  # of the train part; the means of some thousand samples are as good as those of all
_STREAM = 0xB9
_MEAN, _VARIANCE, _COUNT = "running_mean", "running_var", "num_batches_tracked"
_NAMES = {_MEAN, _VARIANCE, _COUNT}


@dataclass
class _Layer:
    """Buffers of one normalisation layer, and what its batches had.

    A layer sets ``running ← (1 − m)·running + m·statistic`` in training mode, with a momentum m that a compiled network
    does not tell. From buffers at 0 that is m·statistic; from buffers at 1 on the same batch it is 1 − m more.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor | None
    kept: tuple[Tensor, ...]
    momentum: Tensor | float = 0.0
    sum_mean: Tensor | float = 0.0
    sum_square: Tensor | float = 0.0
    sum_variance: Tensor | float = 0.0
    batches: int = 0

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (self.mean, self.variance) if self.count is None else (self.mean, self.variance, self.count)

    def reset(self, value: float) -> None:
        self.mean.fill_(value)
        self.variance.fill_(value)
        if self.count is not None:
            self.count.zero_()

    def add(self) -> None:
        """Count the batch that has just passed, from buffers at 0."""
        mean, variance = self.mean.double() / self.momentum, self.variance.double() / self.momentum
        self.sum_mean = self.sum_mean + mean
        self.sum_square = self.sum_square + mean.square()
        self.sum_variance = self.sum_variance + variance
        self.batches += 1

    def write(self) -> None:
        """Set the buffers to mean and variance over all batches; the variance has that of the batches' means in it."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        if self.batches == 0:
            return
        mean = self.sum_mean / self.batches
        self.mean.copy_(torch.as_tensor(mean))
        variance = self.sum_variance / self.batches + (self.sum_square / self.batches - mean * mean)
        self.variance.copy_(torch.as_tensor(variance))


def statistics_of(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """Copy of the running statistics of a network's normalisation layers, by the names of their buffers."""
    return {name: each.clone() for name, each in module.named_buffers() if name.rpartition(".")[2] in _NAMES}


def reestimate(
    module: torch.jit.ScriptModule, dataset: Dataset, batch_size: int, device: torch.device, seed: int
) -> bool:
    """Set running means and variances to averages over training samples, with the weights as they are.

    Layers that do not follow their inputs in training mode, such as those of a network traced in evaluation mode, keep
    theirs. The network's own mode and the random states are given back.

    Parameters
    ----------
    module : ScriptModule
        The network, in whose buffers the statistics are written.
    dataset : Dataset
        Its train part is read, unaugmented: `SAMPLES_MAX` samples at most, by the seed.
    batch_size : int
        Samples of a batch; one that does not fit in memory is halved.
    device : torch.device
        Where the network stands.
    seed : int
        Chooses samples and dropout.

    Returns
    -------
    bool
        Whether any statistics were made.
    """
    layers = list(_layers(module))
    if not layers:
        return False
    was_training, random = module.training, random_states(device)
    chosen = epoch_order(dataset.size("train"), seed, _STREAM)[:SAMPLES_MAX]
    module.train()
    try:
        with torch.no_grad():
            size = _measure_momenta(module, layers, dataset, chosen, batch_size, device, seed)
            moving = [layer for layer in layers if bool((torch.as_tensor(layer.momentum) > 0).all())]
            for start in range(0, len(chosen) if moving else 0, size):
                rows = chosen[start : start + size]
                if start > 0 and len(rows) < size:
                    break  # every batch has the same weight
                for layer in layers:
                    layer.reset(0.0)
                call(module, dataset.rows("train", rows, device).inputs)
                for layer in moving:
                    layer.add()
    finally:
        with torch.no_grad():
            for layer in layers:
                layer.write()
        module.train(was_training)
        restore_random_states(random, device)
    return bool(moving)


def _measure_momenta(
    module: torch.jit.ScriptModule,
    layers: list[_Layer],
    dataset: Dataset,
    chosen: np.ndarray,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> int:
    """Pass one batch twice to find each layer's momentum; returns the batch size that fits in memory."""
    size = max(batch_size, 2)  # a single sample has no variance
    while True:
        try:
            batch = dataset.rows("train", chosen[:size], device)
            found = []
            for value in (0.0, 1.0):
                for layer in layers:
                    layer.reset(value)
                torch.manual_seed(seed & 0xFFFFFFFF)  # the same dropout, so that the statistics are the same
                call(module, batch.inputs)
                found.append([layer.mean.double().clone() for layer in layers])
            break
        except (RuntimeError, MemoryError) as error:
            if size <= 2 or not out_of_memory(error):
                raise
            size = max(size // 2, 2)
    for layer, low, high in zip(layers, *found, strict=True):
        momentum = 1.0 - (high - low).median()
        layer.momentum = momentum if bool(torch.isfinite(momentum)) and float(momentum) > 1e-6 else 0.0
    return size


def _layers(module: torch.jit.ScriptModule) -> Iterator[_Layer]:
    buffers: dict[str, Tensor] = dict(module.named_buffers())
    for name, mean in buffers.items():
        prefix, _, last = name.rpartition(".")
        at = f"{prefix}." if prefix else ""
        variance: Any = buffers.get(at + _VARIANCE)
        if last != _MEAN or variance is None or mean.numel() == 0:
            continue
        count = buffers.get(at + _COUNT)
        kept = tuple(each.clone() for each in (mean, variance, count) if each is not None)
        yield _Layer(mean, variance, count, kept)
