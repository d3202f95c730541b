"""What one operator is to the model: which parameters enter it, and as what."""

from dataclasses import dataclass
from typing import Literal

import torch

from worker.engine.network.graphs import Node, Value, attribute_chain, constant, is_tensor, see_through
from worker.engine.network.parameters import Parameters

# operator -> (kind, position of the input, of the weight, of the bias or None)
OPERATORS: dict[str, tuple[str, int, int, int | None]] = {
    "aten::linear": ("linear", 0, 1, 2),
    "aten::conv1d": ("conv", 0, 1, 2),
    "aten::conv2d": ("conv", 0, 1, 2),
    "aten::conv3d": ("conv", 0, 1, 2),
    "aten::_convolution": ("conv", 0, 1, 2),
    "aten::_convolution_mode": ("conv", 0, 1, 2),
    "aten::convolution": ("conv", 0, 1, 2),
    "aten::conv_transpose1d": ("conv_transpose", 0, 1, 2),
    "aten::conv_transpose2d": ("conv_transpose", 0, 1, 2),
    "aten::conv_transpose3d": ("conv_transpose", 0, 1, 2),
    "aten::addmm": ("matmul", 1, 2, 0),
    "aten::matmul": ("matmul", 0, 1, None),
    "aten::mm": ("matmul", 0, 1, None),
    "aten::bmm": ("matmul", 0, 1, None),
    "aten::bilinear": ("bilinear", 0, 2, 3),
    "aten::embedding": ("embedding", 1, 0, None),
    "aten::embedding_bag": ("embedding_bag", 1, 0, None),
    "aten::batch_norm": ("norm", 0, 1, 2),
    "aten::instance_norm": ("norm", 0, 1, 2),
    "aten::layer_norm": ("norm", 0, 2, 3),
    "aten::group_norm": ("norm", 0, 2, 3),
    "aten::rms_norm": ("norm", 0, 2, None),
}
# These are layers even where the weight is computed or a constant; the others only where a parameter enters.
_ALWAYS = frozenset({"linear", "conv", "conv_transpose"})
# Operators that multiply by a weight but have no kind of their own; their weights are layers of kind "parameter".
_MULTIPLYING_NAMES = """
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell einsum tensordot baddbmm addbmm mv
    bilinear _trilinear embedding_bag _transformer_encoder_layer_fwd _native_multi_head_attention
"""
MULTIPLYING = frozenset(f"aten::{name}" for name in _MULTIPLYING_NAMES.split())
# What gives a part of a tensor, or the same numbers in another shape.
_VIEW_NAMES = """
    t transpose permute numpy_T mT view reshape chunk split split_with_sizes unbind select slice narrow flatten
    unflatten unsqueeze squeeze expand contiguous to __getitem__
"""
_VIEWS = frozenset(
    {f"aten::{name}" for name in _VIEW_NAMES.split()} | {"prim::ListUnpack", "prim::ConstantChunk"},
)
_ANCESTRY_LIMIT = 200


@dataclass(frozen=True)
class Site:
    """One operator in one method's graph.

    Attributes
    ----------
    layer : str
        The name of the operator's layer, after the module that owns the weight.
    kind : str
        "linear", "conv2d", "embedding", "norm", … or the operator's own name.
    input_at : int or None
        Which of the operator's inputs is the tensor that goes in; None if there is no single one, or it does not give
        one tensor back. A position, not a value: editing an earlier site changes what stands there.
    weight : str or None
        The first name of the parameter that is the weight, None where the weight is computed or a constant.
    derived : bool
        The operator does not take the weight as its kind would: it takes a part of it, in another shape, or as its
        left factor.
    bias : str or None
        The first name of the parameter that is the bias.
    bias_is : "none", "parameter" or "value"
        "value" for a bias that is computed, or may be None.
    parameters : tuple of str
        First names of all parameters that enter here.
    output_at : int
        Which of the operator's outputs is the tensor that comes out.
    """

    method: str
    node: Node
    layer: str
    kind: str
    input_at: int | None
    weight: str | None
    bias: str | None
    derived: bool = False
    bias_is: Literal["none", "parameter", "value"] = "none"
    bias_at: int | None = None
    parameters: tuple[str, ...] = ()
    output_at: int = 0

    @property
    def input(self) -> Value:
        """The tensor that goes in, as the graph now stands."""
        return self.node.inputsAt(self.input_at)

    @property
    def output(self) -> Value:
        """The tensor that comes out."""
        return self.node.outputsAt(self.output_at)


def key_of(node: Node) -> str:
    """Tell a node from all others of its graph."""
    return "|".join([node.kind(), *(value.debugName() for value in node.outputs())])


