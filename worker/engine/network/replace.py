"""Replacement of layers inside the user's graphs by modules that do the same with fewer numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from worker.engine.network.compose import compose_parameter
from worker.engine.network.graphs import Graph, Value, method_names, open_graph
from worker.engine.network.sites import MethodSites, Site, all_parameters, scan_methods


@dataclass(frozen=True)
class Replacement:
    """What stands for a layer's dense weight.

    Parameters
    ----------
    branch : nn.Module, optional
        Takes the layer's input. Alone it takes the operator's place, bias included, at every site of the layer; beside
        `weight` its output, without a bias, is added to the operator's.
    weight : nn.Module, optional
        Its `forward()` gives the weight, for whatever reads the parameter; the operators stay as they are.
    """

    branch: nn.Module | None = None
    weight: nn.Module | None = None


def replace_layers(module: torch.jit.ScriptModule, replacements: Mapping[str, nn.Module | Replacement]) -> None:
    """Put plain modules in the place of layers, in every method that holds them, loops and branches included.

    The module must be fresh from `load_model` or `reload`: one that has run keeps its old plan, and one that was copied
    or scripted here shares its type with a sibling that would break. Save and load the result (`reload`) before running
    it. The dense parameters stay in the module until `export_bytes` drops them.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model, edited in place.
    replacements : mapping of str to nn.Module or Replacement
        Layer name, or the qualified name of a parameter where only its weight is composed, to what stands for it; a
        bare module is a branch. Everything that the modules store is a parameter or a buffer, on the model's device and
        in its dtype.

    Raises
    ------
    KeyError
        Nothing has such a name, or nothing reads the parameter.
    ValueError
        A branch is asked for, and a site of the layer has no single input and output, so there is no place for it.
    """
    graphs = {name: open_graph(module, name) for name in method_names(module)}
    methods = scan_methods(module, graphs)
    for name, asked in replacements.items():
        wanted = asked if isinstance(asked, Replacement) else Replacement(branch=asked)
        places = [(method, site) for method in methods.values() for site in method.sites if site.layer == name]
        parameter = _parameter(module, name, places)
        if wanted.branch is not None:
            _put_branch(module, name, places, wanted.branch, added=wanted.weight is not None)
        if wanted.weight is not None:
            attribute, scripted = _register(module, f"{name}__weight", wanted.weight)
            compose_parameter(module, graphs, _aliases(module, parameter), attribute, scripted)
    for graph in graphs.values():
        torch._C._jit_pass_dce(graph)
        graph.lint()


def _parameter(module: torch.jit.ScriptModule, name: str, places: list[tuple[MethodSites, Site]]) -> str:
    parameters = all_parameters(module)
    found = next((site.weight for _, site in places if site.weight in parameters), None)
    if found is None and name not in parameters:
        raise KeyError(name)
    return found or name


def _aliases(module: torch.jit.ScriptModule, parameter: str) -> set[str]:
    """Every name of one parameter."""
    parameters = all_parameters(module)
    tensor = parameters[parameter]
    return {
        name
        for name, other in parameters.items()
        if (other.data_ptr(), other.shape, other.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())
    }


def _put_branch(
    module: torch.jit.ScriptModule, name: str, places: list[tuple[MethodSites, Site]], branch: nn.Module, *, added: bool
) -> None:
    if not places or any(site.input_at is None for _, site in places):
        raise ValueError(f"layer {name!r} is not one operator with one input and one output; it takes no branch")
    attribute, scripted = _register(module, f"{name}__factors", branch)
    for method, site in places:
        call = _call(method, site, attribute, scripted)
        if added:
            _add_to_output(method.graph, site, call)
        else:
            site.output.replaceAllUsesWith(call)
            site.node.destroy()


def _register(module: torch.jit.ScriptModule, wanted: str, new: nn.Module) -> tuple[str, torch.jit.ScriptModule]:
    """Hold a new submodule at the root; it is named after the layer, and a dot cannot be part of a name."""
    base = wanted.replace(".", "__")
    name, number = base, 2
    while module._c.hasattr(name):
        name, number = f"{base}_{number}", number + 1
    scripted = torch.jit.script(new.train(module.training))
    module._c._register_attribute(name, scripted._c._type(), scripted._c)
    return name, scripted


def _call(method: MethodSites, site: Site, name: str, scripted: torch.jit.ScriptModule) -> Value:
    graph: Graph = method.graph
    submodule = graph.create("prim::GetAttr", [method.root], 1)
    submodule.s_("name", name)
    submodule.output().setType(scripted._c._type())
    submodule.insertBefore(site.node)
    call = graph.create("prim::CallMethod", [submodule.output(), site.input], 1)
    call.s_("name", "forward")
    call.output().setType(site.output.type())
    call.insertBefore(site.node)
    call.copyMetadata(site.node)
    return call.output()


def _add_to_output(graph: Graph, site: Site, branch: Value) -> None:
    graph.setInsertPoint(site.node)
    one = graph.insertConstant(1)
    total = graph.create("aten::add", [site.output, branch, one], 1)
    total.output().setType(site.output.type())
    total.insertAfter(site.node)
    total.copyMetadata(site.node)
    site.output.replaceAllUsesWith(total.output())
    total.replaceInput(0, site.output)
