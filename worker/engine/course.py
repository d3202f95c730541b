"""Epochs under one optimiser, which can be left after any update and taken up again, bit for bit on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

import torch

from worker.engine.device import random_states
from worker.engine.observer import Saved
from worker.engine.training import Penalty, Place, Trainer


@dataclass
class Course:
    """A trainer, its optimiser, and where they stand.

    Parameters
    ----------
    trainer : Trainer
        The loop.
    optimizer : SGD
        Over the trainer's parameters; its momentum lives as long as the course.
    place : Place
        Epochs and updates that were made.
    """

    trainer: Trainer
    optimizer: torch.optim.SGD
    place: Place = field(default_factory=Place)

    @classmethod
    def begin(cls, trainer: Trainer, learning_rate: float) -> "Course":
        """Start with a fresh optimiser."""
        return cls(trainer, trainer.optimizer(learning_rate))

    @property
    def epochs_done(self) -> float:
        """Epochs that were made, the present one by its updates."""
        return self.place.epochs + self.place.updates / self.trainer.updates_per_epoch

    def set_rate(self, learning_rate: float) -> None:
        """Go on at another rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def epoch(
        self,
        stream: Sequence[int],
        penalty: Penalty | None = None,
        *,
        loss_limit: float = inf,
        after_update: Callable[[], None] | None = None,
    ) -> float:
        """Train the present epoch to its end; see `Trainer.epoch`, to whose stream the epoch's number is added."""
        return self.trainer.epoch(
            self.optimizer,
            (*stream, self.place.epochs),
            penalty,
            loss_limit=loss_limit,
            place=self.place,
            after_update=after_update,
        )

    def save(self) -> Saved:
        """Momentum, random states and place; the network itself is its owner's to save."""
        place = self.place
        tensors = {f"random.{name}": state for name, state in random_states(self.trainer.device).items()}
        for name, parameter in self._parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum.detach().cpu()
        state = {
            "epochs": place.epochs,
            "updates": place.updates,
            "samples": place.samples,
            "loss_sum": float(place.loss_sum),
            "loss": place.loss,
            "micro_batch_size": self.trainer.micro_batch_size,
            "scale": self.trainer.precision.save(),
        }
        return Saved(tensors, state)

    def load(self, saved: Saved) -> None:
        """Go on from what `save` made."""
        state = saved.state
        self.place = Place(
            state["epochs"],
            state["updates"],
            state["samples"],
            torch.tensor(state["loss_sum"], dtype=torch.float64),
            state["loss"],
            saved.under("random.").tensors,
        )
        self.trainer.micro_batch_size = state["micro_batch_size"]
        self.trainer.precision.load(state["scale"])
        momenta = saved.under("momentum.").tensors
        for name, parameter in self._parameters():
            if name in momenta:  # copied as the parameter is laid out, which is how PyTorch makes it
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(momenta[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def _parameters(self) -> list[tuple[str, torch.Tensor]]:
        names = [name for group in self.trainer.named_groups() for name, _ in group]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return list(zip(names, parameters, strict=True))
