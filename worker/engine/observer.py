"""What a method tells of its run, and how it saves itself; the runner relays it, tests and benchmarks listen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from service.contract.events import EventKind, Progress
from service.contract.plan import LayerFacts, RankRow

PulseKind = Literal["l_step", "c_step", "fine_tune"]


@dataclass(frozen=True)
class Saved:
    """A resumable state: tensors, and a JSON object.

    The tensors may be those that are trained, not copies: they are to be written or copied before the run goes on.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def under(self, prefix: str) -> "Saved":
        """Return the tensors whose names begin so, without the prefix, and the whole state."""
        chosen = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return Saved(chosen, self.state)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors with a prefix before their names."""
        return {prefix + name: tensor for name, tensor in self.tensors.items()}


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

    def pulse(self, kind: PulseKind, done: int, total: int) -> bool:
        """Hear that piece `done` of `total` (an update of an epoch, a layer of a C step) is over.

        Returns whether the run must be saved here and now: too much of it would be lost, or the process is to leave.
        """

    def checkpoint(self, save: Callable[[], Saved], position: int, *, must: bool = False) -> None:
        """Save a resumable state, which `save` makes; unless it `must` be kept, one soon after the last is left out.

        Parameters
        ----------
        save : callable
            Called only if the state is kept.
        position : int
            Place in the run; it grows with everything that is worth saving.
        must : bool
            Keep it however recent the last one is, unless that one has the same position.
        """


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
    positions: list[int] = field(default_factory=list)

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

    def pulse(self, kind: PulseKind, done: int, total: int) -> bool:  # noqa: ARG002
        """Ask for nothing."""
        return False

    def checkpoint(self, save: Callable[[], Saved], position: int, *, must: bool = False) -> None:  # noqa: ARG002
        """Keep a copy."""
        saved = save()
        self.checkpoints.append(Saved({k: v.detach().clone() for k, v in saved.tensors.items()}, dict(saved.state)))
        self.positions.append(position)
