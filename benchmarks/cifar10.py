"""ResNets on CIFAR-10 at the sizes of the published runs; needs a GPU.

The images are JPEG copies, on which the given references lose about ten points: a reference is first fine-tuned on
them, and its own error is stated. What is held against the published figures is the increase over it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.given_networks import cifar, given_resnet, script
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.trials import Bench, Kept, Subject, Trial, median_of
from worker.engine.device import prepare_process

VERSION = "1"
REFERENCE_EPOCHS, REFERENCE_RATE, BATCH = 40, 0.02, 128
STEPS, EPOCHS_PER_STEP, TUNING = 25, 4, 200  # 300 epochs: 1.5 times the 200 of the reference's own training
MARGIN_PIXELS = 4


@dataclass(frozen=True)
class Point:
    """A published size (multiply-adds in millions) and its error beside the reference's, in percent."""

    depth: int
    macs_millions: float
    error: float
    reference_error: float


POINTS = (Point(20, 17.4, 9.49, 8.35), Point(20, 10.6, 10.97, 8.35), Point(56, 43.3, 7.52, 6.58))
FORMS = {"additive": ["channel", "spatial"], "channel": ["channel"], "spatial": ["spatial"], "best": ["best"]}


def main(arguments: list[str] | None = None) -> int:
    """Run what is not kept yet; `--quick` runs a slice on whatever device there is."""
    options = parser("cifar10", __doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with the given networks and the images")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--work", type=Path, default=Path(".benchmark-files"), help="where the job's files are made")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=["additive", "best"])
    given = options.parse_args(arguments)
    if not given.quick and not torch.cuda.is_available():
        say("benchmarks.cifar10 needs a GPU, and there is none; --quick shows on the CPU that it runs")
        return 0
    prepare_process(torch.get_num_threads())
    kept = Kept(given.results, "cifar10", quick=given.quick)
    samples: list[Sample] = []
    limits: list[Limit] = []
    for point in POINTS[:1] if given.quick else POINTS:
        subject = reference(given.data, given.work, point.depth, quick=given.quick)
        bench = Bench(subject, kept, VERSION)
        own = 100 * float(subject.wrong.mean())
        say(f"ResNet-{point.depth}: the fine-tuned reference's error on the JPEG test images is {own:.2f} %")
        for form in given.forms[:1] if given.quick else given.forms:
            spec = trial_spec(form, point, quick=given.quick)
            name = f"{form} at {point.macs_millions} M"
            made = bench.outcomes(Trial(name, spec), range(1 if given.quick else given.seeds))
            plain = bench.outcomes(Trial(f"plain SVD, {name}", spec, ""), range(1))
            label = f"ResNet-{point.depth}, {name}"
            samples.append(Sample(label, tuple(each["test_error_percent"] for each in made), "%"))
            samples.append(Sample(f"{label}: plain SVD", tuple(each["test_error_percent"] for each in plain), "%"))
            allowed = round(point.error - point.reference_error, 2)
            limits.append(Limit(f"{label}: increase", median_of(made) - own, allowed, "%"))
    facts = {"reference_epochs": REFERENCE_EPOCHS, "cuda": torch.cuda.is_available()}
    return conclude("cifar10", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def trial_spec(form: str, point: Point, *, quick: bool) -> dict[str, Any]:
    """What a job is asked for."""
    steps, epochs, tuning = (2, 1, 1) if quick else (STEPS, EPOCHS_PER_STEP, TUNING)
    return {
        "budget": {"max_macs": int(point.macs_millions * 1e6)},
        "device": "auto",
        "layers": [
            {"kind": "conv2d", "terms": [{"type": "low_rank", "reshape": reshape} for reshape in FORMS[form]]},
            {"match": "*", "keep": "dense"},
        ],
        "method": {"type": "learning_compression", "mu": {"steps": steps}},
        "training": {
            "epochs_per_step": epochs,
            "batch_size": BATCH,
            "early_stop": None,
            "optimizer": {"lr": REFERENCE_RATE, "weight_decay": 1e-4},
            "augmentation": {"crop_pixels": MARGIN_PIXELS, "flip": True},
        },
        "fine_tune": {"epochs": tuning},
    }


def reference(data: Path, work: Path, depth: int, *, quick: bool) -> Subject:
    """Fine-tune the given reference on the JPEG images, once."""
    tag = "-quick" if quick else ""
    images = cifar(
        data, work / f"cifar10{tag}.npz", train_most=400 if quick else 50_000, test_most=200 if quick else 10_000
    )
    path = work / f"resnet{depth}-jpeg{tag}.pt"
    if not path.exists():
        network = given_resnet(data, depth)
        fine_tune(network, images, epochs=1 if quick else REFERENCE_EPOCHS)
        script(network.cpu(), path)
    return Subject(f"ResNet-{depth}", path, images)


def fine_tune(network: nn.Module, images: Path, *, epochs: int) -> None:
    """Train a network on the training images, with crops and flips and a cosine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    with np.load(images) as file:
        inputs, targets = torch.from_numpy(file["inputs"]).to(device), torch.from_numpy(file["targets"]).to(device)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=REFERENCE_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(inputs) // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), device=device).split(BATCH):
            optimizer.zero_grad()
            torch.autograd.backward([F.cross_entropy(network(_moved(inputs[rows])), targets[rows])])
            optimizer.step()
            schedule.step()
    network.eval()


def _moved(images: Tensor) -> Tensor:
    """Crop each batch at a random place out of a black margin, and flip every other image."""
    size = images.shape[-1]
    padded = F.pad(images, [MARGIN_PIXELS] * 4)
    top, left = torch.randint(0, 2 * MARGIN_PIXELS + 1, (2,)).tolist()
    cropped = padded[:, :, top : top + size, left : left + size]
    flips = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(flips[:, None, None, None], cropped.flip(3), cropped)


if __name__ == "__main__":
    sys.exit(main())
