"""Learning-Compression with additive low-rank terms (Idelbayev and Carreira-Perpiñán, DCC 2021; methods L.1–L.7).

min L(W) + λ C(r) subject to W = Σ Θₜ with rank Rₜ(Θₜ) = rₜ, by penalty or augmented Lagrangian over μ₁ < μ₂ < …:
an L step trains L(W) + (μ/2)‖W − Θ − β/μ‖², a C step projects W − β/μ onto the sums of low-rank matrices, and
β ← β − μ(W − Θ). Under a budget λ first meets a wider one; then that falls to the budget, and the units go that the
loss misses least. In the end the ranks are fixed and the factored network is trained.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind
from service.contract.spec import LearningCompressionSpec
from service.contract.states import Phase
from worker.engine.assembly import state_of
from worker.engine.course import Course
from worker.engine.csteps.additive import Projection
from worker.engine.forms.term import Accuracy
from worker.engine.methods.context import Context, Outcome, ProgressMeter
from worker.engine.methods.factored import Learned, finish
from worker.engine.methods.learning_rate import (
    loss_limit,
    mean_objective,
    probe_positions,
    range_test,
    step_rate,
    what_to_change,
)
from worker.engine.methods.loop import STAGE, Loop, LStep, restore_loop, save_loop, settings_of, weights_of
from worker.engine.rank_rows import changed, step_rows
from worker.engine.selection.network import composed, held_against, nothing_yet
from worker.engine.selection.shrinking import FALLS_FROM, FALLS_TO, LossOf, falling_limit, shrink
from worker.engine.selection.steering import pressure_for, project_all
from worker.engine.selection.units import at_ranks, fill
from worker.engine.training import Penalty

LEARNING_STREAM = 0x1C  # stream of the order of samples
PULL_FIRST = 0.35  # μ₁ · rate · updates of an L step / (1 − momentum): that of the published LeNet300 runs
TRIALS_SHARE = 0.1  # of an L step's work: what finding the units to drop may take, between the bounds below
TRIAL_SAMPLES = (512, 8192)
RETRIES_MAX = 3  # an L step that diverges is repeated at half the rate
DIRECT_MU = 1.0  # one C step without training; only λ/μ matters
SENSIBLE_ENERGY = 0.5  # under a given λ, μ₁ is at least where half of the spectrum's energy is worth its price


class LearningCompression:
    """The method `learning_compression`."""

    def run(self, context: Context) -> Outcome:
        """Compress; without data, by one C step on the reference (direct compression)."""
        if context.dataset is None:
            return self._direct(context)
        method, epochs = settings_of(context), context.epochs_of_steps
        tuning = context.spec.fine_tune.resolved_epochs(epochs)
        context.observer.phase(Phase.LEARNING)
        saved = context.saved
        stage = saved.state["stage"] if saved is not None else None
        done = float(saved.state["done_epochs"]) if saved is not None else 0.0
        if stage not in {None, STAGE}:
            return finish(
                context, None, ProgressMeter(context.observer, epochs + tuning, method.mu.steps, done), tuning
            )
        loop = restore_loop(context) if stage == STAGE else _begin(context)
        meter = ProgressMeter(context.observer, epochs + tuning, method.mu.steps, done)
        while loop.step < method.mu.steps and not loop.settled:
            _step(context, loop, meter)
            context.checkpoint(partial(save_loop, context, loop))
        targets, mu = _last_targets(context, loop), _mu(context, loop, loop.step - 1)
        made = loop.projections
        if loop.step < method.mu.steps:  # what ended early has made no exact step yet
            made = at_ranks(context.network, targets, made, [each.ranks for each in made], mu)
        learned = Learned(loop.module, targets, made, loop.step, mu)
        return finish(context, learned, meter, tuning)

    def _direct(self, context: Context) -> Outcome:
        context.observer.phase(Phase.LEARNING)
        module = context.copy()
        weights = weights_of(context, module)
        limit, pressure = context.limit, _pressure_given(context, DIRECT_MU)
        made = _steered(context, weights, pressure, DIRECT_MU, Accuracy.EXACT, limit)[1]
        rows = step_rows(1, context.network.problems, _norms(weights), made)
        context.observer.ranks(rows)
        meter = ProgressMeter(context.observer, 1, 1)
        targets = [weight.detach() for weight in weights]
        outcome = finish(context, Learned(module, targets, made, 1, DIRECT_MU), meter, 0)
        meter.reach(1, 1)
        return outcome


def _begin(context: Context) -> Loop:
    """Start from the reference; Θ is its direct compression, or 0 in the literal mode."""
    module = context.copy()
    weights = weights_of(context, module)
    mu_given = settings_of(context).mu.initial
    guess = 1.0 if mu_given == "auto" else mu_given
    wide = None if context.limit is None else falling_limit(context.limit, context.network.dense_size, 0.0)
    pressure, made = _steered(context, weights, _pressure_given(context, guess), guess, Accuracy.SINGLE, wide)
    rate = context.spec.training.optimizer.lr
    if rate == "auto":
        rate = range_test(lambda: context.trainer(_projected_copy(context, made)))
        context.resolve("training.optimizer.lr", rate)
    mu_first = _mu_first(context, weights, rate) if mu_given == "auto" else mu_given
    context.resolve("method.mu.initial", mu_first)
    if context.limit is None:
        pressure = _pressure_given(context, mu_first) or 0.0
        made = project_all(context.network, weights, pressure, None, None, mu=mu_first, accuracy=Accuracy.SINGLE)
    if _literal(settings_of(context)):
        made = [
            Projection(tuple(thetas), float(w.detach().double().square().sum()), 0.0, 0)
            for thetas, w in zip(nothing_yet(context.network, weights), weights, strict=True)
        ]
    multipliers = [torch.zeros_like(weight) for weight in weights]
    loop = Loop(module, weights, multipliers, made, pressure, mu_first, rate, loss_limit(context.trainer(module)))
    tested = "auto" in {mu_given, context.spec.training.optimizer.lr}
    context.checkpoint(partial(save_loop, context, loop), must=tested)  # a test is not made twice
    return loop


def _step(context: Context, loop: Loop, meter: ProgressMeter) -> None:
    """One L step, one C step, and the multipliers; `loop.pressure` is 2λ/μ of the step."""
    mu = _mu(context, loop, loop.step)
    if loop.l_step is None:
        if loop.step > 0:  # λ stays, μ grew
            loop.pressure *= _mu(context, loop, loop.step - 1) / mu
        loop.l_step = LStep(state_of(loop.module))
    loss, penalty = _l_step(context, loop, loop.l_step, mu, meter)
    targets = [_target(loop, index, mu) for index in range(len(loop.weights))]
    loop.projections, pressure = _c_step(context, loop, targets, mu)
    distance = _update_multipliers(context, loop, mu)
    loop.l_step = None
    size = context.network.size(loop.projections)
    loop.settled = _settled(context, loop, distance, size)
    held = held_against(context.network, loop.weights, loop.projections)
    rows = step_rows(loop.step + 1, context.network.problems, _norms(loop.weights), held)
    context.observer.ranks(changed(rows, loop.rows))
    loop.rows = rows
    fraction = size / context.network.dense_size
    context.observer.event(
        EventKind.STEP,
        {
            "step": loop.step + 1,
            "total_steps": settings_of(context).mu.steps,
            "mu": mu,
            "lambda": pressure * mu / 2,
            "loss": loss,
            "penalty": penalty,
            "distance": distance,
            "cost": size,
            "cost_fraction": fraction,
            "sweeps": max((made.sweeps for made in loop.projections), default=0),
            "settled": loop.settled,
        },
    )
    loop.step += 1
    context.position += 1
    meter.reach(loop.step, loop.done_epochs(context), loss=loss, cost=fraction)


def _l_step(context: Context, loop: Loop, l_step: LStep, mu: float, meter: ProgressMeter) -> tuple[float, float]:
    """Train L(W) + (μ/2)‖W − Θ − β/μ‖²; a step that diverges is repeated from its start at half the rate."""
    save, steps = partial(save_loop, context, loop), settings_of(context).mu.steps
    while l_step.repeats <= RETRIES_MAX:
        penalty = _penalty(context, loop, mu)
        training, initial = context.spec.training, loop.rate * loop.rate_scale
        course = l_step.take_up(Course.begin(context.trainer(loop.module), initial))
        try:
            while (epoch := course.place.epochs) < training.epochs_per_step:
                course.set_rate(
                    step_rate(initial, loop.step, steps, mu, training.schedule, epoch, training.epochs_per_step)
                )
                _epoch(context, loop, course, penalty, meter)
                context.checkpoint(save)
        except ProblemError as error:
            if error.code != ErrorCode.DIVERGED:
                raise
            l_step.start_over(loop.module)
            loop.rate_scale *= 0.5
            meter.reach(loop.step, loop.done_epochs(context))
            message = f"step {loop.step + 1} diverged; it is repeated at half the learning rate"
            context.observer.event(EventKind.WARNING, {"code": "L_STEP_DIVERGED", "message": message})
            continue
        return course.place.loss, penalty.value()
    raise ProblemError(
        ErrorCode.DIVERGED,
        f"step {loop.step + 1} diverges even at a learning rate of {loop.rate * loop.rate_scale:.3g}; "
        + what_to_change(loop.rows),
    )


def _epoch(context: Context, loop: Loop, course: Course, penalty: Penalty, meter: ProgressMeter) -> None:
    save = partial(save_loop, context, loop)

    def after_update() -> None:
        meter.pass_by(loop.step, loop.done_epochs(context))
        context.after_update("l_step", course, save)

    course.epoch((LEARNING_STREAM, loop.step), penalty, loss_limit=loop.loss_limit, after_update=after_update)
    meter.reach(loop.step, loop.done_epochs(context), loss=course.place.loss)


def _c_step(context: Context, loop: Loop, targets: Sequence[Tensor], mu: float) -> tuple[list[Projection], float]:
    """Project; under a budget λ is that which meets a wider one, and later units go as it falls (`shrinking`).

    Also returns the pressure of this projection. Under a budget the alternation runs until it stalls, whatever the
    spec's number of sweeps.
    """
    method, network = settings_of(context), context.network

    def after_layer(done: int, total: int) -> None:  # nothing of the loop has changed yet since its L step
        if context.observer.pulse("c_step", done, total):
            context.checkpoint(partial(save_loop, context, loop), must=True)

    sweeps = method.c_step.sweeps if method.c_step.sweeps != "auto" else None
    share = (loop.step + 1) / method.mu.steps
    # The last step decides the ranks and factors that are emitted; a literal step is what the slides say.
    last = loop.step + 1 == method.mu.steps
    accuracy = Accuracy.EXACT if last or sweeps is not None else Accuracy.WARM
    pressure, thetas = loop.pressure, loop.thetas()
    if context.limit is None:
        made = project_all(network, targets, pressure, thetas, sweeps, after_layer, mu=mu, accuracy=accuracy)
        return made, pressure
    limit = falling_limit(context.limit, network.dense_size, share)
    if share > FALLS_FROM:
        loss_of = _trial_loss(context, loop)
        made = shrink(
            network,
            targets,
            loop.projections,
            limit,
            loss_of,
            pressure=pressure,
            mu=mu,
            accuracy=accuracy,
            after_layer=after_layer,
        )
        if network.size(made) <= limit:
            return fill(network, targets, made, limit, mu=mu, accuracy=accuracy) if last else made, pressure
    loop.pressure, made = pressure_for(
        network,
        targets,
        limit,
        start=max(pressure, 1e-30),
        warm=thetas,
        after_layer=after_layer,
        mu=mu,
        accuracy=Accuracy.WARM,
    )
    return fill(network, targets, made, limit, mu=mu, accuracy=accuracy), loop.pressure


def _trial_loss(context: Context, loop: Loop) -> LossOf:
    """Objective on some training samples with one layer's W changed; W is given back."""
    trainer = context.trainer(loop.module)
    trials = sum(len(problem.choices) for problem in context.network.problems) + 1
    work = 3 * trainer.dataset.size("train") * context.spec.training.epochs_per_step  # in forward passes of a sample
    low, high = TRIAL_SAMPLES
    positions = probe_positions(trainer, min(max(int(TRIALS_SHARE * work / trials), low), high), (loop.step,))

    def loss_of(index: int, change: Tensor | None) -> float:
        weight = loop.weights[index]
        before = weight.detach().clone()
        with torch.no_grad():
            if change is not None:
                weight.add_(change.to(weight.dtype))
            loss = mean_objective(trainer, positions)
            weight.copy_(before)
        return loss

    return loss_of


