"""What every method works with: the network, the data, the objective, the budget, and who listens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from service.contract.events import Progress
from service.contract.plan import RankRow
from service.contract.spec import JobSpec
from worker.engine.assembly import Recipe
from worker.engine.data import Dataset
from worker.engine.layer_rules import Decisions
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.observer import Observer, Saved
from worker.engine.selection.steering import Network
from worker.engine.teacher import Teacher
from worker.engine.training import Trainer


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
    dataset, objective, teacher
        None without data.
    observer : Observer
        Who listens.
    saved : Saved or None
        Where an earlier attempt stood.
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

    def copy(self) -> torch.jit.ScriptModule:
        """Load a fresh copy of the reference on the device."""
        return load_model(self.source, self.device)

    def trainer(self, module: torch.jit.ScriptModule) -> Trainer:
        """Make the training loop for a network of this job."""
        if self.dataset is None or self.objective is None:
            raise ValueError("there is no data to train on")
        return Trainer(
            module,
            self.dataset,
            self.objective,
            self.teacher,
            self.spec.training.optimizer,
            self.spec.training.batch_size,
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
    """Progress in epochs of work, with the time left judged by this attempt's own speed."""

    def __init__(self, observer: Observer, total_units: int, total_steps: int, done_units: int = 0) -> None:
        self._observer = observer
        self._total_units = max(total_units, 1)
        self._total_steps = total_steps
        self._done = done_units
        self._began, self._began_at = monotonic(), done_units
        self._last = Progress(total_steps=total_steps)

    def advance(self, step: int, units: int, *, loss: float | None = None, cost: float | None = None) -> None:
        """Tell that `units` more epochs are done, within a step."""
        self._done += units
        elapsed = monotonic() - self._began
        made = self._done - self._began_at
        left = self._total_units - self._done
        self._last = Progress(
            step=step,
            total_steps=self._total_steps,
            fraction=min(self._done / self._total_units, 1.0),
            eta_seconds=elapsed / made * max(left, 0) if made > 0 else None,
            loss=loss if loss is not None else self._last.loss,
            cost=cost if cost is not None else self._last.cost,
        )
        self._observer.progress(self._last)
