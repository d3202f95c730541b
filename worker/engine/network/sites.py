"""Sites: the operators of a method that apply parameters of the model, as they stand in its graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from worker.engine.network.graphs import (
    Graph,
    Node,
    Value,
    attribute,
    attribute_chain,
    branch_of,
    is_read,
    is_tensor,
    method_names,
    open_graph,
    read_graph,
    self_value,
    walk,
)
from worker.engine.network.operator_sites import MULTIPLYING, OPERATORS, Site, key_of, operator_site
from worker.engine.network.parameters import Parameters
from worker.engine.network.plain_paths import fix_flags, simplify, take_plain_paths

_MODULE_TYPES = frozenset({"ClassType", "InterfaceType"})
_PASSING = frozenset({"prim::ListConstruct", "prim::unchecked_cast", "prim::unchecked_unwrap_optional"})
_TURNING = frozenset({"aten::t", "aten::transpose", "aten::permute", "aten::numpy_T", "aten::mT"})
_ALIASING = _TURNING | {"aten::detach", "aten::contiguous", "aten::view", "aten::select", "aten::slice"}
_NO_NAME = OPERATORS.keys() | {"prim::Return"}  # a parameter may enter these as something else than the weight
# What asks about a tensor without reading its numbers.
QUESTIONS = frozenset(
    {
        "prim::dtype",
        "prim::device",
        "prim::requires_grad",
        "prim::is_cuda",
        "prim::is_nested",
        "aten::size",
        "aten::dim",
        "aten::numel",
        "aten::len",
        "aten::is_floating_point",
        "aten::__is__",
        "aten::__isnot__",
    }
)


@dataclass
class MethodSites:
    """What one method does with the parameters of the model.

    Attributes
    ----------
    consumers : dict of str to list of Node
        For each parameter, every operator that takes it: behind casts, lists and transpositions, without questions
        about it.
    questions : dict of str to list of Node
        For each parameter, what asks about it without reading its numbers.
    assigned : set of str
        Attributes that the method sets, and parameters that it writes to in place.
    opaque : set of str
        Submodules handed on whole ("" for the model itself), to `fork` or through an interface: what is done with
        their parameters cannot be read here.
    """

    graph: Graph
    root: Value
    sites: list[Site] = field(default_factory=list)
    consumers: dict[str, list[Node]] = field(default_factory=dict)
    questions: dict[str, list[Node]] = field(default_factory=dict)
    assigned: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)

    def hides(self, parameter: str) -> bool:
        """Tell whether a parameter belongs to a submodule that is handed on whole."""
        return any(not prefix or parameter.startswith(f"{prefix}.") for prefix in self.opaque)


def read_plain(module: torch.jit.ScriptModule) -> dict[str, Graph]:
    """Copy the graph of every method, inlined and made plain, with attention on its unfused path."""
    return {name: _plain(module, read_graph(module, name)) for name in method_names(module)}


def open_plain(module: torch.jit.ScriptModule, *, fused: bool) -> dict[str, Graph]:
    """Inline every method's own graph and make it plain, ready to be edited; fused attention stays if so asked."""
    return {name: _plain(module, open_graph(module, name), fused=fused) for name in method_names(module)}


def scan_methods(module: torch.jit.ScriptModule, graphs: Mapping[str, Graph]) -> dict[str, MethodSites]:
    """Find the sites of each method.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model that the graphs belong to.
    graphs : mapping of str to Graph
        Inlined graphs by method name, copies to be read or the module's own to be edited.

    Returns
    -------
    dict of str to MethodSites
        `forward` first; sites in program order.
    """
    parameters = Parameters(module)
    return {name: _scan(module, name, graphs[name], parameters) for name in method_names(module) if name in graphs}


def _plain(module: torch.jit.ScriptModule, graph: Graph, *, fused: bool = False) -> Graph:
    root = self_value(graph)

    def flag(node: Node) -> bool | None:
        chain = attribute_chain(node.output(), root)
        value = attribute(module, chain) if chain is not None else None
        return value if isinstance(value, bool) else None

    fix_flags(graph, flag)
    if not fused:
        take_plain_paths(graph)
    simplify(graph)
    torch._C._jit_pass_dce(graph)
    return graph


