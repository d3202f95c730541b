"""What training minimises: the task's loss, distillation from the reference's outputs, or both."""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.errors import ErrorCode, ProblemError
from service.contract.objective_spec import METRICS_OF_LOSS
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.data import Batch, Dataset
from worker.engine.forward import flatten
from worker.engine.metrics import TOP, Metric, UnitScores, class_scores, each_sample, metric_of, square_scores

Loss = Literal["cross_entropy", "mse", "distillation"]
_CHECK_ROWS = 65536


class Objective:
    """Loss of a batch, and the scores of each sample.

    With targets: (1 − d)·task + d·T²·KL(reference ‖ network) for classes, (1 − d)·MSE + d·MSE to the reference for
    numbers (Hinton et al. 2015; methods L.7). Without targets: the squared error to the reference's outputs, relative
    to their mean square.

    Parameters
    ----------
    spec : ObjectiveSpec
        Weights and dimensions; `loss` resolved.
    positions : sequence of int, optional
        Which output each target array belongs to; by default the first outputs, in order.
    """

    def __init__(self, spec: ObjectiveSpec, positions: Sequence[int] | None = None) -> None:
        if spec.loss == "auto" or spec.module is not None:
            raise ValueError("the loss must be resolved first")
        self.loss_name = cast("Loss", spec.loss)
        self.spec = spec
        self._positions = positions
        self._some_left_out = True  # until `check` has seen that no target is `ignore_index`
        self.needs_teacher = spec.distillation > 0 or spec.loss == "distillation"
        self.metric: Metric = metric_of(spec)
        self._peak = spec.peak

    @property
    def resolved(self) -> dict[str, Any]:
        """What the resolved spec says of it."""
        known = self.metric.name in METRICS_OF_LOSS[self.loss_name]
        return {"loss": self.loss_name, "metric": self.metric.name if known else "auto"}

    def batch_loss(self, raw: Any, batch: Batch, teacher: Sequence[Tensor] | None) -> Tensor:
        """Mean over the batch of the whole objective; a scalar.

        Parameters
        ----------
        raw : Any
            What `forward` gave, in its own structure.
        batch : Batch
            Inputs and targets.
        teacher : sequence of Tensor or None
            The reference's outputs, flat.
        """
        return self.loss(flatten(raw), batch.targets, teacher)

    def batch_scores(self, raw: Any, batch: Batch, teacher: Sequence[Tensor] | None, unit: int) -> UnitScores:  # noqa: ARG002
        """Scores of the batch's units of `unit` samples, the last one perhaps of fewer; here of each sample."""
        return self.scores(flatten(raw), batch.targets, teacher)

    def forward_size(self, most: int, samples: int) -> int:  # noqa: ARG002
        """Samples of one forward pass where a part with so many is scored."""
        return most

    def take(self, size: int, left: int) -> int:
        """Samples of the next forward pass of at most `size`, where `left` are to be scored."""
        return min(size, left)

    def loss(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], teacher: Sequence[Tensor] | None) -> Tensor:
        """Mean over the batch of the whole objective; a scalar."""
        if self.loss_name == "distillation":
            return torch.stack([error.mean() for error in _relative_errors(outputs, teacher)]).sum()
        weight = self.spec.distillation if teacher is not None else 0.0
        parts: list[Tensor] = []
        for index, target in enumerate(targets):
            place = self._place(index)
            if weight < 1:
                parts.append((1 - weight) * self._task(outputs[place], target))
            if weight > 0 and teacher is not None:
                parts.append(weight * self._distilled(outputs[place], teacher[place]))
        return reduce(add, parts)

    def scores(
        self, outputs: Sequence[Tensor], targets: Sequence[Tensor], teacher: Sequence[Tensor] | None
    ) -> UnitScores:
        """Task loss and metric of each sample; one that `ignore_index` leaves out altogether has a loss of NaN.

        With several targets losses add up, and metrics are their mean.
        """
        if self.loss_name == "distillation":
            errors = torch.stack(_relative_errors(outputs, teacher)).mean(dim=0)
            return each_sample(errors, errors)
        made = [self._target_scores(outputs[self._place(index)], target) for index, target in enumerate(targets)]
        losses, metrics, counts = (torch.stack(each) for each in zip(*made, strict=True))
        return each_sample(losses.sum(dim=0), metrics.mean(dim=0), counts.mean(dim=0))

    def _target_scores(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.loss_name == "cross_entropy":
            return class_scores(output, target, self.spec, self.metric)
        return square_scores(output, target, self._peak or 1.0, self.metric)

    def check(self, outputs: Sequence[Tensor], dataset: Dataset) -> None:
        """Hold the outputs of a first forward against the targets of the whole dataset.

        Raises
        ------
        ProblemError
            ``INPUT_SHAPE_MISMATCH`` when shapes do not fit, ``DATASET_INVALID`` when a class is out of range.
        """
        matched = self.loss_name == "distillation"
        if not matched and len(outputs) < len(dataset.target_names):
            raise ProblemError(
                ErrorCode.INPUT_SHAPE_MISMATCH,
                f"the dataset has {len(dataset.target_names)} target arrays and forward gives {len(outputs)} outputs",
            )
        scored = outputs if matched else [outputs[self._place(index)] for index in range(len(dataset.target_names))]
        floating = [output.is_floating_point() for output in scored]
        if not (any(floating) if matched else all(floating)):
            raise ProblemError(
                ErrorCode.MODEL_UNSUPPORTED, "forward returns whole numbers; expected floating point outputs"
            )
        if matched:
            return
        self._some_left_out = False
        if self.metric.name == "psnr" and self._peak is None:
            self._peak = _range(dataset.part("train").targets)
        for part in ("train", "select", "report"):
            for index, array in enumerate(dataset.part(part).targets):
                self._check_target(dataset.target_names[index], outputs[self._place(index)], array)

    def _place(self, index: int) -> int:
        return index if self._positions is None else self._positions[index]

    def _check_target(self, name: str, output: Tensor, array: np.ndarray) -> None:
        if self.loss_name == "mse":
            if output.shape[1:].numel() != int(np.prod(array.shape[1:], dtype=np.int64)):
                raise _misfit(name, output, array.shape, "the same shape (classes must be stored as integers)")
            return
        class_dim = self.spec.class_dim + (output.dim() if self.spec.class_dim < 0 else 0)
        if not 0 < class_dim < output.dim():
            raise ProblemError(
                ErrorCode.INPUT_SHAPE_MISMATCH,
                f"objective.class_dim is {self.spec.class_dim} but the output is {tuple(output.shape)}; expected "
                "one of its axes after the first, which counts samples",
            )
        classes = output.shape[class_dim]
        if self.metric.name == "top5" and classes <= TOP:
            raise ProblemError(
                ErrorCode.SPEC_INVALID,
                f"objective.metric is 'top5' and the network has {classes} classes, so every answer would be right; "
                "use 'accuracy'",
            )
        expected = [size for axis, size in enumerate(output.shape) if axis != class_dim][1:]
        if list(array.shape[1:]) != expected:
            raise _misfit(name, output, array.shape, f"one class for each position: rows of shape {tuple(expected)}")
        for start in range(0, len(array), _CHECK_ROWS):
            block = np.asarray(array[start : start + _CHECK_ROWS])
            left_out = block == self.spec.ignore_index
            self._some_left_out = self._some_left_out or bool(left_out.any())
            wrong = ((block < 0) | (block >= classes)) & ~left_out
            if wrong.any():
                raise ProblemError(
                    ErrorCode.DATASET_INVALID,
                    f"array '{name}' holds class {block[wrong].flat[0]}; the network has {classes} classes, so "
                    f"expected 0 to {classes - 1}, or {self.spec.ignore_index} to leave a sample out",
                )

    def _task(self, output: Tensor, target: Tensor) -> Tensor:
        if self.loss_name == "mse":
            return functional.mse_loss(output, target.reshape(output.shape).to(output.dtype))
        logits = output.movedim(self.spec.class_dim, 1)
        if self._some_left_out and not bool((target != self.spec.ignore_index).any()):
            return logits.sum() * 0.0  # the mean over no position is NaN, and such a batch teaches nothing
        return functional.cross_entropy(logits, target, ignore_index=self.spec.ignore_index)

    def _distilled(self, output: Tensor, teacher: Tensor) -> Tensor:
        if self.loss_name == "mse":
            return functional.mse_loss(output, teacher)
        temperature = self.spec.temperature
        axis = self.spec.class_dim
        student = functional.log_softmax(output / temperature, dim=axis)
        wanted = functional.log_softmax(teacher / temperature, dim=axis)
        divergence = functional.kl_div(student, wanted, reduction="sum", log_target=True)
        return divergence * (temperature**2 * output.shape[axis] / output.numel())


def resolve_loss(spec: ObjectiveSpec, dataset: Dataset | None) -> Loss:
    """Resolve `auto`: whole-number targets mean classes, floating-point targets numbers, none distillation."""
    if spec.loss == "distillation" or dataset is None:
        return "distillation"
    if not dataset.has_targets:
        if spec.loss != "auto":
            raise ProblemError(
                ErrorCode.DATASET_INVALID,
                f"objective.loss is {spec.loss} but the dataset has no '{dataset.spec.targets}'",
            )
        return "distillation"
    whole = all(array.dtype.kind in "iub" for array in dataset.part("train").targets)
    if spec.loss == "auto":
        return "cross_entropy" if whole else "mse"
    if spec.loss == "cross_entropy" and not whole:
        raise ProblemError(
            ErrorCode.DATASET_INVALID, "objective.loss is cross_entropy but the targets are not whole numbers (classes)"
        )
    return cast("Loss", spec.loss)


def pair_targets(target_names: Sequence[str], prefix: str, output_names: Sequence[str]) -> list[int] | None:
    """Match arrays ``targets.NAME`` with the outputs of a dict or tuple; None where targets have no such names.

    Raises
    ------
    ProblemError
        ``INPUT_SHAPE_MISMATCH`` when a name is none of the outputs'.
    """
    suffixes = [name.removeprefix(f"{prefix}.") for name in target_names if name.startswith(f"{prefix}.")]
    if not suffixes:
        return None
    unknown = [suffix for suffix in suffixes if suffix not in output_names]
    if unknown:
        raise ProblemError(
            ErrorCode.INPUT_SHAPE_MISMATCH,
            f"target arrays {', '.join(f'{prefix}.{name}' for name in unknown)} name no output of forward; its outputs "
            f"are {', '.join(output_names) or 'one tensor'}",
        )
    return [list(output_names).index(suffix) for suffix in suffixes]


def _relative_errors(outputs: Sequence[Tensor], reference: Sequence[Tensor] | None) -> list[Tensor]:
    assert reference is not None  # noqa: S101  needs_teacher says so
    pairs = zip(outputs, reference, strict=True)
    return [_relative_error(output, wanted) for output, wanted in pairs if output.is_floating_point()]


def _relative_error(output: Tensor, reference: Tensor) -> Tensor:
    """Squared error of each sample over the mean square of the batch's reference outputs; ``(B,)``."""
    axes = list(range(1, output.dim()))
    square = (output - reference).square()
    per_sample = square.mean(dim=axes) if axes else square
    return per_sample / reference.square().mean().clamp_min(torch.finfo(reference.dtype).tiny)


def _range(arrays: Sequence[np.ndarray]) -> float:
    """Largest less smallest value of some arrays, block by block."""
    blocks = [array[at : at + _CHECK_ROWS] for array in arrays for at in range(0, len(array), _CHECK_ROWS)]
    width = max(float(np.max(block)) for block in blocks) - min(float(np.min(block)) for block in blocks)
    if not width > 0:
        raise ProblemError(
            ErrorCode.DATASET_INVALID,
            "objective.metric is 'psnr' and all targets have one value, so there is no range; give objective.peak",
        )
    return width


def _misfit(name: str, output: Tensor, shape: Sequence[int], expected: str) -> ProblemError:
    return ProblemError(
        ErrorCode.INPUT_SHAPE_MISMATCH,
        f"array '{name}' has shape {tuple(shape)}, the network's output {tuple(output.shape)}; expected {expected}",
    )
