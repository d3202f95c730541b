"""Whether held-out rows are new to the reference, or ones that it was trained on.

Rows that are held out of the training data are mostly of the latter kind. The reference remembers them, and so does
what stays near it: there an iterate that was hardly trained looks better than one that generalises better.
"""

import numpy as np
import torch

from worker.engine.data import PartName, epoch_order
from worker.engine.evaluation import evaluate
from worker.engine.methods.context import Context

ROWS_MAX = 4096  # of each part that are compared
STREAM = 0xFA
ONE_SIDED_Z = 1.96


def are_remembered(context: Context) -> bool:
    """Whether the reference's task loss on the select part is no higher than on what is trained on.

    A network that has seen one sample and not the other has the lower loss on the former (Yeom et al. 2018, loss
    threshold membership inference); here the means of two sets of rows are compared, by Welch's statistic. Without
    evidence that the rows are new they count as remembered. Without targets there is nothing to remember.

    Parameters
    ----------
    context : Context
        The job; it has data.
    """
    assert context.objective is not None  # noqa: S101
    if context.objective.loss_name == "distillation":
        return False
    reference = context.copy() if context.teacher is None else context.teacher.module
    held, trained = _losses(context, reference, "select"), _losses(context, reference, "train")
    if min(len(held), len(trained)) < 2:
        return True
    spread = held.var(ddof=1) / len(held) + trained.var(ddof=1) / len(trained)
    return bool(held.mean() - trained.mean() <= ONE_SIDED_Z * np.sqrt(spread))


def _losses(context: Context, reference: torch.jit.ScriptModule, part: PartName) -> np.ndarray:
    """The reference's losses of the samples, or of groups of them, of some rows; ``(n,)`` float64."""
    assert context.dataset is not None  # noqa: S101
    assert context.objective is not None  # noqa: S101
    size = context.dataset.size(part)
    rows = np.sort(epoch_order(size, context.spec.seed, STREAM)[:ROWS_MAX])
    # Without a teacher: only the task's loss is asked for, and the reference would answer twice.
    return evaluate(reference, context.dataset, part, context.objective, None, context.device, rows).losses
