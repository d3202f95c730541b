"""What a method tells of its run, and how it saves itself; the runner relays it, tests and benchmarks listen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from service.contract.events import EventKind, Progress
from service.contract.plan import LayerFacts, RankRow


@dataclass(frozen=True)
class Saved:
    """A resumable state: tensors, and a JSON object."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Observer(Protocol):
    """Receives what happens."""

    def phase(self, phase: str) -> None:
        """Enter a phase."""

    def layers(self, facts: Sequence[LayerFacts]) -> None:
        """Tell the layers of the reference, once."""

    def ranks(self, rows: Sequence[RankRow]) -> None:
        """Tell the rank configurations that changed."""

    def resolved(self, spec: Mapping[str, Any]) -> None:
        """Tell the spec with further `auto` values replaced."""

    def progress(self, progress: Progress) -> None:
        """Tell how far the run is."""

    def event(self, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Add a line to the job's history."""

    def checkpoint(self, saved: Saved, step: int, *, must: bool = False) -> None:
        """Save a resumable state; one that comes too soon after the last may be left out unless it must be kept."""


@dataclass
class Recorder:
    """An observer that keeps everything in memory."""

    phases: list[str] = field(default_factory=list)
    facts: list[LayerFacts] = field(default_factory=list)
    rank_rows: list[RankRow] = field(default_factory=list)
    specs: list[Mapping[str, Any]] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)
    events: list[tuple[EventKind, Mapping[str, Any]]] = field(default_factory=list)
    checkpoints: list[Saved] = field(default_factory=list)

    def phase(self, phase: str) -> None:
        """Keep it."""
        self.phases.append(phase)

    def layers(self, facts: Sequence[LayerFacts]) -> None:
        """Keep them."""
        self.facts = list(facts)

    def ranks(self, rows: Sequence[RankRow]) -> None:
        """Keep them."""
        self.rank_rows.extend(rows)

    def resolved(self, spec: Mapping[str, Any]) -> None:
        """Keep it."""
        self.specs.append(spec)

    def progress(self, progress: Progress) -> None:
        """Keep it."""
        self.progresses.append(progress)

    def event(self, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Keep it."""
        self.events.append((kind, data))

    def checkpoint(self, saved: Saved, step: int, *, must: bool = False) -> None:  # noqa: ARG002
        """Keep a copy."""
        self.checkpoints.append(Saved({k: v.detach().clone() for k, v in saved.tensors.items()}, dict(saved.state)))
