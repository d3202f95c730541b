"""An objective that the user brings: a TorchScript module with a method `loss`, and perhaps one called `metric`.

``loss(outputs, batch)`` gets what the network's ``forward`` gives, in its own structure, and a ``Dict[str, Tensor]``
with the batch's inputs and targets under the names of their arrays; it gives a scalar. ``metric(outputs, batch)`` gives
a sum and a count, whose quotient over all of the data is the metric; ``higher_is_better`` is a bool, true unless said.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import ceil, isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.data import Batch, Dataset
from worker.engine.forward import RAISED, flatten, map_tensors, message_of, out_of_memory
from worker.engine.metrics import Metric, UnitScores
from worker.engine.network.load import load_script
from worker.engine.network.operators import reject_unsafe_operators
from worker.engine.objective import Objective

_BATCH_TYPE: Final = "Dict[str, Tensor]"
_BATCHES_MIN, _BATCH_SAMPLES_MAX = 32, 32  # of the part of the report, where a loss cannot be had of one sample
_ADVICE = "Mend the module, save it again with torch.jit.save(torch.jit.script(module), …), and upload that file"


class NotSeparableError(Exception):
    """The loss or metric of a single sample cannot be had; scores are of batches from here on."""


class ModuleObjective(Objective):
    """The loss of a module: (1 − d)·loss + d·(relative squared error to the reference's outputs).

    Scores are those of single samples: each is cut out of a batch's outputs, inputs and targets, and the module is
    called with a batch of one; of many samples, those of small groups. Where the outputs cannot be cut, or the module
    wants more than one sample, the units are batches of a few samples, each with a forward pass of its own.

    Parameters
    ----------
    spec : ObjectiveSpec
        With `distillation`, the weight d.
    module : ScriptModule
        From `load_objective`.
    dataset : Dataset
        Gives arrays their names.
    """

    def __init__(self, spec: ObjectiveSpec, module: torch.jit.ScriptModule, dataset: Dataset) -> None:
        # What is distilled is what is learned without targets.
        super().__init__(spec.model_copy(update={"loss": "distillation"}))
        self.spec = spec
        self.needs_teacher = spec.distillation > 0
        self._module = module
        self._names = (*dataset.input_names, *dataset.target_names)
        self._has_metric = "metric" in module._c._method_names()
        self.separable = True
        self.metric = (
            Metric("metric", higher_is_better=bool(getattr(module, "higher_is_better", True)))
            if self._has_metric
            else Metric("loss", higher_is_better=False)
        )

    @property
    def resolved(self) -> dict[str, Any]:
        """What the resolved spec says of it."""
        return {"loss": {"module": self.spec.module}, "metric": "auto"}

    def batch_loss(self, raw: Any, batch: Batch, teacher: Sequence[Tensor] | None) -> Tensor:
        """Mean over the batch of the whole objective; a scalar."""
        weight = self.spec.distillation if teacher is not None else 0.0
        parts = []
        if weight < 1:
            parts.append((1 - weight) * self._loss(raw, self._arrays(batch)))
        if weight > 0:
            parts.append(weight * self.loss(flatten(raw), (), teacher))
        return torch.stack([part.reshape(()) for part in parts]).sum() if len(parts) > 1 else parts[0]

    def batch_scores(self, raw: Any, batch: Batch, teacher: Sequence[Tensor] | None, unit: int) -> UnitScores:  # noqa: ARG002
        """Scores of the batch's units of `unit` samples, the last one perhaps of fewer.

        Raises
        ------
        NotSeparableError
            The module takes no such units; the next call scores the batch as one.
        """
        arrays, size = self._arrays(batch), len(batch)
        if unit >= size or not self.separable:
            return _joined([self._scores(raw, arrays, size)])
        try:
            return _joined([self._scores(*piece) for piece in _pieces(raw, arrays, size, unit)])
        except (ProblemError, NotSeparableError) as error:
            self.separable = False
            raise NotSeparableError from error

    def forward_size(self, most: int, samples: int) -> int:
        """Samples of one forward pass; of a unit, where units are batches."""
        if self.separable:
            return most
        return min(_BATCH_SAMPLES_MAX, max(2, samples // _BATCHES_MIN))

    def take(self, size: int, left: int) -> int:
        """Samples of the next forward pass: what is left over makes no small batch of its own."""
        return left if left < 2 * size else size

    def try_out(self, raw: Any, batch: Batch) -> None:
        """Try loss, gradient and metric on the reference's outputs for a batch.

        Raises
        ------
        ProblemError
            ``OBJECTIVE_INVALID`` or ``OBJECTIVE_RAISED``.
        """
        arrays = self._arrays(batch)
        self._check_types(raw)
        if self.needs_teacher and not any(output.is_floating_point() for output in flatten(raw)):
            raise _invalid("objective.distillation needs floating point outputs, and forward gives none; set it to 0")
        self._check_gradient(raw, arrays)
        with torch.no_grad(), suppress(NotSeparableError):  # what cannot be separated is known from here on
            self._scores(raw, arrays, len(batch))
            self.batch_scores(raw, batch, None, 1)

    def _arrays(self, batch: Batch) -> dict[str, Tensor]:
        return dict(zip(self._names, (*batch.inputs, *batch.targets), strict=True))

    def _loss(self, raw: Any, arrays: Mapping[str, Tensor]) -> Tensor:
        made: Tensor = self._call("loss", raw, arrays)
        if made.dim() != 0:
            raise _invalid(f"loss gave a tensor of shape {tuple(made.shape)}; expected a scalar: take its mean")
        if made.is_complex():
            raise _invalid(f"loss gave a number of dtype {made.dtype}; expected a real one")
        return made

    def _scores(self, raw: Any, arrays: Mapping[str, Tensor], size: int) -> tuple[float, float, float, float]:
        """Loss, sum and count of the metric, and samples of one unit."""
        loss = float(self._loss(raw, arrays))
        total, count = (loss * size, float(size)) if not self._has_metric else self._counted(raw, arrays)
        if not (isfinite(loss) and isfinite(total) and isfinite(count) and count >= 0):
            found = f"loss gave {loss:g} and metric {total:g} of {count:g} on {size} samples"
            raise _invalid(f"{found}; expected numbers, and a count that is not negative")
        return loss, total, count, float(size)

    def _counted(self, raw: Any, arrays: Mapping[str, Tensor]) -> tuple[float, float]:
        made = self._call("metric", raw, arrays)
        values = [value.double().sum() if isinstance(value, Tensor) else float(value) for value in made]
        return float(values[0]), float(values[1])

    def _call(self, method: str, raw: Any, arrays: Mapping[str, Tensor]) -> Any:
        given = {"outputs": flatten(raw)} | {f"batch['{name}']": (array,) for name, array in arrays.items()}
        versions = {name: [tensor._version for tensor in tensors] for name, tensors in given.items()}
        try:
            made = getattr(self._module, method)(raw, dict(arrays))
        except RAISED as error:
            raise _raised(method, raw, arrays, error) from None
        for name, tensors in given.items():
            if versions[name] != [tensor._version for tensor in tensors]:
                raise _invalid(f"{method} changes {name} in place; let it work on a clone()")
        return made

    def _check_types(self, raw: Any) -> None:
        given = torch._C._jit_try_infer_type(raw)
        for method in ("loss", "metric") if self._has_metric else ("loss",):
            takes = self._module._c._get_method(method).schema.arguments[1].type
            if given.success() and not given.type().isSubtypeOf(takes):
                raise _invalid(
                    f"{method} takes outputs of the type {takes.annotation_str}, and forward gives "
                    f"{given.type().annotation_str}; declare outputs as that"
                )

    def _check_gradient(self, raw: Any, arrays: Mapping[str, Tensor]) -> None:
        def tracked(output: Tensor) -> Tensor:
            return output.detach().clone().requires_grad_(output.is_floating_point() or output.is_complex())

        leaves = map_tensors(raw, tracked)
        with torch.enable_grad():
            loss = self._loss(leaves, arrays)
            found = float(loss.detach())
            if not isfinite(found):
                raise _invalid(f"loss is {found:g} on the reference's outputs of a few samples; expected a number")
            if not loss.requires_grad:
                raise _invalid(
                    "loss gives a number without a gradient with respect to outputs: nothing can be learned from it. "
                    "Use differentiable operators, and neither detach, item, argmax nor comparisons on the way to it"
                )
            try:
                torch.autograd.backward([loss])
            except RAISED as error:
                raise _raised("the gradient of loss", raw, arrays, error) from None
        gradients = [leaf.grad for leaf in flatten(leaves) if leaf.grad is not None]
        if not gradients:
            raise _invalid("loss has a gradient, but none with respect to outputs; compute it from them")
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise _invalid(
                "the gradient of loss on the reference's outputs is not finite; clamp what it divides by or takes the "
                "logarithm of"
            )


def load_objective(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load an objective's module, and refuse what is none; nothing of it runs.

    Raises
    ------
    ProblemError
        ``MODEL_CORRUPT`` or ``MODEL_REJECTED_UNSAFE`` as for a network, ``OBJECTIVE_INVALID`` for methods that are not
        those of an objective.
    """
    module = load_script(path, device)
    reject_unsafe_operators(module)
    methods = module._c._method_names()
    if "loss" not in methods:
        raise _invalid(
            f"the module has no method loss; found {', '.join(methods) or 'no method'}. Decorate it with "
            "@torch.jit.export: def loss(self, outputs: Tensor, batch: Dict[str, Tensor]) -> Tensor"
        )
    _check_signature(module, "loss", "Tensor")
    if "metric" in methods:
        _check_signature(module, "metric", "Tuple[Tensor, Tensor]")
    if not isinstance(getattr(module, "higher_is_better", True), bool):
        raise _invalid("higher_is_better is not a bool; set it to True or False")
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module.eval()


def _check_signature(module: torch.jit.ScriptModule, method: str, gives: str) -> None:
    schema = module._c._get_method(method).schema
    arguments = schema.arguments[1:]
    needed = [argument for argument in arguments if not argument.has_default_value()]
    found = f"{method}({', '.join(f'{a.name}: {a.type.annotation_str}' for a in arguments)})"
    if len(arguments) < 2 or len(needed) > 2 or arguments[1].type.annotation_str != _BATCH_TYPE:
        raise _invalid(f"expected {method}(outputs, batch: {_BATCH_TYPE}); found {found}")
    returned = schema.returns[0].type
    if not _fits(returned, method):
        raise _invalid(f"expected {method} to return {gives}; found {returned.annotation_str}")


def _fits(returned: Any, method: str) -> bool:
    if method == "loss":
        return bool(returned.kind() == "TensorType")
    numbers = {"TensorType", "IntType", "FloatType"}
    return returned.kind() == "TupleType" and [each.kind() in numbers for each in returned.elements()] == [True, True]


def _pieces(raw: Any, arrays: Mapping[str, Tensor], size: int, unit: int) -> list[tuple[Any, dict[str, Tensor], int]]:
    """Cut a batch into units, along the first axis of everything."""
    whole = [*flatten(raw), *arrays.values()]
    if any(tensor.dim() == 0 or tensor.shape[0] != size for tensor in whole):
        raise NotSeparableError
    made = []
    for index in range(ceil(size / unit)):
        rows = slice(index * unit, min(index * unit + unit, size))
        cut = map_tensors(raw, itemgetter(rows))
        made.append((cut, {name: array[rows] for name, array in arrays.items()}, rows.stop - rows.start))
    return made


def _joined(units: Sequence[tuple[float, float, float, float]]) -> UnitScores:
    losses, sums, counts, samples = torch.tensor(units, dtype=torch.float64).unbind(dim=1)
    return UnitScores(losses, sums, counts, samples)


def _raised(what: str, raw: Any, arrays: Mapping[str, Tensor], error: Exception) -> Exception:
    """What a module's own code raised, as a problem; running out of memory is left as it is."""
    if out_of_memory(error):
        return error
    shown = ", ".join(f"'{name}' {tuple(array.shape)}" for name, array in arrays.items())
    outputs = ", ".join(str(tuple(output.shape)) for output in flatten(raw))
    return ProblemError(
        ErrorCode.OBJECTIVE_RAISED,
        f"{what} raised for outputs {outputs} and batch {shown}: {message_of(error)}. {_ADVICE}",
    )


def _invalid(what: str) -> ProblemError:
    return ProblemError(ErrorCode.OBJECTIVE_INVALID, f"objective: {what}. {_ADVICE}")
