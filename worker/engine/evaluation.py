"""Scores of a network on a part of the data, paired differences with their intervals, and latency."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from time import perf_counter

import numpy as np
import torch
from scipy import special
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.report import CONFIDENCE, Latency, PairedDifference
from worker.engine.data import Dataset, PartName
from worker.engine.forward import call, out_of_memory
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
    """Score a network on a part, in evaluation mode; the network's own mode is given back.

    Samples that the objective leaves out have no place in the scores. A batch that does not fit in memory is halved.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` when every sample of the part is left out.
    """
    was_training = module.training
    module.eval()
    losses, metrics, total = [], [], 0.0
    count, start, size = dataset.size(part), 0, EVALUATION_BATCH_SIZE
    while start < count:
        rows = np.arange(start, min(start + size, count))
        try:
            with torch.no_grad():
                loss, metric, mean = _score(module, dataset, part, rows, objective, teacher, device)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            size //= 2
            continue
        losses.append(loss)
        metrics.append(metric)
        total += mean * len(rows)
        start += len(rows)
    module.train(was_training)
    losses_, metrics_ = np.concatenate(losses), np.concatenate(metrics)
    counted = ~np.isnan(metrics_) if objective.loss_name == "cross_entropy" else np.full(count, fill_value=True)
    if not counted.any():
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"every sample of the {part} part is left out by objective.ignore_index {objective.spec.ignore_index}; "
            "give targets for some of them",
        )
    return Scores(losses_[counted], metrics_[counted], total / count)


def _score(
    module: torch.jit.ScriptModule,
    dataset: Dataset,
    part: PartName,
    rows: np.ndarray,
    objective: Objective,
    teacher: Teacher | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray, float]:
    batch = dataset.rows(part, rows, device)
    wanted = teacher.outputs(part, rows, batch) if teacher is not None else None
    outputs = call(module, batch.inputs)
    loss, metric = objective.scores(outputs, batch.targets, wanted)
    return loss.cpu().numpy(), metric.cpu().numpy(), float(objective.loss(outputs, batch.targets, wanted))


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
        half = float(special.ndtri(0.5 + CONFIDENCE / 2)) * spread
        low, high = min(centre - half, mean), max(centre + half, mean)
    else:
        error = float(differences.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
        half = float(special.stdtrit(max(count - 1, 1), 0.5 + CONFIDENCE / 2)) * error
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
