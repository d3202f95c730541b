"""Is the C step faster than full singular value decompositions, and as good?

The peer is the authors' way: `scipy.linalg.svd` in float32 of every reshaped weight, the rank by the threshold, and ten
sweeps for a sum of two terms. Both run in this process on one thread, shape after shape in turn. The weights are random
with the decaying spectra of trained ones.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.csteps.parallel import map_layers
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.reshape import named_reshape
from worker.engine.forms.term import Accuracy, Price

Shape = tuple[int, int, int, int]
ROUNDS, ROUNDS_QUICK = 3, 1
SWEEPS = 10  # of the peer, the authors' number
STEPS_BEFORE = 5  # warm steps before the one that is measured
DECAY = 0.7  # σ_i ~ i^-0.7, and a flat part below
NOISE = 0.3
PARTS = {"channel": 1.0, "spatial": 0.6}  # so that a sum of both is better than either
SHARES = (0.1, 0.2, 0.3, 0.4)  # of the full rank, layer by layer in turn
GROWTH = 1.1  # of μ from step to step
PULLED, MOVED = 0.05, 0.1  # parts of W − Θ that an L step takes away, and that it adds in other directions
SPEED = {"scheme 1": 4.0, "scheme 2": 2.0, "additive": 10.0}
EXCESS_SINGLE, EXCESS_ADDITIVE, PARALLEL = 1e-6, 1e-4, 1.6
PPM = 1e6
ROUNDS_SIDE_BY_SIDE = 5

VGG16: dict[Shape, int] = {
    (64, 3, 3, 3): 1,
    (64, 64, 3, 3): 1,
    (128, 64, 3, 3): 1,
    (128, 128, 3, 3): 1,
    (256, 128, 3, 3): 1,
    (256, 256, 3, 3): 2,
    (512, 256, 3, 3): 1,
    (512, 512, 3, 3): 5,
    (512, 512, 1, 1): 1,  # the linear layers, as 1×1 convolutions
    (10, 512, 1, 1): 1,
}
RESNET50: dict[Shape, int] = {
    (64, 3, 7, 7): 1,
    (64, 64, 1, 1): 1,
    (64, 64, 3, 3): 3,
    (256, 64, 1, 1): 4,
    (64, 256, 1, 1): 2,
    (128, 256, 1, 1): 1,
    (128, 128, 3, 3): 4,
    (512, 128, 1, 1): 4,
    (512, 256, 1, 1): 1,
    (128, 512, 1, 1): 3,
    (256, 512, 1, 1): 1,
    (256, 256, 3, 3): 6,
    (1024, 256, 1, 1): 6,
    (1024, 512, 1, 1): 1,
    (256, 1024, 1, 1): 5,
    (512, 1024, 1, 1): 1,
    (512, 512, 3, 3): 3,
    (2048, 512, 1, 1): 3,
    (2048, 1024, 1, 1): 1,
    (512, 2048, 1, 1): 2,
    (1000, 2048, 1, 1): 1,
}
QUICK: dict[Shape, int] = {(32, 16, 3, 3): 2, (128, 128, 3, 3): 1, (16, 128, 1, 1): 1}


def main(arguments: list[str] | None = None) -> int:
    """Measure the shapes of both networks."""
    options = parser("cstep", __doc__)
    options.add_argument("--rounds", type=int, help=f"interleaved runs of each way  [default: {ROUNDS}]")
    given = options.parse_args(arguments)
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    networks = {"toy": QUICK} if given.quick else {"VGG16-CIFAR": VGG16, "ResNet-50": RESNET50}
    torch.set_num_threads(1)
    samples: list[Sample] = []
    limits: list[Limit] = []
    facts: dict[str, Any] = {"sweeps_of_the_peer": SWEEPS, "mu_growth": GROWTH, "rounds": rounds}
    with threadpool_limits(1):
        for name, shapes in networks.items():
            layers = [Layer.make(shape, number) for number, shape in enumerate(shapes)]
            say(f"{name}: {len(layers)} shapes of {sum(shapes.values())} layers, {rounds} rounds")
            for scheme, speed in SPEED.items():
                tallies = [measure(layer, scheme, rounds) for layer in layers]
                report(f"{name}, {scheme}", tallies, list(shapes.values()), speed, samples, limits, facts)
            side_by_side(name, layers, list(shapes.values()), rounds, samples, limits)
    return conclude("cstep", samples, limits, quick=given.quick, facts=facts, folder=given.results)


@dataclass
class Layer:
    """A weight with its two terms, and where its loop stands."""

    shape: Shape
    choices: dict[str, TermChoice]
    pressure: float
    weight: Tensor  # as the L step of the measured step has left it
    warm: tuple[Any, ...]  # Θ of the step before

    @classmethod
    def make(cls, shape: Shape, number: int) -> "Layer":
        """Make a weight, and take its additive C step into the steady state."""
        generator = torch.Generator().manual_seed(number)
        geometry = Geometry("conv2d", shape, ())
        choices = {}
        for name in ("channel", "spatial"):
            reshape = named_reshape(name, shape)  # type: ignore[arg-type]
            if reshape is not None:
                term = LowRankTerm(reshape, geometry)
                choices[name] = TermChoice(term, Price(params=1.0), 0, term.rank_max)
        weight = torch.zeros(shape)
        for name, choice in choices.items():
            weight += PARTS[name] * _decaying(choice.term, shape, generator)
        flat = torch.randn(shape, generator=generator)
        weight = weight / weight.norm() + NOISE * flat / flat.norm()
        channel = choices["channel"]
        energies = channel.term.energies(weight)
        pressure = float(energies[int(SHARES[number % len(SHARES)] * len(energies))]) / channel.unit_price
        layer = cls(shape, choices, pressure, weight, ())
        both = layer.terms("additive")
        made = project(weight, both, pressure)
        for _ in range(STEPS_BEFORE):
            layer.train(made, generator)
            layer.warm = made.factors
            made = project(layer.weight, both, layer.pressure, warm=layer.warm, accuracy=Accuracy.WARM)
        layer.warm = made.factors
        layer.train(made, generator)
        return layer

    def terms(self, scheme: str) -> list[TermChoice]:
        """Terms of a scheme; one where both have the same matrix."""
        distinct = list({choice.term.key: choice for choice in self.choices.values()}.values())
        return {"scheme 1": distinct[:1], "scheme 2": distinct[-1:], "additive": distinct}[scheme]

    def train(self, made: Projection, generator: torch.Generator) -> None:
        """Move W as an L step does: towards Θ, and elsewhere; μ grows."""
        pairs = zip(self.terms("additive"), made.factors, strict=True)
        whole = sum((choice.term.project(theta).float() for choice, theta in pairs), torch.zeros(self.shape))
        apart = self.weight - whole
        other = torch.randn(self.shape, generator=generator)
        self.weight = whole + (1 - PULLED) * apart + MOVED * apart.norm() / other.norm() * other
        self.pressure /= GROWTH


def _decaying(term: LowRankTerm, shape: Shape, generator: torch.Generator) -> Tensor:
    (p, q), size = term.reshape.matrix, min(term.reshape.matrix)
    values = torch.arange(1, size + 1) ** -DECAY
    left, right = torch.randn(p, size, generator=generator), torch.randn(size, q, generator=generator)
    weight = term.reshape.to_weight((left * values) @ right, shape)
    return weight / weight.norm()


@dataclass
class Tally:
    """What was measured of one shape under one scheme."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    objectives: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def excess(self, way: str) -> float:
        """Objective above the peer's, as a part of it."""
        return self.objectives[way] / self.objectives["full SVD"] - 1

    def apart(self, way: str) -> int:
        """Largest difference of a rank from the peer's."""
        pairs = zip(self.ranks[way], self.ranks["full SVD"], strict=True)
        return max(abs(mine - theirs) for mine, theirs in pairs)


