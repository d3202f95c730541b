"""State of the LC loop, between two steps and inside of one, and how it is saved and taken up again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from service.contract.plan import RankRow
from service.contract.spec import LearningCompressionSpec
from worker.engine.assembly import load_state, state_in_place
from worker.engine.course import Course
from worker.engine.csteps.additive import Projection
from worker.engine.methods.context import Context
from worker.engine.methods.early_stop import Stability
from worker.engine.observer import Saved

STAGE = "learning"


@dataclass
class LStep:
    """An L step under way.

    Parameters
    ----------
    start : mapping of str to Tensor
        The network as the step began: what diverges is repeated from there.
    repeats : int
        How often that has happened in this step.
    course : Course or None
        Its training.
    saved : Saved or None
        A course that a checkpoint holds, until it is taken up.
    """

    start: Mapping[str, Tensor]
    repeats: int = 0
    course: Course | None = None
    saved: Saved | None = None

    def take_up(self, course: Course) -> Course:
        """Train on by a fresh course, which goes on from a saved one where there is one."""
        if self.saved is not None:
            course.load(self.saved)
            self.saved = None
        self.course = course
        return course

    def start_over(self, module: torch.jit.ScriptModule) -> None:
        """Set the network back to where the step began."""
        load_state(module, self.start)
        self.course = None
        self.repeats += 1


@dataclass
class Loop:
    """State of the LC loop.

    Parameters
    ----------
    module : ScriptModule
        The network, and in it `weights`, the W of the compressed layers.
    multipliers, projections
        β and Θ of each of them.
    pressure : float
        2λ/μ of the present step, or of the last one where none is under way.
    mu_first, rate, loss_limit : float
        μ₁, the learning rate, and the loss above which a step counts as diverged.
    step : int
        Complete steps.
    rate_scale : float
        What is left of the rate after steps that diverged.
    rows : list of RankRow
        Rank configuration of the last C step.
    l_step : LStep or None
        The L step that is under way, or over with its C step still to be made.
    stability : Stability
        How long the ranks have not changed.
    settled : bool
        Whether the loop ends here, before its last step.
    """

    module: torch.jit.ScriptModule
    weights: list[Tensor]
    multipliers: list[Tensor]
    projections: list[Projection]
    pressure: float
    mu_first: float
    rate: float
    loss_limit: float = inf
    step: int = 0
    rate_scale: float = 1.0
    rows: list[RankRow] = field(default_factory=list)
    l_step: LStep | None = None
    stability: Stability = field(default_factory=Stability)
    settled: bool = False

    def thetas(self) -> list[tuple[Any, ...]]:
        """Θ of each layer."""
        return [made.factors for made in self.projections]

    def done_epochs(self, context: Context) -> float:
        """Epochs of L steps that were made."""
        course = self.l_step.course if self.l_step is not None else None
        begun = course.epochs_done if course is not None else 0.0
        return self.step * context.spec.training.epochs_per_step + begun


def settings_of(context: Context) -> LearningCompressionSpec:
    """Read the method's own part of the spec."""
    assert isinstance(context.spec.method, LearningCompressionSpec)  # noqa: S101  registered for this spec
    return context.spec.method


def weights_of(context: Context, module: torch.jit.ScriptModule) -> list[Tensor]:
    """Parameters W of the compressed layers; they are trained whether the user's file says so or not."""
    parameters = dict(module.named_parameters())
    found: list[Tensor] = [parameters[str(problem.layer.weight)] for problem in context.network.problems]
    for weight in found:
        weight.requires_grad_(True)
    return found


def save_loop(context: Context, loop: Loop) -> Saved:
    """Everything that the loop goes on from; tensors on the CPU are not copied."""
    tensors = {f"network.{name}": tensor for name, tensor in state_in_place(loop.module).items()}
    for index, (multiplier, made) in enumerate(zip(loop.multipliers, loop.projections, strict=True)):
        tensors[f"multiplier.{index}"] = multiplier.cpu()
        for place, theta in enumerate(made.factors):
            for name, tensor in theta.tensors().items():
                tensors[f"theta.{index}.{place}.{name}"] = tensor.cpu().contiguous()
    state: dict[str, Any] = {
        "stage": STAGE,
        "step": loop.step,
        "done_epochs": loop.done_epochs(context),
        "pressure": loop.pressure,
        "mu_first": loop.mu_first,
        "rate": loop.rate,
        "rate_scale": loop.rate_scale,
        "loss_limit": loop.loss_limit,
        "projections": [
            {
                "thetas": [theta.facts() for theta in made.factors],
                "error": made.error,
                "objective": made.objective,
                "sweeps": made.sweeps,
                "dense": made.dense,
            }
            for made in loop.projections
        ],
        "rows": [row.model_dump(mode="json") for row in loop.rows],
        "l_step": None,
        "stability": {"ranks": loop.stability.ranks, "steps": loop.stability.steps},
        "settled": loop.settled,
    }
    if loop.l_step is not None and loop.l_step.course is not None:
        course = loop.l_step.course.save()
        state["l_step"] = {"repeats": loop.l_step.repeats, "course": course.state}
        if loop.l_step.course.place.epochs < context.spec.training.epochs_per_step:
            tensors |= course.named("course.")
            tensors |= {f"start.{name}": tensor for name, tensor in loop.l_step.start.items()}
    return Saved(tensors, state)


def restore_loop(context: Context) -> Loop:
    """Take up where a checkpoint stood, inside of an L step if that is where; what was saved becomes the loop's own."""
    saved = context.take_saved()
    state = saved.state
    module = context.copy()
    load_state(module, saved.under("network.").tensors)
    projections, multipliers = [], []
    for index, (problem, kept) in enumerate(zip(context.network.problems, state["projections"], strict=True)):
        multipliers.append(saved.tensors[f"multiplier.{index}"].to(context.device))
        thetas = []
        for place, (choice, facts) in enumerate(zip(problem.choices, kept["thetas"], strict=True)):
            held = saved.under(f"theta.{index}.{place}.").tensors
            thetas.append(
                choice.term.restore({name: tensor.to(context.device) for name, tensor in held.items()}, facts)
            )
        projections.append(Projection(tuple(thetas), kept["error"], kept["objective"], kept["sweeps"], kept["dense"]))
    context.resolve("training.optimizer.lr", state["rate"])
    context.resolve("method.mu.initial", state["mu_first"])
    return Loop(
        module,
        weights_of(context, module),
        multipliers,
        projections,
        state["pressure"],
        state["mu_first"],
        state["rate"],
        state["loss_limit"],
        state["step"],
        state["rate_scale"],
        [RankRow.model_validate(row) for row in state["rows"]],
        _restore_l_step(saved),
        Stability(**state["stability"]),
        state["settled"],
    )


def _restore_l_step(saved: Saved) -> LStep | None:
    kept = saved.state["l_step"]
    if kept is None:
        return None
    course = Saved(saved.under("course.").tensors, kept["course"])
    return LStep(saved.under("start.").tensors, kept["repeats"], saved=course)
