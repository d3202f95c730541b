"""The last part of every low-rank method: ranks are settled, and the factored network is trained (methods L.7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.numbers import Auto
from service.contract.states import Phase
from worker.engine.assembly import (
    Recipe,
    live,
    live_state,
    load_state,
    make_recipe,
    state_in_place,
    state_of,
)
from worker.engine.course import Course
from worker.engine.csteps.additive import Projection, project
from worker.engine.layer_problem import UNITS
from worker.engine.layer_rules import size_metric
from worker.engine.methods.context import Context, Outcome, ProgressMeter
from worker.engine.methods.held_out import are_remembered
from worker.engine.methods.learning_rate import range_test, tuning_rate
from worker.engine.methods.scoring import select_score, with_better_statistics
from worker.engine.observer import Saved
from worker.engine.rank_rows import final_rows
from worker.engine.selection.file_filling import fill_file
from worker.engine.selection.network import held_against, settle_dense
from worker.engine.selection.steering import PROHIBITIVE, pressure_for
from worker.engine.selection.units import fill
from worker.engine.training import Trainer

STAGE = "fine_tune"
FINE_TUNE_STREAM = 0xF1


@dataclass(frozen=True)
class Learned:
    """What the steps before leave: W of the network, the C step's targets and results, steps made, and their last μ."""

    module: torch.jit.ScriptModule
    targets: Sequence[Tensor]
    projections: Sequence[Projection]
    step: int
    mu: float


@dataclass
class Tuning:
    """State of the factored network's training.

    Parameters
    ----------
    recipe : list of dict
        What each compressed layer became.
    projections, norms
        Θ and ‖W‖² of each layer that could be compressed.
    step : int
        Steps that were made before.
    module : ScriptModule
        The factored network.
    best, best_score, best_epoch
        The best iterate on the select part; that before the first epoch has no score until `rate` is known.
    epoch : int
        Epochs that were made and scored.
    rate : float or None
        The learning rate; None until it is tested for.
    course : Course or None
        The training.
    saved : Saved or None
        A course that a checkpoint holds, until it is taken up.
    """

    recipe: Recipe
    projections: list[Projection]
    norms: list[float]
    step: int
    module: torch.jit.ScriptModule
    best: Mapping[str, Tensor]
    best_score: float
    best_epoch: int = 0
    epoch: int = 0
    rate: float | None = None
    course: Course | None = None
    saved: Saved | None = None


def finish(context: Context, learned: Learned | None, meter: ProgressMeter, epochs: int) -> Outcome:
    """Settle the ranks within the budget, build the factored network, train it, and return its best iterate.

    Parameters
    ----------
    context : Context
        The job.
    learned : Learned or None
        What was learned; None to take up a checkpoint of this stage.
    meter : ProgressMeter
        Counts epochs.
    epochs : int
        Epochs of training; 0 leaves Θ as it is.

    Raises
    ------
    ProblemError
        ``CONSTRAINT_UNREACHABLE`` when no layer became cheaper.
    """
    tuning = _restore(context) if learned is None else _build(context, learned)
    final_step = tuning.step + 1  # behind the last C step, whose rows stay
    rows = final_rows(final_step, context.decisions, tuning.norms, tuning.projections)
    context.observer.ranks(rows)
    if context.dataset is not None and epochs > 0:
        context.observer.phase(Phase.FINE_TUNING)
        if learned is not None:
            context.checkpoint(partial(_save, context, tuning))
        _train(context, tuning, meter, epochs)
    if context.dataset is not None:
        _refresh(context, tuning)
    notes: dict[str, Any] = {
        "fine_tune_epochs": tuning.epoch,
        "fine_tune_best_epoch": tuning.best_epoch,
        "fine_tune_learning_rate": tuning.rate or 0.0,
    }
    return Outcome(tuning.recipe, tuning.best, rows, notes)


