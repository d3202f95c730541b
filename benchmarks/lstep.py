"""Is the engine's L step as fast as a plain training loop? Limit: at most 5 % slower.

The peer is the loop that one would write by hand: the same ScriptModule, batches, optimiser, objective and outputs of
the reference, without the penalty. The runs are interleaved, so that a machine that slows down slows all of them.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.networks import CLASSES, Workload, workloads
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from service.contract.spec import DataSpec, JobSpec, SgdSpec, Training, parse_spec
from worker.engine.data import Dataset, epoch_order
from worker.engine.data_files import Arrays
from worker.engine.device import prepare_process
from worker.engine.layer_rules import apply_rules
from worker.engine.network.costs import take_census
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher
from worker.engine.training import Penalty, Trainer

SLOWDOWN_MAX = 1.05
ROUNDS, ROUNDS_QUICK = 21, 3  # short epochs, often: what else the machine does then hits all loops alike
LEARNING_RATE, MU, SEED = 1e-3, 1e-3, 0
SAME_LOSS = 1e-3  # relative; above it the two loops do not do the same work
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    """Measure both networks."""
    options = parser("lstep", __doc__)
    options.add_argument("--rounds", type=int, help=f"interleaved runs of each loop  [default: {ROUNDS}]")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    given = options.parse_args(arguments)
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    prepare_process(given.threads)
    samples: list[Sample] = []
    limits: list[Limit] = []
    for workload in workloads(quick=given.quick):
        say(f"{workload.name}: {rounds} rounds of one epoch each of {workload.samples} samples")
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(workload, Path(folder), rounds)
        samples += measured
        plain, penalised = measured[0], measured[2]
        limits.append(Limit(f"{workload.name}: L step / plain loop", penalised.median / plain.median, SLOWDOWN_MAX))
    facts = {"threads": given.threads, "learning_rate": LEARNING_RATE, "mu": MU}
    return conclude("lstep", samples, limits, quick=given.quick, facts=facts, folder=given.results)


def measure(workload: Workload, folder: Path, rounds: int) -> list[Sample]:
    """Seconds of an epoch: of the plain loop, of the engine's loop without and with its penalty."""
    bench = Bench.make(workload, folder)
    loops: dict[str, Callable[[int], float]] = {
        "plain loop": bench.plain_epoch(),
        "engine without penalty": bench.engine_epoch(penalised=False),
        "engine's L step": bench.engine_epoch(penalised=True),
    }
    losses = [loop(0) for loop in loops.values()]  # a first epoch that is not counted: caches, allocator, teacher
    require_same_work(workload.name, losses)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, rounds + 1):
        names = list(loops)
        for name in names[number % 3 :] + names[: number % 3]:  # each loop goes first in turn
            began = time.perf_counter()
            loops[name](number)
            seconds[name].append(time.perf_counter() - began)
    return [Sample(f"{workload.name}: {name}", tuple(values)) for name, values in seconds.items()]


def require_same_work(name: str, losses: list[float]) -> None:
    """Refuse to compare loops that do not reach the same loss; the penalty is too weak to move it in one epoch."""
    if max(losses) - min(losses) > SAME_LOSS * max(losses):
        raise SystemExit(f"{name}: the loops do not do the same work; their losses are {losses}")


@dataclass
class Bench:
    """One network as a file, and data; every loop gets a fresh copy of the network."""

    model: Path
    dataset: Dataset
    objective: Objective
    teacher: Teacher
    spec: JobSpec
    workload: Workload

    @classmethod
    def make(cls, workload: Workload, folder: Path) -> "Bench":
        """Save the network as the engine gets it, and make random data."""
        model = folder / "network.pt"
        torch.jit.save(torch.jit.script(workload.network), str(model))
        spec = parse_spec({"budget": {"max_params_fraction": 0.5}, "training": {"batch_size": workload.batch_size}})
        random = np.random.default_rng(SEED)
        count, held = workload.samples, 8
        arrays: Arrays = {
            "inputs": random.standard_normal((count, *workload.image_shape), dtype=np.float32),
            "targets": random.integers(0, CLASSES, count),
            "val_inputs": random.standard_normal((held, *workload.image_shape), dtype=np.float32),
            "val_targets": random.integers(0, CLASSES, held),
        }
        dataset = Dataset(arrays, DataSpec(), SEED, ["images"])
        objective = Objective(spec.objective.model_copy(update={"loss": "cross_entropy"}))
        return cls(model, dataset, objective, Teacher(load_model(model), dataset, CPU), spec, workload)

    def engine_epoch(self, *, penalised: bool) -> Callable[[int], float]:
        """The engine's training loop, with or without the pull of every compressible weight."""
        module = load_model(self.model)
        spec = Training(optimizer=SgdSpec(lr=LEARNING_RATE), batch_size=self.workload.batch_size)
        trainer = Trainer(module, self.dataset, self.objective, self.teacher, spec, SEED, CPU)
        optimizer = trainer.optimizer(LEARNING_RATE)
        penalty = self._penalty(module) if penalised else None
        return lambda number: trainer.epoch(optimizer, (number,), penalty)

    def plain_epoch(self) -> Callable[[int], float]:
        """The loop that one would write by hand for the same objective."""
        module = load_model(self.model)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
        part = self.dataset.part("train")
        images, targets = torch.from_numpy(part.inputs[0]), torch.from_numpy(part.targets[0])
        with torch.no_grad():
            reference = load_model(self.model).eval()
            wanted = torch.cat([reference(images[at : at + 512]) for at in range(0, len(images), 512)])
        aim = self.spec.objective

        def epoch(number: int) -> float:
            module.train()
            order = torch.from_numpy(epoch_order(len(images), SEED, number))
            total = torch.zeros(())
            for index in torch.split(order, self.workload.batch_size):
                optimizer.zero_grad()
                loss = plain_loss(
                    module(images[index]), targets[index], wanted[index], aim.distillation, aim.temperature
                )
                torch.autograd.backward([loss])
                optimizer.step()
                total += loss.detach() * len(index)
            return float(total) / len(images)

        return epoch

    def _penalty(self, module: torch.jit.ScriptModule) -> Penalty:
        """As in the L step: anchors near the weights of every layer that the default rules compress."""
        example = torch.zeros(1, *self.workload.image_shape)
        decisions = apply_rules(take_census(load_model(self.model), (example,)).layers, self.spec)
        parameters = dict(module.named_parameters())
        weights: list[Tensor] = [parameters[str(problem.layer.weight)] for problem in decisions.problems]
        torch.manual_seed(SEED)
        anchors = [weight.detach() + 0.01 * torch.randn_like(weight) for weight in weights]
        return Penalty(weights, anchors, MU)


def plain_loss(scores: Tensor, targets: Tensor, wanted: Tensor, distillation: float, temperature: float) -> Tensor:
    """(1 − d)·cross entropy + d·T²·KL(reference ‖ network)."""
    own = F.log_softmax(scores / temperature, dim=1)
    reference = F.log_softmax(wanted / temperature, dim=1)
    divergence = F.kl_div(own, reference, reduction="batchmean", log_target=True)
    return (1 - distillation) * F.cross_entropy(scores, targets) + distillation * temperature**2 * divergence


if __name__ == "__main__":
    sys.exit(main())