def _update_multipliers(context: Context, loop: Loop, mu: float) -> float:
    """β ← β − μ(W − Θ) where multipliers are used; returns Σ ‖W − Θ‖² over the compressed layers."""
    distance = 0.0
    with torch.no_grad():
        for index, (problem, made) in enumerate(zip(context.network.problems, loop.projections, strict=True)):
            if made.dense:
                loop.multipliers[index].zero_()
                continue
            weight = loop.weights[index]
            difference = weight - composed(problem, made.factors).to(weight.dtype)
            distance += float(difference.square().sum())
            if settings_of(context).multipliers:
                loop.multipliers[index].sub_(difference, alpha=mu)
    return distance


def _settled(context: Context, loop: Loop, distance: float, size: int) -> bool:
    """Count the step, and say whether the loop may end before its last one; see `Stability`.

    Under a budget steps count from where it has fallen to its end.
    """
    if context.limit is not None:
        share = (loop.step + 1) / settings_of(context).mu.steps
        if share <= FALLS_TO or size > context.limit:
            return False
    units = [theta.units for made in loop.projections for theta in made.factors]
    loop.stability.count([*units, *(int(made.dense) for made in loop.projections)])
    pairs = zip(_norms(loop.weights), loop.projections, strict=True)
    norm = sum(norm for norm, made in pairs if not made.dense)
    return loop.stability.reached(context.spec.training.early_stop, distance, norm)


