"""Scores of a network on a part of the data, paired differences with their intervals, and latency."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from time import perf_counter

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from service.contract.report import CONFIDENCE, Latency, PairedDifference
from worker.engine.data import Dataset, PartName
from worker.engine.forward import call
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher

LATENCY_REPEATS = (5, 50)  # least and most timed passes
LATENCY_SECONDS = 1.0  # of timed passes, between those bounds
EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True)
class Scores:
    """Task loss and metric of each sample, float64, and the mean of the whole objective."""

    losses: np.ndarray
    metrics: np.ndarray
    objective: float

    @property
    def loss(self) -> float:
        """Mean task loss."""
        return float(self.losses.mean())

    @property
    def metric(self) -> float:
        """Mean metric."""
        return float(self.metrics.mean())


def evaluate(
    module: torch.jit.ScriptModule,
    dataset: Dataset,
    part: PartName,
    objective: Objective,
    teacher: Teacher | None,
    device: torch.device,
) -> Scores:
    """Score a network on a part, in evaluation mode; the network's own mode is given back."""
    was_training = module.training
    module.eval()
    losses, metrics, total = [], [], 0.0
    positions = np.arange(dataset.size(part))
    with torch.no_grad():
        for start in range(0, len(positions), EVALUATION_BATCH_SIZE):
            rows = positions[start : start + EVALUATION_BATCH_SIZE]
            batch = dataset.rows(part, rows, device)
            wanted = teacher.outputs(part, rows, batch) if teacher is not None else None
            outputs = call(module, batch.inputs)
            loss, metric = objective.scores(outputs, batch.targets, wanted)
            losses.append(loss.cpu().numpy())
            metrics.append(metric.cpu().numpy())
            total += float(objective.loss(outputs, batch.targets, wanted)) * len(rows)
    module.train(was_training)
    return Scores(np.concatenate(losses), np.concatenate(metrics), total / len(positions))


def paired_difference(name: str, compressed: np.ndarray, reference: np.ndarray) -> PairedDifference:
    """Mean of compressed − reference over the same samples, with its 95 % interval.

    Differences of right and wrong answers take only −1, 0, 1; their interval is Agresti and Min's adjusted one
    (Statistics in Medicine 24, 2005), which does not shrink to a point when no sample differs. Others take Student's t.

    Parameters
    ----------
    compressed, reference : ndarray
        ``(n,)`` per-sample scores.
    """
    differences = compressed - reference
    count = len(differences)
    mean = float(differences.mean())
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        gained, lost = float((differences > 0).sum()) + 0.5, float((differences < 0).sum()) + 0.5
        adjusted = count + 2
        centre = (gained - lost) / adjusted
        spread = sqrt(max(gained + lost - (gained - lost) ** 2 / adjusted, 0.0)) / adjusted
        half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * spread
        low, high = min(centre - half, mean), max(centre + half, mean)
    else:
        error = float(differences.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, max(count - 1, 1))) * error
        low, high = mean - half, mean + half
    return PairedDifference(name=name, difference=mean, low=low, high=high, samples=count)


def measure_latency(
    modules: Sequence[torch.jit.ScriptModule], inputs: Sequence[Tensor], batch_size: int
) -> list[Latency]:
    """Median time of a forward pass of each network, taken in turn so that noise falls on all alike."""
    device = inputs[0].device
    batch = tuple(_repeat(x, batch_size) for x in inputs)
    times: list[list[float]] = [[] for _ in modules]
    for module in modules:
        module.eval()
    with torch.no_grad():
        for module in modules:
            call(module, batch)
        began = perf_counter()
        least, most = LATENCY_REPEATS
        while len(times[0]) < least or (len(times[0]) < most and perf_counter() - began < LATENCY_SECONDS):
            for position, module in enumerate(modules):
                start = perf_counter()
                call(module, batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[position].append(perf_counter() - start)
    return [Latency(batch_size=batch_size, median_ms=1000 * median(each), repeats=len(each)) for each in times]


def _repeat(x: Tensor, batch_size: int) -> Tensor:
    index = torch.arange(batch_size, device=x.device) % x.shape[0]
    return x[index]
