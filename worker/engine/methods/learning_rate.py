"""The learning rate by a short range test on a copy, and its limits in the L step."""

from collections.abc import Callable, Sequence
from math import cos, inf, isfinite, pi

import numpy as np
import torch

from service.contract.errors import ErrorCode, ProblemError
from service.contract.numbers import Auto
from service.contract.plan import RankRow
from service.contract.training_spec import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    Schedule,
    StepSchedule,
)
from worker.engine.data import epoch_order
from worker.engine.forward import call_nested, map_tensors
from worker.engine.training import Trainer

CANDIDATES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # tried from the top
WORSE_MAX = 2  # this many candidates in a row that do worse than the best end the test
RANGE_TEST_UPDATES = 20
EXPLODED_RATIO = 10.0
RANGE_TEST_STAGE = 0x1A  # a stream of its own for the order of samples
PROBE_SAMPLES = 1024
PROBE_STREAM = 0x9B
DECAY_OVER_RUN = 0.95**25  # methods L.7: 0.95 per step over 25 steps


def range_test(make_trainer: Callable[[], Trainer]) -> float:
    """Return the rate that lowers the objective most in a few updates from the same start.

    Parameters
    ----------
    make_trainer : callable
        Makes a trainer on a fresh copy of the network to be trained.

    Raises
    ------
    ProblemError
        ``DIVERGED`` when even the smallest rate leaves no finite loss.
    """
    best_rate, best_loss, worse = 0.0, inf, 0
    for rate in CANDIDATES:
        trainer = make_trainer()
        optimizer = trainer.optimizer(rate)
        left, epoch = RANGE_TEST_UPDATES, 0
        try:
            per_epoch = max(len(range(0, trainer.dataset.size("train"), trainer.batch_size)), 1)
            while left > 0:
                trainer.epoch(optimizer, (RANGE_TEST_STAGE, epoch), updates_max=left)
                left, epoch = left - per_epoch, epoch + 1
            loss = _probe(trainer)
        except ProblemError as error:
            if error.code != ErrorCode.DIVERGED:
                raise
            continue
        if loss < best_loss:
            best_rate, best_loss, worse = rate, loss, 0
        elif isfinite(best_loss):
            worse += 1
        if worse == WORSE_MAX:
            break
    if best_rate == 0.0:
        raise ProblemError(
            ErrorCode.DIVERGED,
            f"training diverges at every learning rate from {CANDIDATES[0]} to {CANDIDATES[-1]}; check the scale "
            "of the inputs (data.scale, data.mean, data.std) or set training.optimizer.lr",
        )
    return best_rate


def step_rate(
    initial: float,
    step: int,
    steps: int,
    mu: float,
    schedule: Auto | Schedule = "auto",
    epoch: int = 0,
    epochs: int = 1,
) -> float:
    """Rate of one epoch of an L step, never above 1/μ (the LC papers' clipping).

    Parameters
    ----------
    initial : float
        The rate that the schedule starts from.
    step, steps : int
        The L step, from 0, and how many there are.
    mu : float
        μ of the step.
    schedule : Schedule or "auto"
        ``auto`` falls from step to step, by 0.95 over 25 of them (methods L.7), and is constant within a step.
    epoch, epochs : int
        The epoch within the step, from 0, and how many a step has.
    """
    if schedule == "auto":
        factor = DECAY_OVER_RUN ** (step / max(steps, 1))
    elif not isinstance(schedule, ConstantSchedule) and schedule.restart:
        factor = _factor(schedule, epoch, epochs, step)
    else:
        factor = _factor(schedule, step * epochs + epoch, steps * epochs, step)
    return float(min(initial * factor, 1.0 / mu))


def tuning_rate(initial: float, schedule: Auto | Schedule, epoch: int, epochs: int) -> float:
    """Rate of one epoch, from 0, of the factored network's training; ``auto`` is a cosine to 0."""
    return initial * _factor(CosineSchedule() if schedule == "auto" else schedule, epoch, epochs, 0)


def _factor(schedule: Schedule, epoch: int, epochs: int, step: int) -> float:
    """What is left of the initial rate after so many of all epochs."""
    if isinstance(schedule, CosineSchedule):
        return schedule.to + (1 - schedule.to) * 0.5 * (1 + cos(pi * epoch / max(epochs, 1)))
    if isinstance(schedule, ExponentialSchedule):
        return float(schedule.factor ** (step if schedule.per == "step" else epoch))
    if isinstance(schedule, StepSchedule):
        return float(schedule.factor ** sum(epoch >= place * epochs for place in schedule.at))
    return 1.0


def loss_limit(trainer: Trainer) -> float:
    """Return the mean loss above which an epoch counts as diverged: ten times that of a network that answers zeros.

    A loss that explodes without becoming NaN would otherwise go on through C steps and ruin the ranks. A loss of the
    user's own may like zeros better than any answer, so the limit is at least ten times the loss at the start; where it
    cannot be computed of zeros there is no limit.
    """
    positions = probe_positions(trainer)
    try:
        limit = EXPLODED_RATIO * max(mean_objective(trainer, positions, zeros=True), mean_objective(trainer, positions))
    except ProblemError as error:
        if error.code != ErrorCode.OBJECTIVE_RAISED:
            raise
        return inf
    return limit if limit > 0 else inf


def _probe(trainer: Trainer) -> float:
    """Objective on a few training samples, in evaluation mode."""
    mean = mean_objective(trainer, probe_positions(trainer))
    return mean if np.isfinite(mean) else inf


def probe_positions(trainer: Trainer, samples: int = PROBE_SAMPLES, stream: Sequence[int] = ()) -> np.ndarray:
    """Training samples to measure on, the same for the same stream; not the first ones, as files may be in order."""
    size = trainer.dataset.size("train")
    return np.sort(epoch_order(size, trainer.seed, PROBE_STREAM, *stream)[: min(samples, size)])


def mean_objective(trainer: Trainer, positions: np.ndarray, *, zeros: bool = False) -> float:
    """Mean of the objective over some training samples, in evaluation mode; with `zeros`, of a network of zeros."""
    trainer.module.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(positions), trainer.micro_batch_size):
            rows = positions[start : start + trainer.micro_batch_size]
            batch = trainer.dataset.rows("train", rows, trainer.device)
            wanted = trainer.teacher.outputs("train", rows, batch) if trainer.teacher is not None else None
            outputs = call_nested(trainer.module, batch.inputs)
            if zeros:
                outputs = map_tensors(outputs, torch.zeros_like)
            total += float(trainer.objective.batch_loss(outputs, batch, wanted)) * len(rows)
    return total / len(positions)


def what_to_change(rows: Sequence[RankRow]) -> str:
    """Advise after a step that diverges at every rate.

    Parameters
    ----------
    rows : sequence of RankRow
        Rank configuration of the last C step. Where a Θ is farther from W than zeros are, the penalty pulls W so far
        off that no rate helps: ±1 for weights of a hundredth, for example.

    Returns
    -------
    str
        What to change in the spec.
    """
    worst = max(rows, key=lambda row: row.relative_error, default=None)
    if worst is None or worst.relative_error <= 1:
        return "lower training.optimizer.lr, or leave it to the range test"
    return (
        f"the compressed weight of {worst.layer} is {worst.relative_error:.1f} times as far from the trained one as "
        "zeros are: give the layer terms that come nearer, such as a scheme whose values are learned (scaled_binary, "
        "codebook), more values or a higher rank"
    )
