"""LeNet300 on MNIST: the error of compressed networks beside the authors' published runs and plain SVD.

The reference network is given (2.17 % test error), and nothing is augmented. Every error is on MNIST's 10,000 test
images, which nothing is chosen on, and is the median over the seeds.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.given_networks import given_lenet300, mnist, script
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.trials import Bench, Kept, Subject, Trial, median_of
from worker.engine.device import prepare_process

VERSION = "5"  # of the method that the kept trials were made with
HELD_OUT = 2000  # of the training images: they choose between iterates
WORSE_MAX, BETTER_MIN, SHORT_MAX = 0.1, 0.3, 0.2  # percentage points, against the authors' 75 epochs
PUBLISHED_TOLERANCE = 0.1


@dataclass(frozen=True)
class Point:
    """A size, with the error of the authors' code in 25 steps of 3 epochs (one run) and what is aimed at.

    `distillation` was chosen on a network that was trained for it (docs/benchmarks.md): where little is cut the labels
    teach more than the reference does, where much is cut they overfit.
    """

    fraction: float
    authors: float
    target: float
    distillation: float


POINTS = (Point(0.161, 1.97, 1.90, 0.0), Point(0.092, 2.49, 2.30, 0.7), Point(0.068, 3.27, 2.80, 0.7))
PUBLISHED_TUNING = 15  # epochs of the networks of the rows below, after their steps
SCHEDULES = {75: (15, 60), 25: (8, 17)}  # epochs in all: steps of one epoch, epochs of the factored network
STRONGEST = 0.068


def main(arguments: list[str] | None = None) -> int:
    """Run what is not kept yet, and compare."""
    options = parser("lenet300", __doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with the given network and mnist.npz")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--work", type=Path, default=Path(".benchmark-files"), help="where the job's files are made")
    options.add_argument("--only", default="", help="regular expression of the names of rows")
    given = options.parse_args(arguments)
    prepare_process(given.threads)
    held = 200 if given.quick else HELD_OUT
    most = 2000 if given.quick else None
    name = "mnist-quick.npz" if given.quick else "mnist-flat.npz"
    subject = Subject(
        "lenet300",
        script(given_lenet300(given.data), given.work / "lenet300.pt"),
        mnist(given.data, given.work / name, held_out=held, flat=True, train_most=most),
    )
    bench = Bench(subject, Kept(given.results, "lenet300", quick=given.quick), VERSION)
    seeds = range(1 if given.quick else given.seeds)
    say(f"the reference's error is {100 * subject.wrong.mean():.2f} % on {len(subject.wrong)} test images")
    samples: list[Sample] = []
    errors: dict[str, float] = {}
    for trial in trials(quick=given.quick):
        if not re.search(given.only, trial.name):
            continue
        made = bench.outcomes(trial, seeds)
        errors[trial.name] = median_of(made)
        size = "stored_bits_fraction" if trial.name in {each.name for each in PUBLISHED} else "params_fraction"
        label = f"{trial.name} (at {median_of(made, size):.4f} of {'bits' if 'bits' in size else 'params'})"
        samples.append(Sample(label, tuple(each["test_error_percent"] for each in made), "%"))
    facts = {"reference_error_percent": 100 * float(subject.wrong.mean()), "held_out": held, "seeds": len(seeds)}
    return conclude("lenet300", samples, limits(errors), quick=given.quick, facts=facts, folder=given.results)


def trials(*, quick: bool) -> list[Trial]:
    """Rows of the table: LC, plain SVD at the same cost by its own ranks, and at the ranks that LC found."""
    made = [
        (row_name(point.fraction, epochs), low_rank_spec(point, epochs, quick=quick))
        for epochs in SCHEDULES
        for point in reversed(POINTS)
    ]
    return [
        *(Trial(name, spec) for name, spec in made),
        *(Trial(each.name, published_spec(each, quick=quick)) for each in PUBLISHED),
        *(Trial(each.plain_name, plain_spec(each, quick=quick), "") for each in PUBLISHED),
        *(Trial(f"plain SVD {name}", spec, "") for name, spec in made),
        *(Trial(f"plain SVD at the ranks of {name}", spec, name) for name, spec in made),
    ]


@dataclass(frozen=True)
class Published:
    """A compression by the authors that is not low rank alone, its error, and the rules that ask for it.

    `fraction` is what its weights are stored in, of the reference's bits, rounded up: the size of plain SVD beside it.
    How it is trained was chosen on a network that was trained for it (docs/benchmarks.md): where nothing but two values
    is left, they are found in many short steps, and weights that decay more come out worse.
    """

    name: str
    error: float
    fraction: float
    layers: list[dict[str, Any]]
    steps: int = 30
    epochs_per_step: int = 3
    weight_decay: float = 5e-4

    @property
    def plain_name(self) -> str:
        """Name of the row of plain SVD."""
        return f"plain SVD at the bits of {self.name}"


def _two_values() -> dict[str, Any]:
    return {"type": "quantize", "scheme": "codebook", "values": 2}


PUBLISHED = (
    Published(
        "two values in each layer",
        2.56,
        0.033,
        [{"terms": [_two_values()]}],
        steps=180,
        epochs_per_step=1,
        weight_decay=1e-4,
    ),
    Published("pruned to 5 %", 2.18, 0.062, [{"terms": [{"type": "prune", "keep_fraction": 0.05, "joint": True}]}]),
    Published(
        "two values and 1 % corrections",
        2.17,
        0.046,
        [{"terms": [_two_values(), {"type": "prune", "keep_fraction": 0.01, "joint": True}]}],
    ),
    Published(
        "pruned, low rank, two values",
        2.13,
        0.040,
        [
            {"match": "0", "terms": [{"type": "prune", "keep_fraction": 5000 / 235200}]},
            {"match": "2", "terms": [{"type": "low_rank", "reshape": "matrix", "rank": 9}]},
            {"match": "4", "terms": [_two_values()]},
        ],
    ),
)


def published_spec(row: Published, *, quick: bool) -> dict[str, Any]:
    """What a job is asked for; the sizes are the rules'. The steps learn values and places, from the labels."""
    steps, epochs, tuning = (2, 1, 1) if quick else (row.steps, row.epochs_per_step, PUBLISHED_TUNING)
    return {
        "layers": row.layers,
        "objective": {"distillation": 0.0},
        "method": {"type": "learning_compression", "mu": {"steps": steps}},
        "training": {
            "epochs_per_step": epochs,
            "batch_size": 128,
            "early_stop": None,
            "optimizer": {"lr": 0.1, "weight_decay": row.weight_decay},
        },
        "fine_tune": {"epochs": tuning},
    }


