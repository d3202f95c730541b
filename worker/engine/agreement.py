"""How often two networks give the same answer: the largest output stands at the same place."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.report import PairedDifference
from worker.engine.data import Dataset
from worker.engine.evaluation import evaluate, paired_difference
from worker.engine.metrics import UnitScores, each_sample
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher


def same_answers(output: Tensor, reference: Tensor, class_dim: int) -> Tensor | None:
    """Share of positions whose largest output is the reference's, for each sample.

    Parameters
    ----------
    output, reference : Tensor
        ``(B, …)`` outputs of the two networks.
    class_dim : int
        Axis of the classes.

    Returns
    -------
    Tensor or None
        ``(B,)`` float64; None where the output has no such axis or only one class.
    """
    axis = class_dim + (output.dim() if class_dim < 0 else 0)
    if not 0 < axis < output.dim() or output.shape[axis] < 2 or not output.is_floating_point():
        return None
    same = output.argmax(dim=axis) == reference.argmax(dim=axis)
    return same.reshape(len(output), -1).double().mean(dim=1)


def agreement_difference(
    module: torch.jit.ScriptModule, dataset: Dataset, objective: Objective, teacher: Teacher, device: torch.device
) -> PairedDifference | None:
    """Agreement with the reference on the report part, less the reference's own, which is 1; None without classes."""
    scores = evaluate(module, dataset, "report", _Agreement(objective.spec), teacher, device).metrics
    if np.isnan(scores).any():
        return None
    found = paired_difference("agreement", scores, np.ones_like(scores))
    return found.model_copy(update={"high": min(found.high, 0.0)})  # no network agrees with another more than always


class _Agreement(Objective):
    """Scores the agreement in place of the error; NaN where the first output has no classes."""

    def scores(
        self,
        outputs: Sequence[Tensor],
        targets: Sequence[Tensor],  # noqa: ARG002  there are none
        teacher: Sequence[Tensor] | None,
    ) -> UnitScores:
        """Agreement of each sample, ``(B,)`` float64, twice."""
        assert teacher is not None  # noqa: S101  an objective without targets has one
        same = same_answers(outputs[0], teacher[0], self.spec.class_dim)
        if same is None:
            same = torch.full((len(outputs[0]),), float("nan"), dtype=torch.float64)
        return each_sample(same, same)
