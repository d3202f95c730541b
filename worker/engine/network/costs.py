"""What a model costs: one forward of a sample gives every layer's shapes and multiply-adds, and the total."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from service.contract.errors import ErrorCode, ProblemError
from service.contract.plan import ReasonCode
from worker.engine.forward import out_of_memory
from worker.engine.network.graphs import Graph, Node, Value, constant_before
from worker.engine.network.layers import Inventory, Layer, take_inventory
from worker.engine.network.load import reload, trim_reason
from worker.engine.network.operator_sites import Site, key_of
from worker.engine.network.parameters import Shape, all_parameters, count_distinct
from worker.engine.network.recurrent_kernels import RECURRENT_KERNELS
from worker.engine.network.sites import open_plain, scan_methods

# A slice of everything, written with an end that no honest program uses, leaves its tensor as it is and shows up in
# the dispatcher with the number of the layer and whether the layer begins or ends.
_MARK = 2**63 - 1 - 1_000_003
_RAISED = (torch.jit.Error, RuntimeError, ValueError, TypeError, LookupError, AssertionError)
_SHAPE_COMPLAINTS = re.compile(
    r"shapes cannot be multiplied|to have \d+ channels|expected [\w\[\]/ ()]*\dD|Expected (at most|at least)|"
    r"missing value for argument|must match the size of tensor|is invalid for input of size|expected scalar type|"
    r"have the same dtype|Kernel size can't be greater|Output size is too small|Expected value of type|"
    r"expected a value of type|Unknown keyword argument|normalized_shape|should be the same",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Census:
    """What one forward of one sample showed.

    Attributes
    ----------
    layers : list of Layer
        Every layer, with the shapes of each call and its MACs.
    total_macs : int
        Multiply-adds of all operators, as `count_macs` counts them.
    total_params : int
        numel over all parameters; one that is shared counts once.
    output : object
        The structure of the output: {"type": "tensor", "shape": [...], "dtype": ...}, and lists and maps of such.
    parameters : list of Layer
        Every floating parameter of at least two axes as a layer of kind "parameter", whatever reads it; `owner` names
        the layer that counts it. MACs are the owner's where the parameter is its weight, else 0.
    """

    layers: list[Layer]
    total_macs: int
    total_params: int
    output: dict[str, Any] = field(default_factory=dict)
    parameters: list[Layer] = field(default_factory=list)


def take_census(module: torch.jit.ScriptModule, example_inputs: Sequence[torch.Tensor]) -> Census:
    """Run one sample through a copy of the model and count what each layer did.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model; it is neither run nor changed.
    example_inputs : sequence of Tensor
        The arguments of `forward` for a batch of one sample, on the model's device.

    Returns
    -------
    Census
        Layers that can be replaced but did not run, or on no rows, carry the reason `NOT_EXECUTED`; those whose shapes
        could not be seen, `COST_UNKNOWN`.

    Raises
    ------
    ProblemError
        `MODEL_RAISED` with the model's own message, `INPUT_SHAPE_MISMATCH` where the message is about shapes or types,
        `OUT_OF_MEMORY`.
    """
    copy = reload(module)
    methods = scan_methods(copy, open_plain(copy, fused=False))
    inventory = take_inventory(copy, methods)
    marked = _watchable(methods["forward"].sites)
    for number, site in enumerate(marked):
        _mark(methods["forward"].graph, site, number)
    log, watched = _CallLog(), True
    try:
        output, flops = _run(reload(copy), example_inputs, log)
    except ProblemError as error:
        if error.code == ErrorCode.OUT_OF_MEMORY:
            raise
        # A mark fails on a tensor without dimensions; whether the model itself fails is what matters.
        log, watched = _CallLog(), False
        output, flops = _run(_plain_copy(module), example_inputs, log)
    records = _by_layer(log.calls, marked, inventory)
    layers = [_with_calls(layer, records.get(layer.name), watched=watched) for layer in inventory.layers]
    return Census(
        layers=layers,
        total_macs=flops // 2,
        total_params=count_params(module),
        output=describe_output(output),
        parameters=[_as_its_owner(parameter, layers) for parameter in inventory.parameters],
    )


def count_macs(module: torch.jit.ScriptModule, example_inputs: Sequence[torch.Tensor]) -> int:
    """Count the multiply-adds of one forward, as torch.utils.flop_counter's total / 2.

    The counter has no formula for fused operators: attention is counted on its unfused path, and recurrent kernels by
    `RECURRENT_KERNELS`, as the products that they stand for.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model; a copy of it is run, in eval mode.
    example_inputs : sequence of Tensor
        The arguments of `forward` for a batch of one sample.

    Returns
    -------
    int
        MACs of all operators.

    Raises
    ------
    ProblemError
        As `take_census`.
    """
    return _run(_plain_copy(module), example_inputs, _CallLog())[1] // 2


def count_params(module: torch.jit.ScriptModule) -> int:
    """Count numel over all parameters, biases and norms included; one that is shared counts once."""
    return count_distinct(all_parameters(module).values())


def describe_output(output: object) -> dict[str, Any]:
    """Describe the structure of a model's output: tensors with shape and dtype inside tuples, lists and maps."""
    if isinstance(output, torch.Tensor):
        return {"type": "tensor", "shape": list(output.shape), "dtype": str(output.dtype).removeprefix("torch.")}
    if isinstance(output, dict):
        return {"type": "dict", "items": {str(key): describe_output(value) for key, value in output.items()}}
    if isinstance(output, (tuple, list)):
        kind = "tuple" if isinstance(output, tuple) else "list"
        return {"type": kind, "items": [describe_output(value) for value in output]}
    return {"type": "none" if output is None else type(output).__name__}