def _build(context: Context, learned: Learned) -> Tuning:
    module = learned.module
    made = _settle(context, learned)
    names = [problem.layer.name for problem in context.network.problems]
    thetas = {name: projection.factors for name, projection in zip(names, made, strict=True)}
    recipe = make_recipe(context.network.problems, made)
    if not recipe:
        raise ProblemError(
            ErrorCode.CONSTRAINT_UNREACHABLE,
            f"no layer is worth compressing under this spec: every one stays dense, at {context.network.dense_size} "
            f"{UNITS[size_metric(context.spec)]}; the smallest size that can be reached is "
            f"{context.network.least_size}. "
            + ("Lower the budget" if context.limit is not None else "Raise method.lambda, or lower the ranks"),
        )
    kept = state_of(module)
    network = context.assemble(recipe, thetas, kept)
    load_state(network, kept)
    parameters = dict(module.named_parameters())
    weights = [parameters[str(problem.layer.weight)].detach() for problem in context.network.problems]
    made = held_against(context.network, weights, made)
    norms = [float(weight.double().square().sum()) for weight in weights]
    state = live_state(network, recipe)
    context.position += 1
    return Tuning(recipe, made, norms, learned.step, network, state, float("inf"))


def _settle(context: Context, learned: Learned) -> list[Projection]:
    """Final ranks: at least the least total, within the budget, nothing that costs as much as dense."""
    network, targets, mu = context.network, learned.targets, learned.mu
    made = []
    for problem, target, projection in zip(network.problems, targets, learned.projections, strict=True):
        if projection.dense or sum(projection.ranks) >= problem.rank_total_low:
            made.append(projection)
            continue
        kept = [
            replace(choice, rank_low=theta.units) if choice.term.settled(theta).graded else choice
            for choice, theta in zip(problem.choices, projection.factors, strict=True)
        ]
        made.append(project(target, kept, PROHIBITIVE, mu=mu, rank_total_low=problem.rank_total_low))
    settled = settle_dense(network, made)
    if context.limit is None:
        return settled
    freed = network.size(settled) < network.size(made)
    made = fill(network, targets, settled, context.limit, mu=mu) if freed else settled
    if network.size(made) > context.limit:
        _, made = pressure_for(network, targets, context.limit, warm=[each.factors for each in made], mu=mu)
        made = settle_dense(network, fill(network, targets, made, context.limit, mu=mu))
    size = network.size(made)
    if context.measure is not None:
        made, size = fill_file(network, targets, made, context.limit, context.measure, mu=mu)
    if size > context.limit:
        raise ProblemError(
            ErrorCode.CONSTRAINT_UNREACHABLE,
            f"the smallest size reached is {size} {UNITS[size_metric(context.spec)]} of at most {context.limit}",
        )
    return made


def _train(context: Context, tuning: Tuning, meter: ProgressMeter, epochs: int) -> None:
    """Train by the schedule to its end; keep the best iterate on the select part.

    Waiting for a better iterate says nothing while the rate is high: Θ begins near the reference's own score, the first
    epochs lose it, and the end of a cosine gains it back (`docs/method.md` has figures).
    """
    save = partial(_save, context, tuning)
    rate = _begin(context, tuning) if tuning.rate is None else tuning.rate
    course = tuning.course = Course.begin(context.trainer(tuning.module), rate)
    if tuning.saved is not None:
        course.load(tuning.saved)
        tuning.saved = None
    done = context.epochs_of_steps

    def after_update() -> None:
        meter.pass_by(context.spec.method.step_count, done + course.epochs_done)
        context.after_update("fine_tune", course, save)

    while tuning.epoch < epochs:
        course.set_rate(tuning_rate(rate, context.spec.fine_tune.schedule, tuning.epoch, epochs))
        try:
            course.epoch((FINE_TUNE_STREAM,), after_update=after_update)
        except ProblemError as error:
            if error.code != ErrorCode.DIVERGED:
                raise
            message = "the training of the factored network diverged; its best iterate before is kept"
            context.observer.event(EventKind.WARNING, {"code": "FINE_TUNE_DIVERGED", "message": message})
            break
        _score(context, tuning, course.place.loss)
        meter.reach(context.spec.method.step_count, done + tuning.epoch, loss=course.place.loss)
        context.checkpoint(save)


