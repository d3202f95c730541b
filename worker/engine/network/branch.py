"""Branches: a module in the place of an operator, or beside it, at every site of a layer."""

from collections.abc import Mapping

import torch

from worker.engine.network.graphs import Graph, Node, Value, attribute, constant_before
from worker.engine.network.layers import Layer
from worker.engine.network.operator_sites import Site
from worker.engine.network.parameters import Shape
from worker.engine.network.sites import MethodSites

# Torch's own attention projects with a bias that is a part of one, or None.
_OR_ZERO = """
graph(%output : Tensor, %bias : Tensor?):
  %none : NoneType = prim::Constant()
  %one : int = prim::Constant[value=1]()
  %given : bool = aten::__isnot__(%bias, %none)
  %made : Tensor = prim::If(%given)
    block0():
      %there : Tensor = prim::unchecked_cast(%bias)
      -> (%there)
    block1():
      %size : int[] = prim::ListConstruct(%one)
      %zero : Tensor = aten::new_zeros(%output, %size, %none, %none, %none, %none)
      -> (%zero)
  return (%made)
"""


def put_branch(
    module: torch.jit.ScriptModule,
    methods: Mapping[str, MethodSites],
    layer: Layer,
    attribute_name: str,
    branch: torch.jit.ScriptModule,
    *,
    added: bool,
) -> None:
    """Call a branch at every site of a layer.

    A bias that the branch does not hold is added behind it. What the graphs ask about the tensors that go, their dtype
    or sizes, is answered by the branch's first floating parameter or by a constant.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model, edited in place.
    methods : mapping of str to MethodSites
        Of the module's own graphs.
    layer : Layer
        One operator with one input and one output.
    attribute_name : str
        The root's attribute that holds `branch`.
    branch : torch.jit.ScriptModule
        Takes the layer's input.
    added : bool
        The branch's output is added to the operator's, which stays; otherwise the branch takes the operator's place.
    """
    gone = {str(layer.weight): layer.weight_shape}
    if layer.bias is not None:
        gone[layer.bias] = tuple(attribute(module, layer.bias).shape)
    for method in methods.values():
        for site in [site for site in method.sites if site.weight == layer.weight and site.kind == layer.kind]:
            call = _call(method, site, attribute_name, branch)
            if added:
                _add_to_output(method.graph, site, call)
                continue
            if layer.bias is None and site.bias_is != "none":
                call = _with_bias(method.graph, site, call)
            site.output.replaceAllUsesWith(call)
            site.node.destroy()
        if not added:
            for gone_name, shape in gone.items():
                for node in method.questions.get(gone_name, []):
                    _answer(method, node, shape, attribute_name, branch)


def _call(method: MethodSites, site: Site, name: str, branch: torch.jit.ScriptModule) -> Value:
    graph: Graph = method.graph
    submodule = _get(graph, method.root, name, branch._c._type())
    submodule.insertBefore(site.node)
    call = graph.create("prim::CallMethod", [submodule.output(), site.input], 1)
    call.s_("name", "forward")
    call.output().setType(site.output.type())
    call.insertBefore(site.node)
    call.copyMetadata(site.node)
    return call.output()


def _get(graph: Graph, owner: Value, name: str, kind: object) -> Node:
    node = graph.create("prim::GetAttr", [owner], 1)
    node.s_("name", name)
    node.output().setType(kind)
    return node


def _add_to_output(graph: Graph, site: Site, branch: Value) -> None:
    total = _sum(graph, site, site.output, branch)
    total.insertAfter(site.node)
    site.output.replaceAllUsesWith(total.output())
    total.replaceInput(0, site.output)


def _with_bias(graph: Graph, site: Site, branch: Value) -> Value:
    """Add the site's own bias, along the channels of a convolution."""
    bias = site.node.inputsAt(site.bias_at)
    if bias.type().kind() == "OptionalType":
        bias = _or_zero(graph, site, branch, bias)
    axes = int(site.kind[-2]) if site.kind.startswith("conv") else 0
    if axes:
        shape = constant_before(graph, site.node, [-1] + [1] * axes)
        shaped = graph.create("aten::reshape", [bias, shape], 1)
        shaped.output().setType(torch._C.TensorType.get())
        shaped.insertBefore(site.node)
        bias = shaped.output()
    total = _sum(graph, site, branch, bias)
    total.insertBefore(site.node)
    return total.output()


def _or_zero(graph: Graph, site: Site, branch: Value, bias: Value) -> Value:
    """Give a bias that may be None, or a zero in its place."""
    graph.setInsertPoint(site.node)
    made = graph.insertGraph(torch._C.parse_ir(_OR_ZERO), [branch, bias])[0]
    graph.setInsertPoint(graph.return_node())
    return made


def _sum(graph: Graph, site: Site, left: Value, right: Value) -> Node:
    total = graph.create("aten::add", [left, right, constant_before(graph, site.node, 1)], 1)
    total.output().setType(site.output.type())
    total.copyMetadata(site.node)
    return total


def _answer(method: MethodSites, node: Node, shape: Shape, name: str, branch: torch.jit.ScriptModule) -> None:
    """Answer a question about a tensor that goes."""
    graph, kind = method.graph, node.kind()
    sizes = {"aten::dim": len(shape), "aten::len": shape[0], "aten::numel": torch.Size(shape).numel()}
    if kind == "aten::size" and node.inputsSize() == 1:
        node.output().replaceAllUsesWith(constant_before(graph, node, list(shape)))
    elif kind in sizes:
        node.output().replaceAllUsesWith(constant_before(graph, node, sizes[kind]))
    elif kind == "aten::size" and isinstance(at := node.inputsAt(1).toIValue(), int):
        node.output().replaceAllUsesWith(constant_before(graph, node, shape[at]))
    elif kind != "aten::size" and (stand_in := _first_floating(branch)):
        value: Value = method.root
        owner = branch._c
        for index, part in enumerate([name, *stand_in]):
            owner = owner if index == 0 else owner.getattr(part)
            kind_of = torch._C.TensorType.get() if isinstance(owner, torch.Tensor) else owner._type()
            made = _get(graph, value, part, kind_of)
            made.insertBefore(node)
            value = made.output()
        node.replaceInput(0, value)


def _first_floating(branch: torch.jit.ScriptModule) -> list[str]:
    tensors = [*branch.named_parameters(), *branch.named_buffers()]
    return next((name.split(".") for name, tensor in tensors if tensor.is_floating_point()), [])
