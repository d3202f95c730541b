"""Scores of a network on a part of the data, paired differences with their intervals, and latency."""

from collections.abc import Sequence
from contextlib import suppress
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
from worker.engine.forward import call, call_nested, out_of_memory
from worker.engine.metrics import Metric, UnitScores
from worker.engine.objective import Objective
from worker.engine.objective_module import NotSeparableError
from worker.engine.teacher import Teacher

LATENCY_REPEATS = (5, 50)  # least and most timed passes
LATENCY_SECONDS = 1.0  # of timed passes, between those bounds
EVALUATION_BATCH_SIZE = 256
UNITS_MAX = 1024  # scores of a part are kept of each sample up to here, beyond of groups of samples


@dataclass(frozen=True)
class Scores:
    """Scores of the units of a part, which are its samples or groups of them, and the mean of the whole objective.

    Parameters
    ----------
    losses : ndarray
        ``(n,)`` float64 mean task loss of each unit.
    sums, counts : ndarray
        ``(n,)`` float64 of the metric.
    samples : ndarray
        ``(n,)`` float64 samples of each unit.
    objective : float
        Mean over the part.
    metric_of : Metric
        What the metric is.
    """

    losses: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    objective: float
    metric_of: Metric

    @property
    def loss(self) -> float:
        """Mean task loss of a sample."""
        return float((self.losses * self.samples).sum() / self.samples.sum())

    @property
    def metric(self) -> float:
        """Value of the metric over the part."""
        ratio = float(self.sums.sum() / self.counts.sum())
        return ratio if self.metric_of.value_of is None else self.metric_of.value_of(ratio)

    @property
    def metrics(self) -> np.ndarray:
        """``(n,)`` metric of each unit, before its `value_of`."""
        made: np.ndarray = self.sums / self.counts
        return made

    def influences(self) -> np.ndarray:
        """``(n,)`` what each unit adds to n times the metric, to first order around its value.

        The metric is g(S/C) with S = Σ sums and C = Σ counts; its linearization has the influence function
        g(S/C) + g'(S/C)·(sᵢ − (S/C)·cᵢ)/c̄ (Särndal, Swensson and Wretman, Model Assisted Survey Sampling, 5.6). With
        equal counts and no g these are the units' metrics.
        """
        ratio = self.sums.sum() / self.counts.sum()
        slope = 1.0 if self.metric_of.slope_of is None else self.metric_of.slope_of(float(ratio))
        made: np.ndarray = self.metric + slope * (self.sums - ratio * self.counts) / self.counts.mean()
        return made


def evaluate(
    module: torch.jit.ScriptModule,
    dataset: Dataset,
    part: PartName,
    objective: Objective,
    teacher: Teacher | None,
    device: torch.device,
    positions: np.ndarray | None = None,
) -> Scores:
    """Score a network on a part, or on some positions of it, in evaluation mode; the network's own mode is given back.

    Samples that the objective leaves out have no place in the scores. A batch that does not fit in memory is halved.

    Raises
    ------
    ProblemError
        ``DATASET_INVALID`` when every sample of the part is left out.
    """
    was_training = module.training
    module.eval()
    made: list[UnitScores] = []
    positions = np.arange(dataset.size(part)) if positions is None else positions
    total, start, count = 0.0, 0, len(positions)
    size = objective.forward_size(EVALUATION_BATCH_SIZE, count)
    # Only the report tells samples apart; elsewhere a unit is as large as a batch.
    unit = -(-count // UNITS_MAX) if part == "report" else count
    while start < count:
        rows = positions[start : start + objective.take(size, count - start)]
        try:
            with torch.no_grad():
                scores, mean = _score(module, dataset, part, rows, objective, teacher, device, unit)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            size //= 2
            continue
        made.append(scores)
        total += mean * len(rows)
        start += len(rows)
    module.train(was_training)
    joined = UnitScores(*(torch.cat(each) for each in zip(*made, strict=True)))
    counted = ~torch.isnan(joined.counts)
    if not bool(counted.any()):
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            f"every sample of the {part} part is left out by objective.ignore_index {objective.spec.ignore_index}; "
            "give targets for some of them",
        )
    losses, sums, counts, samples = (each[counted].numpy() for each in joined)
    return Scores(losses, sums, counts, samples, total / count, objective.metric)


def evaluate_pair(
    compressed: torch.jit.ScriptModule,
    reference: torch.jit.ScriptModule,
    dataset: Dataset,
    objective: Objective,
    teacher: Teacher | None,
    device: torch.device,
) -> tuple[Scores, Scores]:
    """Score two networks on the report part, in the same units."""
    for _ in range(2):  # an objective that cannot be had of single samples is found to be so at most once
        with suppress(NotSeparableError):
            found, wanted = (
                evaluate(module, dataset, "report", objective, teacher, device) for module in (compressed, reference)
            )
            return found, wanted
    raise NotSeparableError


def _score(
    module: torch.jit.ScriptModule,
    dataset: Dataset,
    part: PartName,
    rows: np.ndarray,
    objective: Objective,
    teacher: Teacher | None,
    device: torch.device,
    unit: int,
) -> tuple[UnitScores, float]:
    batch = dataset.rows(part, rows, device)
    wanted = teacher.outputs(part, rows, batch) if teacher is not None else None
    outputs = call_nested(module, batch.inputs)
    scores = objective.batch_scores(outputs, batch, wanted, unit)
    return UnitScores(*(each.cpu() for each in scores)), float(objective.batch_loss(outputs, batch, wanted))


def metric_difference(compressed: Scores, reference: Scores) -> PairedDifference:
    """Metric of the compressed network less the reference's, with its interval and what that says."""
    metric = compressed.metric_of
    plain = metric.value_of is None and all(np.all(each.counts == each.counts[0]) for each in (compressed, reference))
    pairs = (compressed.metrics, reference.metrics) if plain else (compressed.influences(), reference.influences())
    return judged(paired_difference(metric.name, *pairs), compressed, higher_is_better=metric.higher_is_better)


def loss_difference(compressed: Scores, reference: Scores) -> PairedDifference:
    """Task loss of the compressed network less the reference's, with its interval and what that says."""
    share = compressed.samples / compressed.samples.mean()
    pair = (each.loss + share * (each.losses - each.loss) for each in (compressed, reference))
    found = paired_difference("loss", *pair)
    return judged(found, compressed, higher_is_better=False)


def judged(found: PairedDifference, scores: Scores, *, higher_is_better: bool) -> PairedDifference:
    """Say whether a difference is for the better: clear where its interval does not hold 0."""
    low, high = (found.low, found.high) if higher_is_better else (-found.high, -found.low)
    verdict = "better" if low > 0 else "worse" if high < 0 else "unclear"
    samples = int(scores.samples.sum())
    return found.model_copy(
        update={
            "higher_is_better": higher_is_better,
            "verdict": verdict,
            "samples": samples,
            "unit_samples": -(-samples // len(scores.samples)),
        }
    )


def paired_difference(name: str, compressed: np.ndarray, reference: np.ndarray) -> PairedDifference:
    """Mean of compressed − reference over the same samples, with its 95 % interval.

    Differences of right and wrong answers take only −1, 0, 1; their interval is Agresti and Min's adjusted one
    (Statistics in Medicine 24, 2005), which does not shrink to a point when no sample differs. Others take Student's t.

    Parameters
    ----------
    compressed, reference : ndarray
        ``(n,)`` scores of the units: samples, or groups of them.
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