def _scan(module: torch.jit.ScriptModule, method: str, graph: Graph, parameters: Parameters) -> MethodSites:
    found = MethodSites(graph, self_value(graph))
    nodes = list(walk(graph))
    if _is_handed_on(found.root):
        found.opaque.add("")
    for node in nodes:
        if node.kind() == "prim::GetAttr":
            for name in parameters.behind(node.output(), found.root):
                found.consumers.setdefault(name, []).extend(_consumers(node.output()))
                found.questions.setdefault(name, []).extend(_questions(node.output()))
                if _is_written(node.output()):
                    found.assigned.add(name)
            if node.output().type().kind() in _MODULE_TYPES and _is_handed_on(node.output()):
                found.opaque.add(attribute_chain(node.output(), found.root) or "")
        elif node.kind() == "prim::SetAttr":
            owner = attribute_chain(node.inputsAt(0), found.root)
            chain = ".".join(part for part in (owner, node.s("name")) if part)
            found.assigned.add(parameters.first(chain) or chain)
    claimed: set[str] = set()
    for index, node in enumerate(nodes):
        site = operator_site(module, f"{method}.{index}", node, found.root, parameters)
        if site is not None:
            found.sites.append(site)
            claimed.update(site.parameters)
    found.sites.extend(_other_sites(method, found, [name for name in parameters if name not in claimed]))
    position = {key_of(node): index for index, node in enumerate(nodes)}
    found.sites.sort(key=lambda site: position.get(key_of(site.node), len(nodes)))
    return found


def _is_handed_on(submodule: Value) -> bool:
    return any(use.user.kind() not in {"prim::GetAttr", "prim::SetAttr"} for use in submodule.uses())


def _consumers(value: Value) -> Iterator[Node]:
    for use in value.uses():
        if use.user.kind() in _PASSING or (use.user.kind() in _TURNING and use.offset == 0):
            yield from _consumers(use.user.output())
        elif use.user.kind() == "prim::Return" and (branch := branch_of(use.user)) is not None:
            yield from _consumers(branch.outputsAt(use.offset))
        elif use.user.kind() not in QUESTIONS:
            yield use.user


def _questions(value: Value) -> Iterator[Node]:
    for use in value.uses():
        if use.user.kind() in QUESTIONS and use.offset == 0:
            yield use.user
        elif use.user.kind() in _PASSING and use.user.kind() != "prim::ListConstruct":
            yield from _questions(use.user.output())


def _is_written(value: Value) -> bool:
    """Tell whether an operator changes a tensor in place, by itself or through a view of it."""
    for use in value.uses():
        name = use.user.kind()
        if use.offset or not name.startswith("aten::"):
            continue
        if name.endswith("_") and not name.endswith("__"):
            return True
        if name in _ALIASING and _is_written(use.user.output()):
            return True
    return False


def _other_sites(method: str, found: MethodSites, names: list[str]) -> Iterator[Site]:
    """Gather the parameters that no listed operator takes: for each owning module one site, or one for each product."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if found.consumers.get(name):
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    for layer, members in groups.items():
        nodes = list({key_of(node): node for name in members for node in found.consumers[name]}.values())
        kinds = {node.kind() for node in nodes}
        if len(kinds) == 1 and kinds <= MULTIPLYING:  # a cell that is called again
            for node in nodes:
                own = [name for name in members if key_of(node) in map(key_of, found.consumers[name])]
                yield _other_site(method, found, layer, own, [node])
        else:
            yield _other_site(method, found, layer, members, nodes)


def _other_site(method: str, found: MethodSites, layer: str, members: list[str], nodes: list[Node]) -> Site:
    kinds = {node.kind().removeprefix("aten::") for node in nodes}
    node = nodes[0]
    tensors = [
        at for at, value in enumerate(node.inputs()) if is_tensor(value) and attribute_chain(value, found.root) is None
    ]
    outputs = [at for at, value in enumerate(node.outputs()) if is_tensor(value)]
    single = len(nodes) == 1 and 0 in outputs and bool(tensors)
    return Site(
        method=method,
        node=node,
        layer=layer,
        kind=kinds.pop() if len(kinds) == 1 and node.kind() not in _NO_NAME else "other",
        input_at=tensors[0] if single else None,
        weight=members[0],
        bias=None,
        parameters=tuple(members),
        # Of a recurrent layer's outputs one that is read: what nothing reads is never seen to be made.
        output_at=next((at for at in outputs if is_read(node.outputsAt(at))), 0),
    )