def plain_spec(row: Published, *, quick: bool) -> dict[str, Any]:
    """The same training for plain SVD, within the bits of a row in float32."""
    spec = published_spec(row, quick=quick)
    layers = [{"terms": [{"type": "low_rank", "reshape": "matrix"}]}]
    return {**spec, "budget": {"max_params_fraction": row.fraction}, "layers": layers}


def row_name(fraction: float, epochs: int) -> str:
    """Name of a row."""
    return f"{100 * fraction:.1f} % in {epochs} epochs"


def low_rank_spec(point: Point, epochs: int, *, quick: bool) -> dict[str, Any]:
    """What a job is asked for: a budget, and how long it may train."""
    steps, tuning = (2, 1) if quick else SCHEDULES[epochs]
    return {
        "budget": {"max_params_fraction": point.fraction},
        "layers": [{"terms": [{"type": "low_rank", "reshape": "matrix"}]}],
        "objective": {"distillation": point.distillation},
        "method": {"type": "learning_compression", "mu": {"steps": steps}},
        "training": {
            "epochs_per_step": 1,
            "batch_size": 128,
            "early_stop": None,
            "optimizer": {"lr": 0.05, "weight_decay": 5e-4},
        },
        "fine_tune": {"epochs": tuning},
    }


def limits(errors: dict[str, float]) -> list[Limit]:
    """Bounds on the errors that were measured."""
    found = []
    for point in POINTS:
        long, short = (row_name(point.fraction, epochs) for epochs in SCHEDULES)
        bound = point.authors - BETTER_MIN if point.fraction == STRONGEST else point.authors + WORSE_MAX
        found += [Limit(long, errors[long], round(bound, 2), "%")] if long in errors else []
        found += [Limit(short, errors[short], round(point.authors + SHORT_MAX, 2), "%")] if short in errors else []
    found += [
        Limit(each.name, errors[each.name], round(each.error + PUBLISHED_TOLERANCE, 2), "%")
        for each in PUBLISHED
        if each.name in errors
    ]
    return found


if __name__ == "__main__":
    sys.exit(main())
