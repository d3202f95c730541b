"""The one training loop: the L step and the training of the factored network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import Training
from worker.engine.augmentation import Augmenter, Moves
from worker.engine.data import Batch, Dataset, epoch_order
from worker.engine.decay import ProductDecay, factor_pairs
from worker.engine.device import restore_random_states
from worker.engine.forward import RAISED, call_nested, message_of, out_of_memory
from worker.engine.objective import Objective
from worker.engine.precision import Precision
from worker.engine.teacher import Teacher
from worker.engine.uncompiled import PlainSGD

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
class Place:
    """Where training under one optimiser stands.

    Parameters
    ----------
    epochs : int
        Complete ones.
    updates : int
        Made in the present epoch: the sampler's position.
    samples : int
        That these updates saw.
    loss_sum : Tensor
        Sum of their losses, each times its samples; a scalar, float64, on the trainer's device.
    loss : float
        Mean loss of the last complete epoch.
    random : mapping of str to Tensor
        Random states to go on from, where the present epoch is taken up in its middle.
    """

    epochs: int = 0
    updates: int = 0
    samples: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    loss: float = 0.0
    random: Mapping[str, Tensor] = field(default_factory=dict)

    def count(self, loss: Tensor, samples: int) -> None:
        """Count an update."""
        self.updates += 1
        self.samples += samples
        self.loss_sum += loss * samples

    def turn(self, loss: float) -> None:
        """Go on to the next epoch."""
        self.epochs += 1
        self.loss = loss
        self.updates = self.samples = 0
        self.loss_sum = torch.zeros_like(self.loss_sum)


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
    spec : Training
        Optimiser, batch size, augmentation and arithmetic.
    seed : int
        Of the order of samples, of dropout and of augmentation.
    device : torch.device
        Where the network stands.
    """

    module: torch.jit.ScriptModule
    dataset: Dataset
    objective: Objective
    teacher: Teacher | None
    spec: Training
    seed: int
    device: torch.device
    precision: Precision = field(init=False)
    micro_batch_size: int = field(init=False)
    updates_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.precision = Precision(self.spec, self.device)
        augmentation = self.spec.augmentation
        self._augmenter = None if augmentation is None else Augmenter(augmentation, self.dataset)
        self._moves: Moves | None = None  # of the present epoch
        self._decay = self._product_decay()
        self.micro_batch_size = self._largest_batch
        full, left = divmod(self.dataset.size("train"), self.batch_size)
        # A single sample that is left over makes no update: batch norm cannot train on it.
        self.updates_per_epoch = full + (left > 1 or (left == 1 and full == 0))

    @property
    def batch_size(self) -> int:
        """Samples of one update."""
        return self.spec.batch_size

    @property
    def _largest_batch(self) -> int:
        return min(self.batch_size, self.dataset.size("train"))

    def named_groups(self) -> list[list[tuple[str, Tensor]]]:
        """Trainable parameters as the optimiser's groups have them: factors under product decay are the last."""
        apart = {id(each) for pair in self._decay.pairs for each in pair} if self._decay is not None else set()
        named: list[tuple[str, Tensor]] = [each for each in self.module.named_parameters() if each[1].requires_grad]
        groups = [
            [each for each in named if id(each[1]) not in apart],
            [each for each in named if id(each[1]) in apart],
        ]
        return [group for group in groups if group]

    def optimizer(self, learning_rate: float) -> torch.optim.SGD:
        """Make a fresh optimiser over every trainable parameter."""
        spec, groups = self.spec.optimizer, [[each for _, each in group] for group in self.named_groups()]
        decays = [spec.weight_decay] * len(groups)
        if self._decay is not None:
            decays[-1] = 0.0
        return PlainSGD(
            [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)],
            lr=learning_rate,
            momentum=spec.momentum,
            nesterov=spec.nesterov and spec.momentum > 0,
        )

    def _product_decay(self) -> ProductDecay | None:
        spec = self.spec.optimizer
        if spec.weight_decay == 0 or spec.weight_decay_on == "factors":
            return None
        pairs = factor_pairs(self.module)
        return ProductDecay(pairs, spec.weight_decay) if pairs else None

    def epoch(
        self,
        optimizer: torch.optim.Optimizer,
        stream: Sequence[int],
        penalty: Penalty | None = None,
        *,
        updates_max: int | None = None,
        loss_limit: float = inf,
        place: Place | None = None,
        after_update: Callable[[], None] | None = None,
    ) -> float:
        """Train one epoch, or what `place` leaves of it; return its mean loss, without the penalty.

        Order, dropout and augmentation depend on the seed and on `stream` (stage, step, epoch) alone, so a resumed run
        repeats the epoch bit for bit on the same CPU and thread count. `place` follows every update, after which
        `after_update` is called, and stands at the next epoch when this one is over.

        Raises
        ------
        ProblemError
            ``DIVERGED`` when the loss is no longer finite or above `loss_limit`, ``OUT_OF_MEMORY`` when a quarter of
            the batch does not fit.
        """
        place = place if place is not None else Place()
        torch.manual_seed(int(np.random.SeedSequence([self.seed, *stream]).generate_state(1)[0]))
        if place.updates > 0:
            restore_random_states(place.random, self.device)
        order = epoch_order(self.dataset.size("train"), self.seed, *stream)
        self._moves = self._augmenter.moves((self.seed, *stream)) if self._augmenter is not None else None
        self.module.train()
        place.loss_sum = place.loss_sum.to(self.device)
        last = self.updates_per_epoch if updates_max is None else min(updates_max, self.updates_per_epoch)
        while place.updates < last:
            positions = order[place.updates * self.batch_size :][: self.batch_size]
            place.count(self._update(optimizer, positions, penalty), len(positions))
            if after_update is not None:
                after_update()
        mean = float(place.loss_sum) / max(place.samples, 1)
        if not isfinite(mean) or not self._finite():
            raise ProblemError(
                ErrorCode.DIVERGED, "the training loss is no longer a number; lower training.optimizer.lr"
            )
        if mean > loss_limit:
            raise ProblemError(ErrorCode.DIVERGED, f"the training loss rose to {mean:.3g}; lower training.optimizer.lr")
        place.turn(mean)
        return mean

    def _finite(self) -> bool:
        """Whether every parameter is a number: the last update of an epoch shows in no loss."""
        with torch.no_grad():
            numbers = [each.detach() for each in self.module.parameters() if each.numel() > 0]  # an export empties some
            floating = [each for each in numbers if each.is_floating_point()]
            largest = torch._foreach_norm(floating, float("inf"))
        return bool(torch.isfinite(torch.stack([each.to(torch.float64) for each in largest])).all())

    def _update(self, optimizer: torch.optim.Optimizer, positions: np.ndarray, penalty: Penalty | None) -> Tensor:
        """One update; runs out of memory at most twice before it gives up."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                loss = self._accumulate(self._batch(positions), positions)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._halve(error)
        self.precision.unscale(optimizer)
        for added in (penalty, self._decay):
            if added is not None:
                added.add_gradient()
        self.precision.step(optimizer)
        return loss

    def _batch(self, positions: np.ndarray) -> Batch:
        batch = self.dataset.rows("train", positions, self.device)
        if self._augmenter is not None and self._moves is not None:
            return self._augmenter.apply(batch, positions, self._moves)
        return batch

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
        inputs = self.precision.laid_out(piece.inputs)
        wanted = self._wanted(piece, positions, inputs)
        with self.precision.autocast():
            outputs = self.precision.widened(call_nested(self.module, inputs))
        loss = self.objective.batch_loss(outputs, piece, wanted)
        if share < 1:
            loss = loss * share
        if loss.requires_grad:
            self._differentiate(loss)
        return loss.detach()

    def _differentiate(self, loss: Tensor) -> None:
        try:
            self.precision.backward(loss)
        except RAISED as error:  # of a network that changes in place what its gradient needs, for one
            if out_of_memory(error):
                raise
            raise ProblemError(
                ErrorCode.MODEL_RAISED, f"the gradient of the network and its loss raised: {message_of(error)}"
            ) from None

    def _wanted(self, piece: Batch, positions: np.ndarray, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """What the reference answers: to augmented inputs now, else from what it keeps."""
        if self.teacher is None:
            return None
        if self._moves is not None:
            with self.precision.autocast():
                return self.precision.widened(self.teacher.answers(inputs))
        return self.teacher.outputs("train", positions, piece)

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
