"""The corpus: each network with its inputs, what its targets are, and what must come of it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from corpus_convolutions import Conv1dNet, Conv3dNet, ConvNext, Grouped, PaddingModes
from corpus_images import (
    Autoencoder,
    DenseNet,
    Detector,
    LeNet5,
    LeNet300,
    MobileNetV2,
    ResNet20,
    ResNet50,
    Siamese,
    UNet,
    Vgg16,
)
from corpus_sequences import (
    WORDS,
    Addmm,
    CellLoop,
    Exported,
    Gpt,
    GruTagger,
    LoopWithBranch,
    LstmTagger,
    Normalised,
    TextEncoder,
    TorchEncoder,
    TwoTowers,
    Vit,
)
from torch import Tensor, nn

Way = Literal["scripted", "traced", "frozen"]
Arrays = dict[str, np.ndarray]
SAMPLES = 96


@dataclass(frozen=True)
class Case:
    """A network, its data, a spec, and what the plan must say.

    Parameters
    ----------
    build : callable
        The untrained network.
    inputs : callable
        Generator and number of samples to arrays, by names that a dataset gives them.
    targets : "classes" or "numbers"
        The largest output or the output itself of the network as it was before: something that it can learn.
    class_dim : int
        Axis of the classes.
    spec : mapping
        Merged into the quick spec.
    kinds : set of str
        Kinds of layers of which at least one must be compressed.
    compressed : tuple of str
        Layers that must be compressed.
    ways : tuple of str
        How the network is made TorchScript.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[np.random.Generator, int], Arrays]
    targets: Literal["classes", "numbers"] = "classes"
    class_dim: int = 1
    spec: Mapping[str, Any] = field(default_factory=lambda: {"budget": {"max_params_fraction": 0.5}})
    kinds: frozenset[str] = frozenset()
    compressed: tuple[str, ...] = ()
    ways: tuple[Way, ...] = ("scripted", "traced")
    training: bool = False  # saved in train mode
    dtype: torch.dtype = torch.float32
    quick: tuple[Way, ...] = ()  # ways that every run of the tests takes


def numbers(*shape: int) -> Callable[[np.random.Generator, int], Arrays]:
    """Make normal inputs."""
    return lambda generator, count: {"inputs": generator.standard_normal((count, *shape)).astype(np.float32)}


def words(length: int = 10) -> Callable[[np.random.Generator, int], Arrays]:
    """Make sequences of tokens."""
    return lambda generator, count: {"inputs": generator.integers(0, WORDS, (count, length))}


def pairs(generator: np.random.Generator, count: int) -> Arrays:
    """Make pairs of pictures."""
    made = generator.standard_normal((2, count, 1, 16, 16)).astype(np.float32)
    return {"inputs.first": made[0], "inputs.second": made[1]}


def pictures_and_words(generator: np.random.Generator, count: int) -> Arrays:
    """Make a picture and a text for each sample."""
    return {
        "inputs.picture": generator.standard_normal((count, 1, 16, 16)).astype(np.float32),
        "inputs.words": generator.integers(0, WORDS, (count, 7)),
    }


def _budget(**limit: float) -> dict[str, Any]:
    return {"budget": limit}


MACS = _budget(max_macs_fraction=0.5)
PARAMS = _budget(max_params_fraction=0.5)

