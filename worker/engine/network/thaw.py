"""Frozen models thawed: weights that `torch.jit.freeze` has made constants become parameters again."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from worker.engine.network.graphs import Graph, Node, Value, method_names, open_graph, read_graph, self_value, walk
from worker.engine.network.operator_sites import OPERATORS
from worker.engine.network.plain_paths import FUSED_ATTENTION, simplify, take_plain_paths

_RECURRENT = frozenset({"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"})
_CELLS = frozenset({"aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell"})
_PROJECTIONS = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
_FEED_FORWARD = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias") + (
    "linear1_weight",
    "linear1_bias",
    "linear2_weight",
    "linear2_bias",
)
_FUSED_ROLES = {
    "aten::_native_multi_head_attention": {role: at for at, role in enumerate(_PROJECTIONS, start=5)},
    "aten::_transformer_encoder_layer_fwd": {role: at for at, role in enumerate(_PROJECTIONS, start=3)}
    | {role: at for at, role in enumerate(_FEED_FORWARD, start=10)},
}
_STATISTICS = {"aten::batch_norm": {3: "running_mean", 4: "running_var"}}
_STATISTICS["aten::instance_norm"] = _STATISTICS["aten::batch_norm"]


def thaw(module: torch.jit.ScriptModule) -> bool:
    """Lift the constant weights and biases of a frozen model's known operators into parameters, in place.

    They are named after the operator and its place among those that hold constants, "conv2d_3.weight". A matrix stays
    one parameter however often it is used; vectors that freezing has pooled because they hold the same numbers, such
    as two biases of zeros, become one for each operator again. Running statistics become buffers.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        Fresh from a file; it has never run.

    Returns
    -------
    bool
        Whether anything was lifted; the module must then be saved and loaded before it is run.
    """
    if module._c.hasattr("training") and any(True for _ in module.parameters()):
        return False  # freezing takes the flag away; what else is a constant was meant so
    if not module._c.hasattr("training"):
        module._c._register_attribute("training", torch._C.BoolType.get(), False)
    methods = [name for name in method_names(module) if any(True for _ in _frozen(read_graph(module, name)))]
    lifted = _Lifted(module)
    for method in methods:
        graph = open_graph(module, method)
        if take_plain_paths(graph):  # otherwise a matrix may have one copy for each path
            simplify(graph)
        apart = len(methods) == 1 and not any(node.kind() in FUSED_ATTENTION for node in walk(graph))
        for number, (node, roles) in enumerate(list(_frozen(graph)), start=1):
            lifted.lift(graph, node, _name(node, number), roles, apart=apart)
        lifted.everywhere(graph)
        torch._C._jit_pass_dce(graph)
        graph.lint()
    return bool(methods)


def _frozen(graph: Graph) -> Iterator[tuple[Node, dict[str, int]]]:
    """Yield the operators that take constants, with the role and position of each constant."""
    for node in list(walk(graph)):
        roles = {
            role: at for role, at in _roles(node) if at < node.inputsSize() and _constant(node.inputsAt(at)) is not None
        }
        if roles:
            yield node, roles


def _roles(node: Node) -> Iterator[tuple[str, int]]:
    kind = node.kind()
    if kind in OPERATORS:
        _, _, weight_at, bias_at = OPERATORS[kind]
        yield "weight", weight_at
        if bias_at is not None:
            yield "bias", bias_at
        for at, role in _STATISTICS.get(kind, {}).items():
            yield role, at
    elif kind in _CELLS:
        yield from ((role, at) for at, role in enumerate(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), start=2))
    elif kind == "prim::ListConstruct" and all(_is_recurrent_list(use.user) for use in node.output().uses()):
        held = [tensor for value in node.inputs() if (tensor := _constant(value)) is not None and tensor.dim() <= 2]
        if len(held) == node.inputsSize():
            yield from ((f"{'weight' if each.dim() == 2 else 'bias'}_{at}", at) for at, each in enumerate(held))
    else:
        yield from _FUSED_ROLES.get(kind, {}).items()


def _is_recurrent_list(node: Node) -> bool:
    return node.kind() in _RECURRENT


def _constant(value: Value) -> torch.Tensor | None:
    """Give the content of a floating constant of at least one axis."""
    if value.node().kind() != "prim::Constant" or value.type().kind() != "TensorType":
        return None
    tensor = value.toIValue()
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
    return tensor if plain and tensor.dim() else None


def _name(node: Node, number: int) -> str:
    kind = node.kind().partition("::")[2].strip("_")
    return f"{'recurrent' if kind == 'ListConstruct' else kind}_{number}"


_Memory = tuple[int, tuple[int, ...], tuple[int, ...]]
_Place = tuple[str, str, bool]  # layer, role, and whether it is read as its transpose


def _memory(tensor: torch.Tensor) -> _Memory:
    """Tell a tensor from all that hold other numbers, or the same in another order."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