@dataclass
class _Call:
    number: int
    input_shape: Shape
    output_shape: Shape
    macs: int


class _CallLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, at each mark, which layer begins or ends, the tensor's shape, and the count so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter = FlopCounterMode(display=False, custom_mapping=dict(RECURRENT_KERNELS))
        self.calls: list[_Call] = []
        self._open: dict[int, tuple[Shape, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.slice.Tensor and len(args) > 3 and isinstance(args[3], int):
            number, ends = divmod(_MARK - args[3], 2)
            if 0 <= number < 1_000_000 // 2 and args[3] <= _MARK:
                self._note(number, ends=bool(ends), shape=tuple(args[0].shape))
        return result

    def _note(self, number: int, *, ends: bool, shape: Shape) -> None:
        flops = self.counter.get_total_flops()
        if not ends:
            self._open[number] = (shape, flops)
        elif number in self._open:
            input_shape, before = self._open.pop(number)
            self.calls.append(_Call(number, input_shape, shape, (flops - before) // 2))


def _plain_copy(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    copy = reload(module)
    open_plain(copy, fused=False)
    return reload(copy)


def _watchable(sites: Sequence[Site]) -> list[Site]:
    """Sites with one input and one output, one for each operator."""
    found = {key_of(site.node): site for site in reversed(sites) if site.input_at is not None}
    return [site for site in sites if found.get(key_of(site.node)) is site]


def _by_layer(calls: Sequence[_Call], marked: Sequence[Site], inventory: Inventory) -> dict[str, list[_Call]]:
    """Gather the calls by layer name, in the order in which they ran; several weights of one operator share its work.

    The shares of a call are by the weights' sizes, and add up to the call's multiply-adds.
    """
    shares = [inventory.shares(site) for site in marked]
    found: dict[str, list[_Call]] = {name: [] for each in shares for name, _ in each}
    for call in calls:
        left, weight_left = call.macs, sum(weight for _, weight in shares[call.number])
        for name, weight in shares[call.number]:
            part = left * weight // max(weight_left, 1)
            found[name].append(_Call(call.number, call.input_shape, call.output_shape, part))
            left, weight_left = left - part, weight_left - weight
    return found


def _as_its_owner(parameter: Layer, layers: Sequence[Layer]) -> Layer:
    owner = next((layer for layer in layers if layer.name == parameter.owner), None)
    if owner is None or owner.weight != parameter.weight:
        return replace(parameter, macs=0)
    missing = {ReasonCode.NOT_EXECUTED} & {owner.reason}
    return replace(
        parameter,
        macs=owner.macs or 0,
        calls=owner.calls,
        call_shapes=owner.call_shapes,
        reason=parameter.reason or (missing.pop() if missing else None),
    )


def _mark(graph: Graph, site: Site, number: int) -> None:
    begins = _whole_slice(graph, site.node, site.input, _MARK - 2 * number)
    begins.insertBefore(site.node)
    site.node.replaceInput(site.input_at, begins.output())
    ends = _whole_slice(graph, site.node, site.output, _MARK - 2 * number - 1)
    ends.insertAfter(site.node)
    site.output.replaceAllUsesWith(ends.output())
    ends.replaceInput(0, site.output)


def _whole_slice(graph: Graph, before: Node, value: Value, end: int) -> Node:
    zero, one, last = (constant_before(graph, before, number) for number in (0, 1, end))
    node = graph.create("aten::slice", [value, zero, zero, last, one], 1)
    node.output().setType(value.type())
    return node


def _run(copy: torch.jit.ScriptModule, example_inputs: Sequence[torch.Tensor], log: _CallLog) -> tuple[Any, int]:
    copy.eval()
    try:
        # The counter reads 0 under inference_mode. The second pass is counted: a first one may unpack weights.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            copy(*example_inputs)
            with log, log.counter:
                output = copy(*example_inputs)
    except _RAISED as error:
        plain = None if out_of_memory(error) else _plain_error(reload(copy), example_inputs)
        raise _forward_problem(plain or error, example_inputs) from error
    return output, int(log.counter.get_total_flops())


def _plain_error(copy: torch.jit.ScriptModule, example_inputs: Sequence[torch.Tensor]) -> Exception | None:
    """Run without modes for the message: an operator's own error loses it on the way through a dispatch mode."""
    try:
        with torch.no_grad():
            copy.eval()(*example_inputs)
    except _RAISED as error:
        return error
    return None


def _forward_problem(error: Exception, example_inputs: Sequence[torch.Tensor]) -> ProblemError:
    reason = trim_reason(error)
    given = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in example_inputs)
    if out_of_memory(error):
        return ProblemError(ErrorCode.OUT_OF_MEMORY, f"One sample ({given}) needs more memory than there is: {reason}.")
    if _SHAPE_COMPLAINTS.search(reason):
        return ProblemError(
            ErrorCode.INPUT_SHAPE_MISMATCH,
            f"The model does not accept inputs {given}: {reason}. Check the data's shape, layout and dtype, "
            "or example_inputs.",
        )
    return ProblemError(ErrorCode.MODEL_RAISED, f"The model's forward raised for inputs {given}: {reason}.")


def _with_calls(layer: Layer, calls: list[_Call] | None, *, watched: bool) -> Layer:
    whole = layer.kind == "parameter"
    if not watched or (calls is None and whole):  # a mark failed, or there was no place for one
        return replace(layer, macs=0 if whole else None, reason=layer.reason or _unknown(layer))
    if calls is None:
        return replace(layer, reason=layer.reason or ReasonCode.NOT_EXECUTED)
    if all(0 in call.input_shape for call in calls):  # on no rows, as of an expert that no sample chose
        return replace(layer, macs=0, reason=layer.reason or ReasonCode.NOT_EXECUTED)
    macs = sum(call.macs for call in calls)
    return replace(
        layer,
        call_shapes=tuple((call.input_shape, call.output_shape) for call in calls),
        calls=len(calls),
        macs=macs,
        reason=layer.reason or (_unknown(layer) if macs == 0 else None),
    )


def _unknown(layer: Layer) -> ReasonCode | None:
    """Why a layer without a count stays dense; tables and composed weights need none."""
    return None if layer.kind in {"embedding", "parameter"} else ReasonCode.COST_UNKNOWN