CASES: dict[str, Case] = {
    "lenet300": Case(LeNet300, numbers(784), kinds=frozenset({"linear"}), compressed=("fc1", "fc2")),
    "lenet5": Case(
        LeNet5,
        numbers(1, 28, 28),
        spec=MACS,
        kinds=frozenset({"linear", "conv2d"}),
        compressed=("conv2", "fc1"),
        quick=("traced",),
    ),
    "resnet20": Case(
        ResNet20, numbers(3, 16, 16), spec=MACS, kinds=frozenset({"conv2d"}), compressed=("layers.2.1.conv1",)
    ),
    "resnet50": Case(
        ResNet50, numbers(3, 32, 32), spec=MACS, kinds=frozenset({"conv2d"}), compressed=("layer4.0.conv2",)
    ),
    "vgg16": Case(Vgg16, numbers(3, 32, 32), spec=MACS, kinds=frozenset({"conv2d"})),
    "mobilenet_v2": Case(
        MobileNetV2,
        numbers(3, 16, 16),
        spec=_budget(max_params_fraction=0.6),
        kinds=frozenset({"conv2d"}),
    ),
    "densenet": Case(DenseNet, numbers(3, 16, 16), spec=_budget(max_params_fraction=0.6), kinds=frozenset({"conv2d"})),
    "unet": Case(UNet, numbers(3, 16, 16), spec=MACS, kinds=frozenset({"conv2d", "conv_transpose2d"})),
    "autoencoder": Case(
        Autoencoder,
        numbers(1, 16, 16),
        targets="numbers",
        kinds=frozenset({"conv2d", "conv_transpose2d", "linear"}),
        compressed=("decoder.0", "decoder.2"),
        quick=("scripted",),
    ),
    "siamese": Case(Siamese, pairs, spec=MACS, kinds=frozenset({"conv2d", "linear"}), compressed=("branch.3", "embed")),
    "detector": Case(Detector, numbers(3, 32, 32), targets="numbers", spec=MACS, kinds=frozenset({"conv2d"})),
    "padding_modes": Case(
        PaddingModes,
        numbers(3, 12, 12),
        spec=MACS,
        kinds=frozenset({"conv2d"}),
        compressed=("same", "valid", "reflect", "circular", "replicate"),
    ),
    "grouped": Case(
        Grouped,
        numbers(3, 12, 12),
        kinds=frozenset({"conv2d", "conv_transpose2d"}),
        compressed=("up",),
    ),
    "convnext": Case(
        ConvNext,
        numbers(3, 16, 16),
        spec=_budget(max_macs_fraction=0.4),
        kinds=frozenset({"conv2d", "linear"}),
        compressed=("depthwise.*",),
        quick=("scripted",),
    ),
    "conv1d": Case(
        Conv1dNet, numbers(2, 64), spec=MACS, kinds=frozenset({"conv1d", "conv_transpose1d"}), compressed=("body.7",)
    ),
    "conv3d": Case(Conv3dNet, numbers(1, 8, 16, 16), spec=MACS, kinds=frozenset({"conv3d"}), compressed=("conv2",)),
    "text_encoder": Case(
        TextEncoder,
        words(),
        kinds=frozenset({"linear", "embedding"}),
        compressed=("blocks.0.attention.in_proj", "embedding"),
        quick=("scripted",),
    ),
    "torch_encoder": Case(TorchEncoder, words(), spec=_budget(max_params_fraction=0.6)),
    "gpt": Case(Gpt, words(), class_dim=2, spec=_budget(max_params_fraction=0.6), kinds=frozenset({"linear"})),
    "vit": Case(Vit, numbers(3, 16, 16), kinds=frozenset({"linear"}), compressed=("blocks.0.attention.in_proj",)),
    "lstm_tagger": Case(LstmTagger, words(), class_dim=2, kinds=frozenset({"parameter"}), quick=("scripted",)),
    "gru_tagger": Case(GruTagger, words(), class_dim=2, kinds=frozenset({"parameter"})),
    "cell_loop": Case(CellLoop, numbers(6, 24), compressed=("cell.weight_hh",)),
    "loop_with_branch": Case(
        LoopWithBranch,
        numbers(20),
        spec=MACS,
        kinds=frozenset({"linear"}),
        compressed=("step", "extra"),
        ways=("scripted",),
    ),
    "addmm": Case(Addmm, numbers(40), spec=MACS, kinds=frozenset({"matmul", "linear"})),
    "two_towers": Case(TwoTowers, pictures_and_words, targets="numbers", kinds=frozenset({"linear", "embedding"})),
    "exported": Case(
        Exported,
        numbers(24),
        spec=_budget(max_params_fraction=0.7),
        kinds=frozenset({"linear"}),
        compressed=("middle",),
        ways=("scripted",),
    ),
    "normalised": Case(
        Normalised,
        words(),
        spec={
            "budget": {"max_params_fraction": 0.6},
            "layers": [
                {"match": "parameter:direction", "terms": [{"type": "low_rank", "reshape": "matrix"}]},
                {"match": "parameter:bag.weight", "terms": [{"type": "low_rank", "reshape": "matrix"}]},
                {"match": "*"},
            ],
        },
        kinds=frozenset({"parameter"}),
        compressed=("direction", "bag*"),
    ),
    "train_mode": Case(
        Vgg16, numbers(3, 32, 32), spec=MACS, kinds=frozenset({"conv2d"}), ways=("scripted",), training=True
    ),
    "frozen_lenet5": Case(
        LeNet5,
        numbers(1, 28, 28),
        spec=MACS,
        kinds=frozenset({"linear", "conv2d"}),
        ways=("frozen",),
    ),
    "frozen_resnet20": Case(ResNet20, numbers(3, 16, 16), spec=MACS, kinds=frozenset({"conv2d"}), ways=("frozen",)),
    "half_lenet300": Case(LeNet300, numbers(784), kinds=frozenset({"linear"}), dtype=torch.float16),
    "bfloat16_lenet300": Case(LeNet300, numbers(784), kinds=frozenset({"linear"}), dtype=torch.bfloat16),
    "bfloat16_conv1d": Case(
        Conv1dNet, numbers(2, 64), spec=MACS, kinds=frozenset({"conv1d"}), ways=("scripted",), dtype=torch.bfloat16
    ),
}


