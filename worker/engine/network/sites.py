"""Sites: the operators of a method that apply parameters of the model, as they stand in its graph."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from worker.engine.network.graphs import (
    Graph,
    Node,
    Value,
    attribute,
    attribute_chain,
    constant,
    is_tensor,
    method_names,
    see_through,
    self_value,
    walk,
)

# operator -> (kind, position of the input, of the weight, of the bias or None)
_OPERATORS: dict[str, tuple[str, int, int, int | None]] = {
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
    "aten::embedding_bag": ("embedding", 1, 0, None),
    "aten::batch_norm": ("norm", 0, 1, 2),
    "aten::instance_norm": ("norm", 0, 1, 2),
    "aten::layer_norm": ("norm", 0, 2, 3),
    "aten::group_norm": ("norm", 0, 2, 3),
    "aten::rms_norm": ("norm", 0, 2, None),
}
# These are layers even where the weight is computed or a constant; the others only where a parameter enters.
_ALWAYS = frozenset({"linear", "conv", "conv_transpose"})
_REARRANGING = frozenset(
    {"aten::t", "aten::transpose", "aten::permute", "aten::numpy_T", "aten::mT", "aten::view", "aten::reshape"}
)
_MODULE_TYPES = frozenset({"ClassType", "InterfaceType"})
_ANCESTRY_LIMIT = 200


@dataclass(frozen=True)
class Site:
    """One operator in one method's graph.

    Attributes
    ----------
    layer : str
        The name of the layer that it belongs to.
    kind : str
        "linear", "conv2d", "embedding", "norm", … or the operator's own name.
    input_at : int or None
        Which of the operator's inputs is the tensor that goes in; None if there is no single one, or it does not give
        one tensor back. A position, not a value: editing an earlier site changes what stands there.
    weight : str or None
        The qualified name of the weight, if it is an attribute of the model.
    bias_known : bool
        False where there is a bias that is not a parameter.
    parameters : tuple of str
        Every parameter that enters here.
    """

    method: str
    node: Node
    layer: str
    kind: str
    input_at: int | None
    weight: str | None
    bias: str | None
    bias_known: bool = True
    parameters: tuple[str, ...] = ()

    @property
    def input(self) -> Value:
        """The tensor that goes in, as the graph now stands."""
        return self.node.inputsAt(self.input_at)

    @property
    def output(self) -> Value:
        """The tensor that comes out."""
        return self.node.outputsAt(0)


@dataclass
class MethodSites:
    """What one method does with the parameters of the model.

    Attributes
    ----------
    consumers : dict of str to list of Node
        For each parameter, every operator that takes it.
    assigned : set of str
        Attributes that the method sets.
    opaque : set of str
        Submodules handed on whole ("" for the model itself), to `fork` or through an interface: what is done with
        their parameters cannot be read here.
    """

    graph: Graph
    root: Value
    sites: list[Site] = field(default_factory=list)
    consumers: dict[str, list[Node]] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)

    def hides(self, parameter: str) -> bool:
        """Tell whether a parameter belongs to a submodule that is handed on whole."""
        return any(not prefix or parameter.startswith(f"{prefix}.") for prefix in self.opaque)


def all_parameters(module: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    """Return every parameter by its qualified name; one that has two names appears under both."""
    return dict(module.named_parameters(remove_duplicate=False))


def scan_methods(module: torch.jit.ScriptModule, graphs: dict[str, Graph]) -> dict[str, MethodSites]:
    """Find the sites of each method.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model that the graphs belong to.
    graphs : dict of str to Graph
        Inlined graphs by method name, copies to be read or the module's own to be edited.

    Returns
    -------
    dict of str to MethodSites
        In the order of `graphs`; sites in program order.
    """
    return {name: _scan(module, name, graphs[name]) for name in method_names(module) if name in graphs}


def _scan(module: torch.jit.ScriptModule, method: str, graph: Graph) -> MethodSites:
    parameters = all_parameters(module)
    found = MethodSites(graph, self_value(graph))
    nodes = list(walk(graph))
    if _is_handed_on(found.root):
        found.opaque.add("")
    for node in nodes:
        if node.kind() == "prim::GetAttr":
            for name in _parameters_behind(module, node.output(), found.root, parameters):
                found.consumers.setdefault(name, []).extend(_consumers(node.output()))
            if node.output().type().kind() in _MODULE_TYPES and _is_handed_on(node.output()):
                found.opaque.add(attribute_chain(node.output(), found.root) or "")
        elif node.kind() == "prim::SetAttr":
            owner = attribute_chain(node.inputsAt(0), found.root)
            found.assigned.add(".".join(part for part in (owner, node.s("name")) if part))
    claimed: set[str] = set()
    for index, node in enumerate(nodes):
        site = _operator_site(module, f"{method}.{index}", node, found.root, parameters)
        if site is not None:
            found.sites.append(site)
            claimed.update(site.parameters)
    found.sites.extend(_other_sites(method, found, [name for name in parameters if name not in claimed]))
    position = {_key(node): index for index, node in enumerate(nodes)}
    found.sites.sort(key=lambda site: position.get(_key(site.node), len(nodes)))
    return found


def _is_handed_on(submodule: Value) -> bool:
    return any(use.user.kind() not in {"prim::GetAttr", "prim::SetAttr"} for use in submodule.uses())


def _key(node: Node) -> str:
    return "|".join([node.kind(), *(value.debugName() for value in node.outputs())])


def _parameters_behind(
    module: torch.jit.ScriptModule, value: Value, root: Value, parameters: dict[str, torch.Tensor]
) -> Iterable[str]:
    """Name the parameters that an attribute holds: itself, or the members of a list (recurrent layers keep one)."""
    chain = attribute_chain(value, root)
    if chain is None:
        return []
    if chain in parameters:
        return [chain]
    if value.type().kind() != "ListType":
        return []
    held = attribute(module, chain)
    members = {item.data_ptr() for item in held if isinstance(item, torch.Tensor) and item.numel()}
    return [name for name, tensor in parameters.items() if tensor.data_ptr() in members]


def _consumers(value: Value) -> Iterator[Node]:
    for use in value.uses():
        if use.user.kind() in {"prim::ListConstruct", "prim::unchecked_cast", "prim::unchecked_unwrap_optional"}:
            yield from _consumers(use.user.output())
        else:
            yield use.user


def _operator_site(
    module: torch.jit.ScriptModule, place: str, node: Node, root: Value, parameters: dict[str, torch.Tensor]
) -> Site | None:
    entry = _OPERATORS.get(node.kind())
    if entry is None:
        return None
    kind, input_at, weight_at, bias_at = entry
    if kind == "matmul":
        input_at, weight_at = _matmul_positions(node, root, parameters, input_at, weight_at)
    weight_value = node.inputsAt(weight_at)
    direct = attribute_chain(weight_value, root)
    reached = direct or (attribute_chain(_rearranged(weight_value), root) if kind == "matmul" else None)
    if kind not in _ALWAYS and reached not in parameters:
        return None
    bias_value = node.inputsAt(bias_at) if bias_at is not None else None
    bias = attribute_chain(bias_value, root) if bias_value is not None else None
    bias = bias if bias in parameters else None
    sources = [reached] if reached in parameters else _ancestors(weight_value, root, parameters)
    if reached is not None:
        layer = _owner(reached)
    else:
        layer = _prefix(sources[0]) if sources else f"{place}.{node.kind().removeprefix('aten::')}"
    return Site(
        method=place.partition(".")[0],
        node=node,
        layer=layer,
        kind=_ranked(node, kind, weight_value, parameters.get(reached or "")),
        input_at=input_at if is_tensor(node.inputsAt(input_at)) else None,
        weight=reached,
        bias=bias,
        bias_known=bias is not None or bias_value is None or _is_none(module, bias_value, root),
        parameters=tuple(name for name in (*sources, bias) if name),
    )


def _is_none(module: torch.jit.ScriptModule, value: Value, root: Value) -> bool:
    try:
        return constant(module, value, root) is None
    except LookupError:
        return False


def _matmul_positions(
    node: Node, root: Value, parameters: dict[str, torch.Tensor], input_at: int, weight_at: int
) -> tuple[int, int]:
    left = attribute_chain(_rearranged(node.inputsAt(input_at)), root)
    return (weight_at, input_at) if left in parameters else (input_at, weight_at)


def _rearranged(value: Value) -> Value:
    value = see_through(value)
    while value.node().kind() in _REARRANGING:
        value = see_through(value.node().inputsAt(0))
    return value


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


def _ancestors(value: Value, root: Value, parameters: dict[str, torch.Tensor]) -> list[str]:
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
        if chain in parameters and chain not in found:
            found.append(str(chain))
        if chain is None and current.node().kind() not in _OPERATORS:
            pending.extend(current.node().inputs())
    return found


def _owner(parameter: str) -> str:
    """Name a layer by its module, and by the parameter itself where that is not called `weight`."""
    prefix, _, last = parameter.rpartition(".")
    return prefix if last == "weight" and prefix else parameter


def _prefix(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _other_sites(method: str, found: MethodSites, names: list[str]) -> Iterator[Site]:
    """Gather the parameters that no listed operator takes, one site per owning module."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in found.consumers:
            groups.setdefault(_prefix(name), []).append(name)
    for layer, members in groups.items():
        nodes = list({_key(node): node for name in members for node in found.consumers[name]}.values())
        kinds = {node.kind().removeprefix("aten::") for node in nodes}
        node = nodes[0]
        held = {attribute_chain(value, found.root) for value in node.inputs()}
        tensors = [
            at
            for at, value in enumerate(node.inputs())
            if is_tensor(value) and attribute_chain(value, found.root) is None
        ]
        single = len(nodes) == 1 and node.outputsSize() > 0 and is_tensor(node.outputsAt(0)) and bool(tensors)
        yield Site(
            method=method,
            node=node,
            layer=layer,
            kind=kinds.pop() if len(kinds) == 1 and "prim::Return" not in kinds else "other",
            input_at=tensors[0] if single else None,
            weight=next((name for name in members if name in held), members[0]),
            bias=None,
            parameters=tuple(members),
        )
