"""Replacement of layers inside the user's graphs by modules that do the same with fewer numbers."""

from collections.abc import Mapping

import torch
from torch import nn

from worker.engine.network.graphs import Graph, Value, method_names, open_graph
from worker.engine.network.sites import MethodSites, Site, scan_methods


def replace_layers(module: torch.jit.ScriptModule, replacements: Mapping[str, nn.Module]) -> None:
    """Put plain modules in the place of layers, in every method that holds them, loops and branches included.

    The module must be fresh from `load_model` or `reload`: one that has run keeps its old plan, and one that was copied
    or scripted here shares its type with a sibling that would break. Save and load the result (`reload`) before running
    it. The dense parameters stay in the module until `export_bytes` drops them.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model, edited in place.
    replacements : mapping of str to nn.Module
        Layer name to a module that takes the layer's input and gives its output, bias included. Everything that it
        stores is a parameter or a buffer, on the model's device and in its dtype.

    Raises
    ------
    KeyError
        No layer has such a name.
    ValueError
        The layer is not one single operator of a method, so there is no place for the module.
    """
    graphs = {name: open_graph(module, name) for name in method_names(module)}
    methods = scan_methods(module, graphs)
    for name, replacement in replacements.items():
        places = [(method, site) for method in methods.values() for site in method.sites if site.layer == name]
        _check_places(name, places)
        scripted = torch.jit.script(replacement.train(module.training))
        attribute_name = _attribute_name(module, name)
        module._c._register_attribute(attribute_name, scripted._c._type(), scripted._c)
        for method, site in places:
            _call_instead(method, site, attribute_name, scripted)
    for graph in graphs.values():
        torch._C._jit_pass_dce(graph)
        graph.lint()


def _check_places(name: str, places: list[tuple[MethodSites, Site]]) -> None:
    if not places:
        raise KeyError(name)
    methods = [site.method for _, site in places]
    if len(set(methods)) != len(methods) or any(site.input_at is None for _, site in places):
        raise ValueError(f"layer {name!r} is not one operator with one input and one output; it stays dense")


def _attribute_name(module: torch.jit.ScriptModule, layer: str) -> str:
    """Name the new submodule after the layer; a dot cannot be part of an attribute's name."""
    base = f"{layer.replace('.', '__')}__factors"
    name, number = base, 2
    while module._c.hasattr(name):
        name, number = f"{base}_{number}", number + 1
    return name


def _call_instead(method: MethodSites, site: Site, name: str, scripted: torch.jit.ScriptModule) -> None:
    graph: Graph = method.graph
    output: Value = site.output
    submodule = graph.create("prim::GetAttr", [method.root], 1)
    submodule.s_("name", name)
    submodule.output().setType(scripted._c._type())
    submodule.insertBefore(site.node)
    call = graph.create("prim::CallMethod", [submodule.output(), site.input], 1)
    call.s_("name", "forward")
    call.output().setType(output.type())
    call.insertBefore(site.node)
    call.copyMetadata(site.node)
    output.replaceAllUsesWith(call.output())
    site.node.destroy()
