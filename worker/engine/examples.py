"""Example inputs: a few samples of the data, or random ones as the spec describes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.contract.spec import ExampleInput, JobSpec
from worker.engine.data import Dataset
from worker.engine.network.layers import Layer

EXAMPLE_SAMPLES = 8  # random samples on which the network is compared without data
INTEGER_HIGH = 2  # exclusive bound of random integers where the spec says none


def example_inputs(spec: JobSpec, dataset: Dataset | None, device: torch.device) -> tuple[Tensor, ...]:
    """Inputs of a few samples on the device: of the train part, or random by the spec's seed."""
    if dataset is not None:
        count = min(EXAMPLE_SAMPLES, dataset.size("train"))
        return dataset.rows("train", np.arange(count), device).inputs
    generator = torch.Generator().manual_seed(spec.seed)
    return tuple(_random(example, generator).to(device) for example in spec.example_inputs or [])


def suggestion(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Guess `example_inputs` from the first layer's weight; sides of images are not written in weights."""
    for layer in layers:
        shape = list(layer.weight_shape)
        if layer.kind in {"linear", "matmul"} and len(shape) == 2:
            return [{"shape": [1, shape[1] if layer.kind == "linear" else shape[0]], "dtype": "float32"}]
        if layer.kind.startswith("conv") and len(shape) >= 3:
            channels = shape[0] if layer.kind.startswith("conv_transpose") else shape[1] * layer.groups
            return [{"shape": [1, channels, *[32] * (len(shape) - 2)], "dtype": "float32"}]
        if layer.kind == "embedding" and len(shape) == 2:
            return [{"shape": [1, 16], "dtype": "int64", "high": shape[0]}]
    return [{"shape": [1, 3, 32, 32], "dtype": "float32"}]


def _random(example: ExampleInput, generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, example.dtype)
    shape = [EXAMPLE_SAMPLES if example.shape[0] == 1 else example.shape[0], *example.shape[1:]]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    high = example.high if example.high is not None else INTEGER_HIGH
    return torch.randint(0, 2 if dtype == torch.bool else high, shape, generator=generator).to(dtype)
