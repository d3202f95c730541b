"""The one training loop: the L step and the training of the factored network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import SgdSpec
from worker.engine.data import Batch, Dataset, epoch_order
from worker.engine.forward import call, out_of_memory
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher

HALVINGS_MAX = 2  # out of memory halves the batch twice, with gradient accumulation, then fails


@dataclass(frozen=True)
class Penalty:
    """The pull (μ/2) Σ ‖W − A‖² of the L step, A being Θ + β/μ.

    Parameters
    ----------
    weights : sequence of Tensor
        Parameters W of the compressed layers.
    anchors : sequence of Tensor
        A, of the same shapes and dtypes.
    mu : float
        μ.
    """

    weights: Sequence[Tensor]
    anchors: Sequence[Tensor]
    mu: float

    def add_gradient(self) -> None:
        """Add μ(W − A) to the gradients in place.

        As +μW and −μA: without a temporary of the weights' size. What that rounds off is below eps·μ‖W‖, which at a
        learning rate of at most 1/μ is less than the update itself rounds off.
        """
        if not self.weights:
            return
        with torch.no_grad():
            for weight in self.weights:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            if gradients[0].is_cuda:
                torch._foreach_add_(gradients, list(self.weights), alpha=self.mu)
                torch._foreach_sub_(gradients, list(self.anchors), alpha=self.mu)
                return
            for gradient, weight, anchor in zip(gradients, self.weights, self.anchors, strict=True):
                gradient.add_(weight, alpha=self.mu).sub_(anchor, alpha=self.mu)  # while it is in the cache

    def value(self) -> float:
        """(μ/2) Σ ‖W − A‖²."""
        with torch.no_grad():
            return (
                0.5
                * self.mu
                * sum(float((w - a).square().sum()) for w, a in zip(self.weights, self.anchors, strict=True))
            )


@dataclass
class Trainer:
    """Trains one network on the train part of a dataset.

    Parameters
    ----------
    module : ScriptModule
        The network; its parameters are ordinary leaves.
    dataset : Dataset
        Parts and batches.
    objective : Objective
        What is minimised.
    teacher : Teacher or None
        The reference's outputs.
    spec : SgdSpec
        The optimiser.
    batch_size : int
        Samples of one update.
    seed : int
        Of the order of samples and of dropout.
    device : torch.device
        Where the network stands.
    """

    module: torch.jit.ScriptModule
    dataset: Dataset
    objective: Objective
    teacher: Teacher | None
    spec: SgdSpec
    batch_size: int
    seed: int
    device: torch.device
    micro_batch_size: int = field(init=False)

    def __post_init__(self) -> None:
        self.micro_batch_size = self._largest_batch

    @property
    def _largest_batch(self) -> int:
        return min(self.batch_size, self.dataset.size("train"))

    def optimizer(self, learning_rate: float) -> torch.optim.SGD:
        """Make a fresh optimiser over every trainable parameter."""
        return torch.optim.SGD(
            [parameter for parameter in self.module.parameters() if parameter.requires_grad],
            lr=learning_rate,
            momentum=self.spec.momentum,
            nesterov=self.spec.nesterov and self.spec.momentum > 0,
            weight_decay=self.spec.weight_decay,
        )

    def epoch(
        self,
        optimizer: torch.optim.Optimizer,
        place: Sequence[int],
        penalty: Penalty | None = None,
        *,
        updates_max: int | None = None,
        loss_limit: float = inf,
    ) -> float:
        """Train one epoch; return the mean loss, without the penalty.

        Order and dropout depend on the seed and on `place` (stage, step, epoch) alone, so a resumed run repeats the
        epoch bit for bit on the same CPU and thread count.

        Raises
        ------
        ProblemError
            ``DIVERGED`` when the loss is no longer finite or above `loss_limit`, ``OUT_OF_MEMORY`` when a quarter of
            the batch does not fit.
        """
        torch.manual_seed(int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0]))
        order = epoch_order(self.dataset.size("train"), self.seed, *place)
        self.module.train()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for update, start in enumerate(range(0, len(order), self.batch_size)):
            if update == updates_max:
                break
            positions = order[start : start + self.batch_size]
            if len(positions) == 1 and self.batch_size > 1 and update > 0:
                continue  # what is left over: batch norm cannot train on one sample
            loss = self._update(optimizer, positions, penalty)
            total += loss * len(positions)
            count += len(positions)
        mean = float(total) / max(count, 1)
        if not isfinite(mean) or not self._finite():
            raise ProblemError(
                ErrorCode.DIVERGED, "the training loss is no longer a number; lower training.optimizer.lr"
            )
        if mean > loss_limit:
            raise ProblemError(ErrorCode.DIVERGED, f"the training loss rose to {mean:.3g}; lower training.optimizer.lr")
        return mean

    def _finite(self) -> bool:
        """Whether every parameter is a number: the last update of an epoch shows in no loss."""
        with torch.no_grad():
            floating = [each.detach() for each in self.module.parameters() if each.is_floating_point()]
            largest = torch._foreach_norm(floating, float("inf"))
        return bool(torch.isfinite(torch.stack([each.to(torch.float64) for each in largest])).all())

    def _update(self, optimizer: torch.optim.Optimizer, positions: np.ndarray, penalty: Penalty | None) -> Tensor:
        """One update; runs out of memory at most twice before it gives up."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                loss = self._accumulate(self.dataset.rows("train", positions, self.device), positions)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error)
        if penalty is not None:
            penalty.add_gradient()
        optimizer.step()
        return loss

    def _accumulate(self, batch: Batch, positions: np.ndarray) -> Tensor:
        size = self.micro_batch_size
        if len(batch) <= size:
            return self._backward(batch, positions, share=1.0)
        total = torch.zeros((), device=self.device)
        for number, piece in enumerate(batch.pieces(size)):
            places = positions[number * size : number * size + size]
            total += self._backward(piece, places, share=len(piece) / len(batch))
        return total

    def _backward(self, piece: Batch, positions: np.ndarray, share: float) -> Tensor:
        """Add the gradient of a piece's share of the loss; returns that share."""
        wanted = self.teacher.outputs("train", positions, piece) if self.teacher is not None else None
        loss = self.objective.loss(call(self.module, piece.inputs), piece.targets, wanted)
        if share < 1:
            loss = loss * share
        if loss.requires_grad:
            torch.autograd.backward([loss])
        return loss.detach()

    def _halve(self, error: BaseException) -> None:
        if self.micro_batch_size <= max(self._largest_batch // 2**HALVINGS_MAX, 1):
            peak = ""
            if self.device.type == "cuda":
                peak = f"; the peak was {torch.cuda.max_memory_allocated(self.device)} bytes"
            raise ProblemError(
                ErrorCode.OUT_OF_MEMORY,
                f"a quarter of the batch of {self._largest_batch} does not fit in memory{peak}: {str(error)[:300]}. "
                "Lower training.batch_size",
            ) from None
        self.micro_batch_size = max(self.micro_batch_size // 2, 1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