def _penalty(context: Context, loop: Loop, mu: float) -> Penalty:
    """Pull of every compressed layer towards Θ + β/μ; a layer that is dense by now is free."""
    weights, anchors = [], []
    for index, (problem, made) in enumerate(zip(context.network.problems, loop.projections, strict=True)):
        if made.dense:
            continue
        weight = loop.weights[index]
        weights.append(weight)
        anchors.append(composed(problem, made.factors).to(weight.dtype) + loop.multipliers[index] / mu)
    return Penalty(weights, anchors, mu)


def _steered(
    context: Context,
    weights: Sequence[Tensor],
    pressure: float | None,
    mu: float,
    accuracy: Accuracy,
    limit: int | None,
) -> tuple[float, list[Projection]]:
    """Ranks on a spectrum: within a limit where there is one, else at the given pressure."""
    if limit is None:
        given = pressure if pressure is not None else 0.0
        return given, project_all(context.network, weights, given, None, None, mu=mu, accuracy=accuracy)
    found, made = pressure_for(context.network, weights, limit, mu=mu, accuracy=Accuracy.SINGLE)
    return found, fill(context.network, weights, made, limit, mu=mu, accuracy=accuracy)


def _mu_first(context: Context, weights: Sequence[Tensor], rate: float) -> float:
    """μ₁ = where one L step's pull is that of the published runs, and under a given λ where ranks are sensible."""
    assert context.dataset is not None  # noqa: S101  run() made sure
    training = context.spec.training
    updates = -(-context.dataset.size("train") // training.batch_size) * training.epochs_per_step
    mu = PULL_FIRST * (1 - training.optimizer.momentum) / (updates * rate)
    given = settings_of(context).lambda_
    if given is None:
        return mu
    total = sum(_norms(weights))
    for _ in range(60):  # doubling spans 18 orders of magnitude
        made = project_all(context.network, weights, 2 * given / mu, None, None, mu=mu, accuracy=Accuracy.SINGLE)
        if total - sum(0.0 if each.dense else each.error for each in made) >= SENSIBLE_ENERGY * total:
            break
        mu *= 2
    return mu


def _projected_copy(context: Context, made: Sequence[Projection]) -> torch.jit.ScriptModule:
    """Make a copy of the reference with W = Θ: where there is a loss to win back, rates can be told apart."""
    module = context.copy()
    with torch.no_grad():
        for problem, weight, projection in zip(
            context.network.problems, weights_of(context, module), made, strict=True
        ):
            if not projection.dense:
                weight.copy_(composed(problem, projection.factors))
    return module


def _norms(weights: Sequence[Tensor]) -> list[float]:
    return [float(weight.detach().to(torch.float64).square().sum()) for weight in weights]


def _target(loop: Loop, index: int, mu: float) -> Tensor:
    """W − β/μ, which the C step projects."""
    return loop.weights[index].detach() - loop.multipliers[index] / mu


def _last_targets(context: Context, loop: Loop) -> list[Tensor]:
    """What the last C step projected: W − β/μ with β as it was before its update, which is Θ − β/μ with β after it."""
    mu = _mu(context, loop, loop.step - 1)
    return [
        weight.detach()
        if made.dense or not settings_of(context).multipliers
        else composed(problem, made.factors).to(weight.dtype) - multiplier / mu
        for problem, weight, made, multiplier in zip(
            context.network.problems, loop.weights, loop.projections, loop.multipliers, strict=True
        )
    ]


def _mu(context: Context, loop: Loop, step: int) -> float:
    return loop.mu_first * settings_of(context).mu.growth_factor ** max(step, 0)


def _pressure_given(context: Context, mu: float) -> float | None:
    given = settings_of(context).lambda_
    return None if given is None else 2 * given / mu


def _literal(method: LearningCompressionSpec) -> bool:
    """Whether the spec asks for the slides' pseudocode: a fixed number of sweeps and no multipliers."""
    return method.c_step.sweeps != "auto" and not method.multipliers
