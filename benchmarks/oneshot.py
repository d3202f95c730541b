"""Before any training, at equal parameters: direct compression (a job without data) beside uniform SVD.

Uniform SVD gives every layer the same part of its break-even rank. Held against it are the error of the weights,
Σ ‖W − Θ‖² / ‖W‖² over the layers, and the accuracy on test images; no image is used to compress.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.given_networks import cifar_test, given_lenet300, given_resnet, lenet5, mnist, script, trained_on
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.trials import Subject, wrong_on_test
from service.contract.plan import RankRow
from service.contract.spec import parse_spec
from worker.engine.device import prepare_process
from worker.engine.emission import emit
from worker.engine.learn import FINAL_PLAN, Sources, learn
from worker.engine.network.costs import count_params
from worker.engine.network.layers import find_layers
from worker.engine.network.load import load_model
from worker.engine.observer import Recorder

CPU = torch.device("cpu")
SHARES = (0.5, 0.3)  # of the break-even rank
CIFAR_IMAGES, MNIST_IMAGES = 1000, 2000  # test images that are scored


def main(arguments: list[str] | None = None) -> int:
    """Compare on five networks."""
    options = parser("oneshot", __doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with the given networks and datasets")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--work", type=Path, default=Path(".benchmark-files"), help="where the job's files are made")
    given = options.parse_args(arguments)
    prepare_process(given.threads)
    samples: list[Sample] = []
    limits: list[Limit] = []
    for subject in subjects(given.data, given.work, quick=given.quick):
        for share in SHARES:
            label = f"{subject.name} at {share} of break-even"
            with tempfile.TemporaryDirectory() as folder:
                uniform = measure(subject, uniform_spec(subject, share), Path(folder))
            with tempfile.TemporaryDirectory() as folder:
                budget = {"budget": {"max_params": uniform["params"]}}
                ours = measure(subject, budget | examples(subject), Path(folder))
            say(f"{label}: ours {ours}, uniform SVD {uniform}")
            for name, made in (("direct compression", ours), ("uniform SVD", uniform)):
                samples.append(Sample(f"{label}: {name}, accuracy", (made["accuracy"],), "%"))
                samples.append(Sample(f"{label}: {name}, weight error", (made["weight_error"],), ""))
            limits += [
                Limit(f"{label}: params over uniform", ours["params"] / uniform["params"], 1.0),
                Limit(f"{label}: weight error over uniform", ours["weight_error"] / uniform["weight_error"], 1.0),
                Limit(f"{label}: accuracy less uniform", ours["accuracy"] - uniform["accuracy"], 0.0, "%", True),
            ]
    facts = {"cifar_test_images": CIFAR_IMAGES, "mnist_test_images": MNIST_IMAGES}
    return conclude("oneshot", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def subjects(data: Path, work: Path, *, quick: bool) -> list[Subject]:
    """The five networks, with test images alone."""
    flat = mnist(data, work / "mnist-test-flat.npz", held_out=10, flat=True, train_most=10, test_most=MNIST_IMAGES)
    found = [Subject("LeNet300", script(given_lenet300(data), work / "lenet300.pt"), flat)]
    images = cifar_test(data, work / "cifar-test.npz", most=100 if quick else CIFAR_IMAGES)
    found += [
        Subject(f"ResNet-{depth}", script(given_resnet(data, depth), work / f"resnet{depth}.pt"), images)
        for depth in ((20,) if quick else (20, 32, 56))
    ]
    train = mnist(data, work / "mnist-10000.npz", held_out=1000, flat=False, train_most=10_000, test_most=MNIST_IMAGES)
    found.append(Subject("LeNet5", trained_on(lenet5(), train, work / "lenet5.pt", epochs=1 if quick else 8), train))
    return found


def examples(subject: Subject) -> dict[str, Any]:
    """What the network takes, as a job without data says it."""
    with np.load(subject.data) as file:
        return {"example_inputs": [{"shape": [1, *file["test_inputs"].shape[1:]]}]}


def uniform_spec(subject: Subject, share: float) -> dict[str, Any]:
    """Give every layer the same share of its break-even rank, under its plain matrix or the channel scheme."""
    rules = []
    for layer in find_layers(load_model(subject.model, CPU)):
        if layer.weight_shape is None or len(layer.weight_shape) < 2:
            continue
        outputs, columns = layer.weight_shape[0], int(np.prod(layer.weight_shape[1:]))
        rank = max(int(share * outputs * columns / (outputs + columns)), 1)
        reshape = "channel" if len(layer.weight_shape) == 4 else "matrix"
        rules.append({"match": layer.name, "terms": [{"type": "low_rank", "reshape": reshape, "rank": rank}]})
    return {"layers": [*rules, {"match": "*", "keep": "dense"}]} | examples(subject)


def measure(subject: Subject, spec: dict[str, Any], folder: Path) -> dict[str, float]:
    """Compress without data; parameters, weight error and accuracy of the artifact."""
    learn(Sources(subject.model, None, None, folder), parse_spec({"device": "cpu", **spec}), Recorder())
    made = emit(subject.model, folder)
    plan = json.loads((folder / FINAL_PLAN).read_text(encoding="utf-8"))
    artifact = load_model(Path(made["path"]), CPU)
    rows = [RankRow.model_validate(row) for row in plan["rows"]]
    errors = {row.layer: row.relative_error**2 for row in rows if row.chosen}
    return {
        "params": count_params(artifact),
        "accuracy": 100 * (1 - float(wrong_on_test(artifact, subject).mean())),
        "weight_error": sum(errors.values()) / len(errors),
    }


if __name__ == "__main__":
    sys.exit(main())