def _begin(context: Context, tuning: Tuning) -> float:
    """Score the network as it was settled, and find its learning rate."""
    tuning.best_score = with_better_statistics(context, tuning.module)
    tuning.best = live_state(tuning.module, tuning.recipe)
    if context.spec.fine_tune.keep == "auto":
        context.resolve("fine_tune.keep", "last" if are_remembered(context) else "best")
    tuning.rate = _rate(context, tuning)
    context.position += 1
    tested = _rate_given(context) == "auto"
    context.checkpoint(partial(_save, context, tuning), must=tested)  # a test is not made twice
    return tuning.rate


def _score(context: Context, tuning: Tuning, loss: float) -> None:
    """Score the epoch that was made, and keep its iterate if it is the best, or the last where that is asked for."""
    tuning.epoch += 1
    score = select_score(context, tuning.module)
    if score < tuning.best_score or context.resolved["fine_tune"]["keep"] == "last":
        tuning.best = live_state(tuning.module, tuning.recipe)
        tuning.best_score, tuning.best_epoch = score, tuning.epoch
    context.observer.event(
        EventKind.METRIC, {"name": "objective", "part": "select", "value": score, "epoch": tuning.epoch, "loss": loss}
    )


def _refresh(context: Context, tuning: Tuning) -> None:
    """Go back to the best iterate, and give it fresh batch-norm statistics if they are better."""
    if context.spec.training.batch_norm == "keep":
        return
    load_state(tuning.module, tuning.best)
    known = tuning.best_score if tuning.rate is not None else None  # without training there was nothing to score
    if with_better_statistics(context, tuning.module, known) != known:
        tuning.best = live_state(tuning.module, tuning.recipe)


def _rate_given(context: Context) -> float | Auto:
    tuning, learning = context.spec.fine_tune.lr, context.spec.training.optimizer.lr
    return tuning if tuning != "auto" else learning


def _rate(context: Context, tuning: Tuning) -> float:
    """Learning rate of the factored network: the spec's, or a range test of its own."""
    given = _rate_given(context)
    if given != "auto":
        return given
    state = live_state(tuning.module, tuning.recipe)

    def fresh() -> Trainer:
        copy = context.assemble(tuning.recipe)
        load_state(copy, state)
        return context.trainer(copy)

    return range_test(fresh)


def _save(context: Context, tuning: Tuning) -> Saved:
    tensors = {f"best.{name}": tensor for name, tensor in tuning.best.items()}
    for name, tensor in live(state_in_place(tuning.module), tuning.recipe).items():
        tensors[f"network.{name}"] = tensor
    done = context.epochs_of_steps
    state: dict[str, Any] = {
        "stage": STAGE,
        "step": tuning.step,
        "done_epochs": done + (tuning.course.epochs_done if tuning.course is not None else 0.0),
        "epoch": tuning.epoch,
        "best_epoch": tuning.best_epoch,
        "best_score": tuning.best_score,
        "rate": tuning.rate,
        "norms": tuning.norms,
        "recipe": tuning.recipe,
        "projections": [
            {
                "thetas": [theta.facts() for theta in made.factors],
                "error": made.error,
                "objective": made.objective,
                "dense": made.dense,
            }
            for made in tuning.projections
        ],
        "resolved": context.resolved,
        "course": None,
    }
    if tuning.course is not None:
        course = tuning.course.save()
        tensors |= course.named("course.")
        state["course"] = course.state
    return Saved(tensors, state)


def _restore(context: Context) -> Tuning:
    saved = context.take_saved()
    state = saved.state
    module = context.assemble(state["recipe"])
    load_state(module, saved.under("network.").tensors)
    projections = []
    for problem, kept in zip(context.network.problems, state["projections"], strict=True):
        thetas = tuple(
            choice.term.restore({}, facts) for choice, facts in zip(problem.choices, kept["thetas"], strict=True)
        )
        projections.append(Projection(thetas, kept["error"], kept["objective"], 0, kept["dense"]))
    context.resolved.update({**state["resolved"], "device": context.device.type})
    context.observer.resolved(context.resolved)
    course = None if state["course"] is None else Saved(saved.under("course.").tensors, state["course"])
    return Tuning(
        state["recipe"],
        projections,
        state["norms"],
        state["step"],
        module,
        saved.under("best.").tensors,
        state["best_score"],
        state["best_epoch"],
        state["epoch"],
        state["rate"],
        saved=course,
    )
