"""Where does an additive combination pay? Channel and spatial low rank added, beside each alone and the better one.

One-shot: in each k×k layer of the given ResNets, the relative error of the weight at equal multiply-adds. The sum is
the best of eleven splits of the budget, so that no choice of ranks can be blamed. Trained: networks compressed at three
budgets with the same training, by the error on test images.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.given_networks import given_resnet, lenet5, mnist, script, small_resnet, trained_on
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.splits import best_of, splits_of
from benchmarks.trials import Bench, Kept, Subject, Trial
from service.contract.spec import parse_spec
from worker.engine.device import prepare_process
from worker.engine.evaluation import paired_difference
from worker.engine.layer_rules import apply_rules
from worker.engine.network.costs import take_census
from worker.engine.network.load import load_model

VERSION = "3"
DEPTHS = (20, 32, 56)
SHARES = (0.5, 0.35, 0.2)  # of a layer's dense multiply-adds
LOWER = 0.999  # times the better single term's error counts as lower
BUDGETS = (0.5, 0.3, 0.15)  # of the network's multiply-adds
STRONGEST = BUDGETS[-1]
TRAIN_IMAGES, TEST_IMAGES = 5000, 10_000  # of MNIST; the references are trained on the same
REFERENCE_EPOCHS, STEPS, TUNING = 10, 10, 10
FORMS: dict[str, list[str]] = {
    "additive": ["channel", "spatial"],
    "channel": ["channel"],
    "spatial": ["spatial"],
    "best": ["best"],
}


def main(arguments: list[str] | None = None) -> int:
    """Measure both parts."""
    options = parser("additive", __doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with the given networks and mnist.npz")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--part", choices=("one-shot", "trained", "all"), default="all")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the trained part")
    options.add_argument("--work", type=Path, default=Path(".benchmark-files"), help="where the job's files are made")
    given = options.parse_args(arguments)
    prepare_process(given.threads)
    samples: list[Sample] = []
    limits: list[Limit] = []
    if given.part != "trained":
        for depth in DEPTHS[:1] if given.quick else DEPTHS:
            found = one_shot(script(given_resnet(given.data, depth), given.work / f"resnet{depth}.pt"), depth)
            samples += found
            lower = sum(value < LOWER for sample in found for value in sample.values)
            total = sum(len(sample.values) for sample in found)
            limits.append(Limit(f"ResNet-{depth}: layers with a lower error", lower / total, 0.6, at_least=True))
    if given.part != "one-shot":
        made = trained(given, quick=given.quick)
        samples += made[0]
        limits += made[1]
    facts = {"train_images": TRAIN_IMAGES, "budgets": BUDGETS, "cifar": cifar_reason()}
    return conclude("additive", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def one_shot(model: Path, depth: int) -> list[Sample]:
    """Error of the best sum over that of the better single term, for each k×k layer at each share."""
    module = load_model(model)
    spec = parse_spec({"budget": {"max_macs_fraction": 0.5}, "layers": [{"terms": low_rank(FORMS["additive"])}]})
    decisions = apply_rules(take_census(module, (torch.zeros(1, 3, 32, 32),)).layers, spec)
    weights = dict(module.named_parameters())
    ratios: dict[float, list[float]] = {share: [] for share in SHARES}
    for problem in decisions.problems:
        if len(problem.choices) < 2:
            continue
        weight = weights[str(problem.layer.weight)].detach()
        for share in SHARES:
            splits = splits_of(problem, weight, int(share * problem.geometry.dense_macs))
            ratios[share].append(best_of(splits).error / min(splits[0].error, splits[-1].error))
    for share, found in ratios.items():
        say(f"ResNet-{depth} at {share}: lower in {sum(r < LOWER for r in found)} of {len(found)} layers")
    return [Sample(f"ResNet-{depth} at {share}: sum / better single", tuple(ratios[share]), "") for share in SHARES]


def low_rank(reshapes: list[str]) -> list[dict[str, Any]]:
    """Terms of a rule."""
    return [{"type": "low_rank", "reshape": reshape} for reshape in reshapes]


def trial_spec(form: str, budget: float, *, quick: bool, images: str = "mnist") -> dict[str, Any]:
    """What a job is asked for: k×k convolutions in one form, everything else by default."""
    epochs = (2, 1) if quick else (STEPS, TUNING) if images == "mnist" else (25, 50)
    return {
        "budget": {"max_macs_fraction": budget},
        "layers": [{"kind": "conv2d", "terms": low_rank(FORMS[form])}, {}],
        "method": {"type": "learning_compression", "mu": {"steps": epochs[0]}},
        "training": {"epochs_per_step": 1, "batch_size": 128, "optimizer": {"lr": 0.02}, "early_stop": None},
        "fine_tune": {"epochs": epochs[1]},
    }


@dataclass(frozen=True)
class Reference:
    """A small network that is trained here, once."""

    name: str
    network: nn.Module


def trained(given: Any, *, quick: bool) -> tuple[list[Sample], list[Limit]]:
    """Compress the trained references in each form at each budget."""
    name = "mnist-500.npz" if quick else f"mnist-{TRAIN_IMAGES}.npz"
    most = 500 if quick else TRAIN_IMAGES
    data = mnist(given.data, given.work / name, held_out=500, flat=False, train_most=most, test_most=TEST_IMAGES)
    samples: list[Sample] = []
    limits: list[Limit] = []
    for reference in (Reference("LeNet5", lenet5()), Reference("small ResNet", small_resnet())):
        path = given.work / f"{reference.name.replace(' ', '-')}{'-quick' if quick else ''}.pt"
        model = trained_on(reference.network, data, path, epochs=1 if quick else REFERENCE_EPOCHS)
        subject = Subject(reference.name, model, data)
        bench = Bench(subject, Kept(given.results, "additive", quick=quick), VERSION)
        for budget in BUDGETS:
            rows = {form: Trial(f"{form} at {budget}", trial_spec(form, budget, quick=quick)) for form in given.forms}
            rows["plain SVD"] = Trial(f"plain SVD at {budget}", trial_spec("best", budget, quick=quick), "")
            made = {row: bench.outcomes(trial, range(1 if quick else given.seeds)) for row, trial in rows.items()}
            for row, outcomes in made.items():
                errors = tuple(each["test_error_percent"] for each in outcomes)
                samples.append(Sample(f"{reference.name}, {row} at {budget} of the multiply-adds", errors, "%"))
            if {"additive", "channel", "spatial"} <= made.keys():
                limits += judged(reference.name, budget, made, len(subject.wrong))
    return samples, limits


def judged(name: str, budget: float, made: dict[str, list[dict[str, Any]]], images: int) -> list[Limit]:
    """Hold the sum against the better single scheme: nowhere above it by more than the paired interval."""
    better = min(("channel", "spatial"), key=lambda form: np.mean([each["test_error_percent"] for each in made[form]]))
    pairs = zip(made["additive"], made[better], strict=True)
    differences = np.stack([_wrong(one, images) - _wrong(other, images) for one, other in pairs]).mean(axis=0)
    found = paired_difference("error", differences, np.zeros(images))
    gap = 100 * found.difference
    limits = [Limit(f"{name} at {budget}: lower end of additive less {better}", 100 * found.low, 0.0, "%")]
    if budget == STRONGEST:
        limits.append(Limit(f"{name} at {budget}: additive less {better}", gap, 0.0, "%"))
    return limits


def _wrong(outcome: dict[str, Any], images: int) -> np.ndarray:
    made = np.zeros(images)
    made[outcome["wrong"]] = 1.0
    return made


def cifar_reason() -> str:
    """Why ResNet-20 on CIFAR-10 is not among the trained networks here."""
    if torch.cuda.is_available():
        return "ResNet-20 on CIFAR-10 in these forms is run by benchmarks.cifar10"
    return "ResNet-20 on CIFAR-10 was skipped: it needs a GPU, and there is none"


if __name__ == "__main__":
    sys.exit(main())
