"""Replacement of layers inside the user's graphs by modules that do the same with fewer numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from worker.engine.network.branch import put_branch
from worker.engine.network.compose import compose_parameter
from worker.engine.network.graphs import Graph, Node, attribute_chain, self_value
from worker.engine.network.layers import Layer, find_layers
from worker.engine.network.parameters import Parameters
from worker.engine.network.plain_paths import simplify, take_plain_paths
from worker.engine.network.sites import open_plain, scan_methods


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
    layers = {layer.name: layer for layer in find_layers(module)}
    wanted = {
        name: asked if isinstance(asked, Replacement) else Replacement(branch=asked)
        for name, asked in replacements.items()
    }
    parameters = Parameters(module)
    weights = {name: _weight(parameters, name, layers) for name in wanted}
    factored = {weights[name] for name, each in wanted.items() if each.branch is not None}
    graphs = open_plain(module, fused=True)
    for graph in graphs.values():
        _unfuse(parameters, graph, factored)
    methods = scan_methods(module, graphs)
    for name, each in wanted.items():
        if each.branch is not None:
            layer = layers.get(name)
            if layer is None or layer.kind == "parameter" or layer.reason is not None:
                raise ValueError(f"{name!r} is not one operator with one input and one output; it takes no branch")
            attribute, scripted = _register(module, f"{name}__factors", each.branch)
            put_branch(module, methods, layer, attribute, scripted, added=each.weight is not None)
        if each.weight is not None:
            attribute, scripted = _register(module, f"{name.removesuffix('.weight')}__weight", each.weight)
            compose_parameter(module, graphs, set(parameters.names(weights[name])), attribute, scripted)
    for graph in graphs.values():
        torch._C._jit_pass_dce(graph)
        graph.lint()


def _weight(parameters: Parameters, name: str, layers: Mapping[str, Layer]) -> str:
    """Name the parameter that a layer's name, or a parameter's own name, stands for."""
    found = parameters.first(layers[name].weight if name in layers else None) or parameters.first(name)
    if found is None:
        raise KeyError(name)
    return found


def _unfuse(parameters: Parameters, graph: Graph, factored: set[str]) -> None:
    """Let attention whose weights become factors run its unfused path."""
    root = self_value(graph)

    def holds_factors(node: Node) -> bool:
        return any(parameters.first(attribute_chain(value, root)) in factored for value in node.inputs())

    if take_plain_paths(graph, holds_factors):
        simplify(graph)


def _register(module: torch.jit.ScriptModule, wanted: str, new: nn.Module) -> tuple[str, torch.jit.ScriptModule]:
    """Hold a new submodule at the root; it is named after the layer, and a dot cannot be part of a name."""
    base = wanted.replace(".", "__")
    name, number = base, 2
    while module._c.hasattr(name):
        name, number = f"{base}_{number}", number + 1
    scripted = torch.jit.script(new.train(module.training))
    module._c._register_attribute(name, scripted._c._type(), scripted._c)
    return name, scripted
