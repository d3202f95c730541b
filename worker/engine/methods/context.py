"""What every method works with: the network, the data, the objective, the budget, and who listens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from service.contract.events import Progress
from service.contract.plan import RankRow
from service.contract.spec import JobSpec
from worker.engine.assembly import Recipe, assemble
from worker.engine.course import Course
from worker.engine.data import Dataset
from worker.engine.layer_rules import Decisions
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.observer import Observer, PulseKind, Saved
from worker.engine.selection.file_filling import Measure
from worker.engine.selection.network import Network
from worker.engine.teacher import Teacher
from worker.engine.training import Trainer
from worker.engine.widening import widen

TOLD_SECONDS = 1.0  # progress within an epoch is told about this often


@dataclass
class Context:
    """One job inside the engine.

    Parameters
    ----------
    source : Path
        The reference's file; every copy is loaded afresh from it.
    spec : JobSpec
        What to do.
    device : torch.device
        Where to compute.
    decisions : Decisions
        What the rules say of each layer.
    network : Network
        Problems and sizes.
    limit : int or None
        The budget in the network's metric.
    measure : callable or None
        Gives the size of the file that projections become, where that is worth its time: code counts.
    dataset, objective, teacher
        None without data.
    observer : Observer
        Who listens.
    saved : Saved or None
        Where an earlier attempt stood.
    resolved : dict
        The spec with its `auto` values replaced, as far as they are known.
    position : int
        Place in the run: optimiser updates made, those of repeated steps too, with one more for each C step, for the
        settling of the ranks and for the factored network's learning rate; it only ever grows.
    """

    source: Path
    spec: JobSpec
    device: torch.device
    decisions: Decisions
    network: Network
    limit: int | None
    dataset: Dataset | None
    objective: Objective | None
    teacher: Teacher | None
    observer: Observer
    saved: Saved | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    measure: Measure | None = None
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = 0 if self.saved is None else self.saved.state["position"]

    @property
    def epochs_of_steps(self) -> int:
        """Epochs before the factored network is trained."""
        return self.spec.method.epochs_of_steps(self.spec.training.epochs_per_step)

    def copy(self) -> torch.jit.ScriptModule:
        """Load a fresh copy of the reference on the device, ready to be trained."""
        return widen(load_model(self.source, self.device))

    def assemble(
        self,
        recipe: Recipe,
        thetas: Mapping[str, Sequence[Any]] | None = None,
        trained: Mapping[str, Tensor] | None = None,
    ) -> torch.jit.ScriptModule:
        """Make the factored network on the device, ready to be trained; see `worker.engine.assembly.assemble`."""
        return widen(assemble(self.source, recipe, self.device, thetas, trained))

    def trainer(self, module: torch.jit.ScriptModule) -> Trainer:
        """Make the training loop for a network of this job."""
        if self.dataset is None or self.objective is None:
            raise ValueError("there is no data to train on")
        return Trainer(
            module,
            self.dataset,
            self.objective,
            self.teacher,
            self.spec.training,
            self.spec.seed,
            self.device,
        )

    def resolve(self, path: str, value: Any) -> None:
        """Replace an `auto` of the resolved spec, at a dotted path, and tell."""
        *parents, last = path.split(".")
        place = self.resolved
        for name in parents:
            place = place[name]
        place[last] = value
        self.observer.resolved(self.resolved)

    def take_saved(self) -> Saved:
        """Hand out what an earlier attempt saved, once: as large as the network several times over, it is not kept.

        Raises
        ------
        ValueError
            When nothing was saved, or it was taken.
        """
        if self.saved is None:
            raise ValueError("there is no saved state")
        saved, self.saved = self.saved, None
        return saved

    def checkpoint(self, save: Callable[[], Saved], *, must: bool = False) -> None:
        """Save the run where it stands, unless that is not due; see `Observer.checkpoint`."""

        def placed() -> Saved:
            saved = save()
            return Saved(saved.tensors, {**saved.state, "position": self.position})

        self.observer.checkpoint(placed, self.position, must=must)

    def after_update(self, kind: PulseKind, course: Course, save: Callable[[], Saved]) -> None:
        """Count an optimiser's update, and save the run in the middle of its epoch where the observer asks for it."""
        self.position += 1
        if self.observer.pulse(kind, course.place.updates, course.trainer.updates_per_epoch):
            self.checkpoint(save, must=True)


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind.

    Parameters
    ----------
    recipe : list of dict
        What each compressed layer becomes.
    state : mapping of str to Tensor
        Parameters and buffers of the factored network.
    rows : list of RankRow
        The final choice for every layer of the model.
    notes : mapping
        Facts of the training for the report.
    """

    recipe: Recipe
    state: Mapping[str, Tensor]
    rows: list[RankRow]
    notes: dict[str, Any]


class Method(Protocol):
    """A published method, registered under ``rankpress.methods`` by the type of its spec."""

    def run(self, context: Context) -> Outcome:
        """Compress; checkpoint between steps."""


class ProgressMeter:
    """Progress in epochs of work, with the time left judged by this attempt's own speed.

    Parameters
    ----------
    observer : Observer
        Who is told.
    total_units, total_steps : int
        Epochs and steps of the whole run.
    done_units : float
        Epochs that earlier attempts made.
    """

    def __init__(self, observer: Observer, total_units: int, total_steps: int, done_units: float = 0.0) -> None:
        self._observer = observer
        self._total_units = max(total_units, 1)
        self._total_steps = total_steps
        self._began, self._began_at = monotonic(), done_units
        self._told = self._began
        self._last = Progress(total_steps=total_steps)

    def reach(self, step: int, units: float, *, loss: float | None = None, cost: float | None = None) -> None:
        """Tell that the run stands after so many epochs, within a step."""
        self._told = monotonic()
        made, left = units - self._began_at, self._total_units - units
        self._last = Progress(
            step=step,
            total_steps=self._total_steps,
            fraction=min(units / self._total_units, 1.0),
            eta_seconds=(self._told - self._began) / made * max(left, 0.0) if made > 0 else None,
            loss=loss if loss is not None else self._last.loss,
            cost=cost if cost is not None else self._last.cost,
        )
        self._observer.progress(self._last)

    def pass_by(self, step: int, units: float) -> None:
        """Tell it if nothing was told for a while; for calls that come fast."""
        if monotonic() - self._told >= TOLD_SECONDS:
            self.reach(step, units)