def measure(layer: Layer, scheme: str, rounds: int) -> Tally:
    """Run every way on one shape, in turn."""
    choices = layer.terms(scheme)
    several = len(choices) > 1
    warm = layer.warm if several else None
    fast = Accuracy.WARM if several else Accuracy.SINGLE
    ways: dict[str, Callable[[], Projection]] = {
        "full SVD": lambda: by_full_svd(layer.weight, choices, layer.pressure, warm),
        "C step": lambda: project(layer.weight, choices, layer.pressure, warm=warm, accuracy=fast),
        "last C step": lambda: project(layer.weight, choices, layer.pressure, warm=warm),
    }
    tally = Tally({name: [] for name in ways})
    for number in range(rounds):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            began = time.process_time()  # of one thread that never waits: what else the machine does counts less
            made = ways[name]()
            tally.seconds[name].append(time.process_time() - began)
            tally.objectives[name] = objective(layer, choices, made)
            tally.ranks[name] = made.ranks
    return tally


def objective(layer: Layer, choices: Sequence[TermChoice], made: Projection) -> float:
    """pressure·Σ C(Θ) + ‖W − Σ Θ‖², in float64 for every way alike."""
    pairs = list(zip(choices, made.factors, strict=True))
    whole = torch.zeros(layer.shape, dtype=torch.float64)
    for choice, theta in pairs:
        whole += choice.term.project(theta.to(torch.float64))
    return layer.pressure * sum(choice.cost(theta) for choice, theta in pairs) + float(
        (layer.weight.double() - whole).square().sum()
    )