def operator_site(
    module: torch.jit.ScriptModule, place: str, node: Node, root: Value, parameters: Parameters
) -> Site | None:
    """Read an operator of the list; None for others, and for those that no parameter enters.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model.
    place : str
        Method and position, as a name for operators whose weight has none.
    node, root : Node, Value
        The operator, and the method's `self`.
    parameters : Parameters
        Of the model.
    """
    entry = OPERATORS.get(node.kind())
    if entry is None:
        return None
    kind, input_at, weight_at, bias_at = entry
    if kind == "matmul" and _left_is_weight(node, root, parameters, input_at, weight_at):
        weight_at, input_at, derived = input_at, weight_at, True
    else:
        derived = False
    weight_value = node.inputsAt(weight_at)
    turned, reached = _behind_turn(module, weight_value, root)
    weight = parameters.first(reached)
    if weight is None:
        weight = parameters.first(_behind_views(weight_value, root))
        turned, derived = False, weight is not None
    if kind not in _ALWAYS and weight is None:
        return None
    sources = [weight] if weight is not None else _ancestors(weight_value, root, parameters)
    bias = parameters.first(attribute_chain(node.inputsAt(bias_at), root)) if bias_at is not None else None
    if turned:  # x·Wᵀ is what a linear layer does; other operators do not take a matrix so
        derived = derived or kind not in {"linear", "matmul"}
        kind = {"linear": "matmul", "matmul": "linear"}.get(kind, kind)
    return Site(
        method=place.partition(".")[0],
        node=node,
        layer=_layer_name(weight or reached, sources, f"{place}.{node.kind().removeprefix('aten::')}"),
        kind=_ranked(node, kind, weight_value, parameters[weight] if weight is not None else None),
        input_at=input_at if is_tensor(node.inputsAt(input_at)) and node.outputsSize() > 0 else None,
        weight=weight,
        bias=bias,
        derived=derived,
        bias_is=_bias_is(module, node, root, bias, bias_at),
        bias_at=bias_at,
        parameters=tuple(name for name in (*sources, bias) if name),
    )


def _bias_is(
    module: torch.jit.ScriptModule, node: Node, root: Value, bias: str | None, bias_at: int | None
) -> Literal["none", "parameter", "value"]:
    if bias is not None:
        return "parameter"
    if bias_at is None:
        return "none"
    try:
        return "none" if constant(module, node.inputsAt(bias_at), root) is None else "value"
    except LookupError:
        return "value"


def _left_is_weight(node: Node, root: Value, parameters: Parameters, left_at: int, right_at: int) -> bool:
    left, right = (_behind_views(node.inputsAt(at), root) for at in (left_at, right_at))
    return left in parameters and right not in parameters


def _behind_turn(module: torch.jit.ScriptModule, value: Value, root: Value) -> tuple[bool, str | None]:
    """Name the attribute that a matrix is, and tell whether it is transposed."""
    value = see_through(value)
    node = value.node()
    if attribute_chain(value, root) is not None or not _transposes(module, node, root):
        return False, attribute_chain(value, root)
    return True, attribute_chain(node.inputsAt(0), root)


def _transposes(module: torch.jit.ScriptModule, node: Node, root: Value) -> bool:
    if node.kind() in {"aten::t", "aten::numpy_T", "aten::mT"}:
        return True
    if node.kind() not in {"aten::transpose", "aten::permute"}:
        return False
    try:
        axes = [constant(module, value, root) for value in list(node.inputs())[1:]]
    except LookupError:
        return False
    flat = [
        axis % 2 for each in axes for axis in (each if isinstance(each, list) else [each]) if axis in (-2, -1, 0, 1)
    ]
    return sorted(flat) == [0, 1] and (node.kind() == "aten::transpose" or flat == [1, 0])


def _behind_views(value: Value, root: Value) -> str | None:
    """Name the attribute of which a value is a part, or a view."""
    value = see_through(value)
    while attribute_chain(value, root) is None:
        if value.node().kind() not in _VIEWS:
            return None
        value = see_through(value.node().inputsAt(0))
    return attribute_chain(value, root)


def _ranked(node: Node, kind: str, weight_value: Value, weight: torch.Tensor | None) -> str:
    """Name a convolution by its number of spatial axes, and a transposed one as what it is."""
    if kind not in {"conv", "conv_transpose"}:
        return kind
    name = node.kind().removeprefix("aten::")
    if name in {"_convolution", "convolution"} and node.inputsAt(6).toIValue() is True:
        kind = "conv_transpose"
    if name[-2:] in {"1d", "2d", "3d"}:
        return f"{kind}{name[-2:]}"
    axes = weight.dim() if weight is not None else weight_value.type().dim()
    return f"{kind}{axes - 2}d" if axes else kind


def _ancestors(value: Value, root: Value, parameters: Parameters) -> list[str]:
    """Name the parameters that a computed value is made of, as far as a bounded walk back finds them."""
    found: list[str] = []
    pending = [value]
    seen: set[str] = set()
    while pending and len(seen) < _ANCESTRY_LIMIT:
        current = pending.pop()
        if current.debugName() in seen:
            continue
        seen.add(current.debugName())
        chain = attribute_chain(current, root)
        name = parameters.first(chain)
        if name is not None and name not in found:
            found.append(name)
        if chain is None and current.node().kind() not in OPERATORS:
            pending.extend(current.node().inputs())
    return found


def _layer_name(weight: str | None, sources: list[str], place: str) -> str:
    """Name a layer by its module, and by the parameter itself where that is not called `weight`.

    One whose weight is computed from the root's own parameters is named by its place: a rule may name those parameters.
    """
    if weight is None:
        return (sources[0].rpartition(".")[0] if sources else "") or place
    prefix, _, last = weight.rpartition(".")
    return prefix if last == "weight" and prefix else weight
