"""Scores that choose between iterates, and batch-norm statistics that are kept where they score better."""

import torch

from worker.engine.assembly import load_state
from worker.engine.batch_norm import reestimate, statistics_of
from worker.engine.evaluation import evaluate
from worker.engine.methods.context import Context


def select_score(context: Context, module: torch.jit.ScriptModule) -> float:
    """Mean objective on the select part."""
    assert context.dataset is not None  # noqa: S101
    assert context.objective is not None  # noqa: S101
    return evaluate(module, context.dataset, "select", context.objective, context.teacher, context.device).objective


def with_better_statistics(context: Context, module: torch.jit.ScriptModule, score: float | None = None) -> float:
    """Re-estimate batch-norm statistics where the spec asks for it; they stay if the select part's score falls.

    Running averages lag behind weights that have just been replaced. Whether fresh ones are better is a question of the
    data, so the data are asked.

    Parameters
    ----------
    context : Context
        The job.
    module : ScriptModule
        The network, changed in place or left as it is.
    score : float, optional
        Its score as it is; found out where it is not given.

    Returns
    -------
    float
        The score of what the network is now.
    """
    spec = context.spec.training
    score = select_score(context, module) if score is None else score
    kept = statistics_of(module) if spec.batch_norm == "reestimate" else {}
    if not kept or context.dataset is None:
        return score
    if not reestimate(module, context.dataset, spec.batch_size, context.device, context.spec.seed):
        return score
    fresh = select_score(context, module)
    if fresh < score:
        return fresh
    load_state(module, kept)
    return score