def by_full_svd(
    weight: Tensor, choices: Sequence[TermChoice], pressure: float, warm: Sequence[Any] | None
) -> Projection:
    """The authors' C step: full singular value decompositions, in float32, and ten sweeps over two terms."""
    terms = [choice.term for choice in choices]
    thetas = list(warm) if warm is not None else [term.empty(weight) for term in terms]
    parts = [term.project(theta).float() for term, theta in zip(terms, thetas, strict=True)]
    sweeps = SWEEPS if len(choices) > 1 else 1
    for _ in range(sweeps):
        for place, choice in enumerate(choices):
            others = [part for at, part in enumerate(parts) if at != place]
            residual = weight - others[0] if others else weight
            matrix = choice.term.reshape.to_matrix(residual).numpy()
            u, s, v = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
            rank = int((s.astype(np.float64) ** 2 > pressure * choice.unit_price).sum())
            root = np.sqrt(s[:rank])
            left, right = torch.from_numpy(u[:, :rank] * root), torch.from_numpy(root[:, None] * v[:rank])
            thetas[place] = type(choice.term.empty(weight))(left, right)
            parts[place] = choice.term.project(thetas[place])
    return Projection(tuple(thetas), 0.0, 0.0, sweeps)


def report(
    name: str,
    tallies: Sequence[Tally],
    counts: Sequence[int],
    speed: float,
    samples: list[Sample],
    limits: list[Limit],
    facts: dict[str, Any],
) -> None:
    """Add up the layers of a network, round by round."""
    totals: dict[str, Sample] = {}
    for way in tallies[0].seconds:
        rounds = zip(*(tally.seconds[way] for tally in tallies), strict=True)
        values = tuple(sum(n * seconds for n, seconds in zip(counts, each, strict=True)) for each in rounds)
        totals[way] = Sample(f"{name}: {way}", values)
        samples.append(totals[way])
    additive = name.endswith("additive")
    bound = EXCESS_ADDITIVE if additive else EXCESS_SINGLE
    limits.append(Limit(f"{name}: speed", totals["full SVD"].median / totals["C step"].median, speed, at_least=True))
    for way in ("C step", "last C step"):
        excess = max(tally.excess(way) for tally in tallies)
        limits.append(Limit(f"{name}: objective of the {way} above the peer's", excess * PPM, bound * PPM, "ppm"))
        limits.append(Limit(f"{name}: ranks of the {way} apart", max(tally.apart(way) for tally in tallies), 0))
    facts[name] = {
        "ranks": [list(tally.ranks["C step"]) for tally in tallies],
        "ranks_of_the_peer": [list(tally.ranks["full SVD"]) for tally in tallies],
        "excess": [tally.excess("C step") for tally in tallies],
        "excess_of_the_last": [tally.excess("last C step") for tally in tallies],
    }


def side_by_side(
    name: str,
    layers: Sequence[Layer],
    counts: Sequence[int],
    rounds: int,
    samples: list[Sample],
    limits: list[Limit],
) -> None:
    """Run all layers of a network by one worker and by two."""
    every = [layer for layer, count in zip(layers, counts, strict=True) for _ in range(count)]
    sizes = [layer.weight.numel() for layer in every]

    def one(layer: Layer) -> Projection:
        choices = layer.terms("additive")
        return project(layer.weight, choices, layer.pressure, warm=layer.warm, accuracy=Accuracy.WARM)

    seconds: dict[int, list[float]] = {1: [], 2: []}
    made: dict[int, list[Projection]] = {}
    for _ in range(max(rounds, ROUNDS_SIDE_BY_SIDE if rounds > 1 else 2)):
        for workers, values in seconds.items():
            began = time.perf_counter()
            made[workers] = map_layers(one, every, workers=workers, sizes=sizes)
            values.append(time.perf_counter() - began)
    samples += [Sample(f"{name}: all layers, workers: {workers}", tuple(each)) for workers, each in seconds.items()]
    ratio = median(seconds[1]) / median(seconds[2])
    limits.append(Limit(f"{name}: speed of two workers", ratio, PARALLEL, at_least=True))
    limits.append(Limit(f"{name}: layers with other bits", different(made[1], made[2]), 0))


def different(one: Sequence[Projection], other: Sequence[Projection]) -> int:
    """Number of layers whose Θ differ in any bit."""
    pairs = zip(one, other, strict=True)
    return sum(
        not all(
            torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
            for a, b in zip(first.factors, second.factors, strict=True)
        )
        for first, second in pairs
    )


if __name__ == "__main__":
    sys.exit(main())