def make_network(case: Case, seed: int = 0) -> nn.Module:
    """Build the network with falling spectra, as a trained one has them, and settled statistics of its batch norms."""
    torch.manual_seed(seed)
    network = case.build()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and parameter.shape[0] > 1:
                u, s, v = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                falling = 0.8 ** torch.arange(len(s))
                falling *= s.norm() / falling.norm()
                parameter.copy_(((u * falling) @ v).reshape(parameter.shape))
        for part in network.modules():  # of a trained network's size, so that logits and gradients are
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.fill_(0.5)
            if isinstance(part, nn.Embedding):
                part.weight *= 0.3
    _settle(network, case)
    return network.to(case.dtype).train(case.training)


def save_network(path: Path, network: nn.Module, case: Case, way: Way) -> Path:
    """Write the network as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "traced":
            sample = tuple(
                x.to(case.dtype) if x.is_floating_point() else x for x in tensors(case, np.random.default_rng(1), 2)
            )
            made = torch.jit.trace(network, sample, strict=False, check_trace=False)
        else:
            made = torch.jit.script(network)
        if way == "frozen":
            with torch.jit.optimized_execution(True):  # without it freezing leaves calls whose methods it has removed
                made = torch.jit.freeze(made.eval())
        torch.jit.save(made, path)
    return path


def save_dataset(path: Path, network: nn.Module, case: Case, samples: int = SAMPLES) -> Path:
    """Write inputs and what the network says of them."""
    generator = np.random.default_rng(0)
    arrays = case.inputs(generator, samples)
    inputs = [torch.from_numpy(array) for array in arrays.values()]
    network.eval().float()
    with torch.no_grad():
        raw = network(*inputs)
    network.to(case.dtype).train(case.training)
    for name, output in _named(raw):
        # Less the mean output: every class has its samples, whatever the network's last bias is.
        answer = (output - output.mean(0)).argmax(case.class_dim) if case.targets == "classes" else output
        arrays[name] = answer.numpy()
    np.savez(path, **arrays)
    return path


def tensors(case: Case, generator: np.random.Generator, count: int) -> tuple[Tensor, ...]:
    """Inputs in the order of the arguments."""
    return tuple(torch.from_numpy(array) for array in case.inputs(generator, count).values())


def _named(raw: Any) -> list[tuple[str, Tensor]]:
    if isinstance(raw, dict):
        return [(f"targets.{name}", output) for name, output in raw.items()]
    if isinstance(raw, tuple):
        return [("targets", raw[0])]  # the first alone is learned
    if isinstance(raw, list):
        return [(f"targets.{place}", output) for place, output in enumerate(raw)]
    return [("targets", raw)]


def _settle(network: nn.Module, case: Case) -> None:
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the average of all batches
    with torch.no_grad():
        for seed in range(2 if norms else 0):
            network.train()(*tensors(case, np.random.default_rng(100 + seed), 64))
    for norm in norms:
        norm.momentum = 0.1
