"""What a report measures beside the loss: the metrics by name, and their values for each sample."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.contract.errors import ErrorCode, ProblemError
from service.contract.objective_spec import METRICS_OF_LOSS
from service.contract.spec import Objective as ObjectiveSpec

TOP = 5
PSNR_DECIBELS_MAX = 100.0  # of a sample that is exact but for rounding


EXPONENT_MAX = 700.0  # of a perplexity: beyond it float64 ends


def _bounded_exp(mean: float) -> float:
    return exp(min(mean, EXPONENT_MAX))


@dataclass(frozen=True)
class Metric:
    """A metric: its value over a part is `value_of`(Σ sums / Σ counts) of its units.

    Parameters
    ----------
    name : str
        As the report names it.
    higher_is_better : bool
        Its direction.
    value_of, slope_of : callable, optional
        What the ratio becomes and the derivative of that; by default the ratio is the metric.
    """

    name: str
    higher_is_better: bool
    value_of: Callable[[float], float] | None = None
    slope_of: Callable[[float], float] | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", higher_is_better=True),
        Metric("top5", higher_is_better=True),
        Metric("perplexity", higher_is_better=False, value_of=_bounded_exp, slope_of=_bounded_exp),
        Metric("mse", higher_is_better=False),
        Metric("psnr", higher_is_better=True),
        Metric("relative_output_error", higher_is_better=False),
    )
}


class UnitScores(NamedTuple):
    """Scores of the units of a batch, which are its samples or groups of them; ``(U,)`` float64 each.

    Parameters
    ----------
    losses : Tensor
        Mean task loss of a unit.
    sums, counts : Tensor
        Of the metric; a count of NaN says that the unit is left out.
    samples : Tensor
        How many samples a unit has.
    """

    losses: Tensor
    sums: Tensor
    counts: Tensor
    samples: Tensor


def each_sample(losses: Tensor, metrics: Tensor, counts: Tensor | None = None) -> UnitScores:
    """Scores whose units are samples."""
    ones = torch.ones_like(losses, dtype=torch.float64)
    return UnitScores(losses.double(), metrics.double(), ones if counts is None else counts.double(), ones)


def metric_of(spec: ObjectiveSpec) -> Metric:
    """The metric that a spec asks for, its loss being resolved to one of our own.

    Raises
    ------
    ProblemError
        ``SPEC_INVALID`` when the metric belongs to another loss.
    """
    loss = str(spec.loss)
    known = METRICS_OF_LOSS[loss]
    if spec.metric == "auto":
        return METRICS[known[0] if known else "relative_output_error"]
    if spec.metric not in known:
        raise ProblemError(
            ErrorCode.SPEC_INVALID,
            f"objective.metric is '{spec.metric}', and with this data the loss is '{loss}', whose metrics are: "
            f"{', '.join(known) or 'none but auto'}",
        )
    return METRICS[spec.metric]


def class_scores(output: Tensor, target: Tensor, spec: ObjectiveSpec, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, metric and weight of each sample, ``(B,)``; NaN where `ignore_index` leaves out all of it.

    Accuracy and top-5 are shares of a sample's positions and weigh alike. A perplexity is exp of the mean loss of a
    position, so its samples weigh as many positions as they have.
    """
    logits = output.movedim(spec.class_dim, 1)
    counted = (target != spec.ignore_index).reshape(len(target), -1)
    losses = functional.cross_entropy(logits, target, ignore_index=spec.ignore_index, reduction="none")
    per_sample = (losses.reshape(len(target), -1).double() * counted).sum(dim=1)
    positions = counted.sum(dim=1).double()
    positions[positions == 0] = torch.nan  # says that the sample is left out
    if metric.name == "perplexity":
        return per_sample / positions, per_sample, positions
    if metric.name == "top5":
        right = (logits.topk(TOP, dim=1).indices == target.unsqueeze(1)).any(dim=1)
    else:
        right = logits.argmax(dim=1) == target
    share = (right.reshape(len(target), -1) & counted).sum(dim=1) / positions
    return per_sample / positions, share, positions / positions


def square_scores(output: Tensor, target: Tensor, peak: float, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error, metric and weight of each sample, ``(B,)``."""
    square = (output - target.reshape(output.shape).to(output.dtype)).double().square()
    error = square.reshape(len(output), -1).mean(dim=1)
    value = psnr(error, peak) if metric.name == "psnr" else error
    return error, value, torch.ones_like(error)


def psnr(error: Tensor, peak: float) -> Tensor:
    """Peak signal-to-noise ratio 10·log₁₀(peak² / MSE) of each sample, in decibels."""
    return (10 * torch.log10(peak**2 / error.clamp_min(torch.finfo(error.dtype).tiny))).clamp_max(PSNR_DECIBELS_MAX)
