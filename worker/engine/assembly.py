"""From ranks and factors to the factored network, by a recipe that a fresh process can follow again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.csteps.additive import Projection
from worker.engine.forms.factors import Factors
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.modules import SumOfBranches
from worker.engine.forms.reshape import Reshape
from worker.engine.layer_rules import LayerProblem
from worker.engine.network.load import load_model, reload
from worker.engine.network.replace import replace_layers

Recipe = list[dict[str, Any]]


def make_recipe(problems: Sequence[LayerProblem], projections: Sequence[Projection]) -> Recipe:
    """Write down, as JSON, what each compressed layer becomes; dense layers are left out."""
    recipe: Recipe = []
    for problem, made in zip(problems, projections, strict=True):
        if made.dense:
            continue
        geometry = problem.choices[0].term.geometry
        terms = [
            {
                "place": place,
                "rank": rank,
                "view": list(choice.term.reshape.view),
                "permute": list(choice.term.reshape.permute),
                "matrix": list(choice.term.reshape.matrix),
            }
            for place, (choice, rank) in enumerate(zip(problem.choices, made.ranks, strict=True))
            if rank > 0
        ]
        recipe.append(
            {
                "name": problem.layer.name,
                "kind": geometry.kind,
                "weight_shape": list(geometry.weight_shape),
                "stride": list(geometry.stride),
                "padding": list(geometry.padding),
                "dilation": list(geometry.dilation),
                "bias": problem.layer.bias,
                "weight": problem.layer.weight,
                "terms": terms,
            }
        )
    return recipe


def assemble(
    source: Path,
    recipe: Recipe,
    device: torch.device,
    factors: Mapping[str, Sequence[Factors]] | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> torch.jit.ScriptModule:
    """Load the reference afresh and replace its layers as the recipe says.

    Parameters
    ----------
    source : Path
        The reference's file.
    recipe : list of dict
        From `make_recipe`.
    device : torch.device
        Where the network shall stand.
    factors : mapping, optional
        Layer name to the factors of each of its terms; zeros where they are loaded later.
    trained : mapping, optional
        Trained parameters by name, from which the biases are taken; the reference's own where it is not given.

    Returns
    -------
    ScriptModule
        Saved and loaded again: an edited module must not be run (it may keep an old plan).
    """
    module = load_model(source, "cpu")
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    biases = parameters if trained is None else trained
    replacements: dict[str, nn.Module] = {}
    for layer in recipe:
        weight = parameters[layer["weight"]]
        bias = biases[layer["bias"]].detach() if layer["bias"] else None
        given = factors[layer["name"]] if factors is not None else None
        replacements[layer["name"]] = _emit(layer, given, bias, weight.dtype)
    replace_layers(module, replacements)
    network = reload(module, device)
    live = dict(network.named_parameters())
    for layer in recipe:
        live[layer["weight"]].requires_grad_(False)  # nothing uses it any more; the export drops it
    return network


def load_state(module: torch.jit.ScriptModule, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers by name; names that the module lacks are passed over."""
    with torch.no_grad():
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])


def state_of(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """Copy of every parameter and buffer, on the CPU."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in _own(module).items()}


def state_in_place(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """Every parameter and buffer, contiguous on the CPU, and not copied where it lies so: to be written at once."""
    made: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in _own(module).items():
        there = tensor.cpu().contiguous()
        storage = there.untyped_storage().data_ptr()
        made[name] = there.clone() if storage in known else there  # a file of tensors holds none that share memory
        known.add(storage)
    return made


def live(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """State of a factored network without the dense weights that nothing uses any more."""
    dead = {layer["weight"] for layer in recipe}
    return {name: tensor for name, tensor in state.items() if name not in dead}


def live_state(module: torch.jit.ScriptModule, recipe: Recipe) -> dict[str, Tensor]:
    """Copy of what is live in a factored network, on the CPU."""
    return live(state_of(module), recipe)


def _own(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in own.items()}


def _emit(layer: dict[str, Any], given: Sequence[Factors] | None, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    geometry = Geometry(
        layer["kind"],
        tuple(layer["weight_shape"]),
        (),
        _pair(layer["stride"]),
        _pair(layer["padding"]),
        _pair(layer["dilation"]),
    )
    branches = []
    for number, spec in enumerate(layer["terms"]):
        p, q = spec["matrix"]
        term = LowRankTerm(Reshape(tuple(spec["view"]), tuple(spec["permute"]), (p, q)), geometry)
        if given is None:
            made = Factors(torch.zeros(p, spec["rank"], dtype=dtype), torch.zeros(spec["rank"], q, dtype=dtype))
        else:
            held = given[spec["place"]]
            made = Factors(held.left.cpu().to(dtype), held.right.cpu().to(dtype))
        branches.append(term.emit(made, bias if number == 0 else None))
    return branches[0] if len(branches) == 1 else SumOfBranches(branches)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[1])