class _Held(nn.Module):
    """Parameters and statistics of one operator."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for role, tensor in tensors.items():
            if role.startswith("running_"):
                self.register_buffer(role, tensor.detach().clone())
            else:
                self.register_parameter(role, nn.Parameter(tensor.detach().clone()))


class _Lifted:
    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self.module = module
        self.places: dict[_Memory, _Place] = {}

    def lift(self, graph: Graph, node: Node, name: str, roles: Mapping[str, int], *, apart: bool) -> None:
        """Let one operator read parameters instead of constants."""
        tensors = {role: tensor for role, at in roles.items() if (tensor := _constant(node.inputsAt(at))) is not None}
        known = {role: self.places[_memory(x)] for role, x in tensors.items() if _memory(x) in self.places}
        # An operator whose matrix is known is another call of the same layer: its vectors are that layer's too.
        matrices = [known[role] for role, x in tensors.items() if x.dim() > 1 and role in known]
        layer = next((owner for owner, _, turned in matrices if not turned), None)
        for role, tensor in tensors.items():
            if tensor.dim() == 1 and layer is not None and self._holds(layer, role, tensor):
                known[role] = (layer, role, False)
            elif tensor.dim() == 1 and apart:
                known.pop(role, None)
        new = {role: tensor for role, tensor in tensors.items() if role not in known}
        while self.module._c.hasattr(name):
            name += "_"
        if new:
            held = torch.jit.script(_Held(new))
            self.module._c._register_attribute(name, held._c._type(), held._c)
        for role, tensor in tensors.items():
            place = known.get(role, (name, role, False))
            self.places.setdefault(_memory(tensor), place)
            if tensor.dim() == 2:
                self.places.setdefault(_memory(tensor.t()), (*place[:2], not place[2]))
            node.replaceInput(roles[role], self._read(graph, node, place))

    def _holds(self, layer: str, role: str, tensor: torch.Tensor) -> bool:
        holder = self.module._c.getattr(layer)
        return bool(holder.hasattr(role)) and torch.equal(holder.getattr(role), tensor)

    def everywhere(self, graph: Graph) -> None:
        """Let all other readers of a lifted matrix read the parameter too."""
        for node in [node for node in walk(graph) if node.kind() == "prim::Constant" and node.outputsSize()]:
            tensor = _constant(node.output())
            if tensor is not None and tensor.dim() > 1 and node.hasUses() and _memory(tensor) in self.places:
                node.output().replaceAllUsesWith(self._read(graph, node, self.places[_memory(tensor)]))

    def _read(self, graph: Graph, before: Node, place: _Place) -> Value:
        owner, name, turned = place
        holder = graph.create("prim::GetAttr", [self_value(graph)], 1)
        holder.s_("name", owner)
        holder.output().setType(self.module._c.getattr(owner)._type())
        holder.insertBefore(before)
        made = graph.create("prim::GetAttr", [holder.output()], 1)
        made.s_("name", name)
        made.output().setType(torch._C.TensorType.get())
        made.insertBefore(before)
        if not turned:
            return made.output()
        transposed = graph.create("aten::t", [made.output()], 1)
        transposed.output().setType(torch._C.TensorType.get())
        transposed.insertBefore(before)
        return transposed.output()
