"""From ranks and factors to the factored network, by a recipe that a fresh process can follow again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.csteps.additive import Projection
from worker.engine.forms.bias import ZeroWeight, bias_alone
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.modules import SumOfBranches, SumOfWeights, widen_factors
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Term
from worker.engine.layer_problem import LayerProblem
from worker.engine.network.load import load_model, reload
from worker.engine.network.replace import Replacement, replace_layers

Recipe = list[dict[str, Any]]


def make_recipe(problems: Sequence[LayerProblem], projections: Sequence[Projection]) -> Recipe:
    """Write down, as JSON, what each compressed layer becomes; dense layers are left out."""
    recipe: Recipe = []
    for problem, made in zip(problems, projections, strict=True):
        if made.dense:
            continue
        recipe.append(
            {
                "name": problem.layer.name,
                "bias": problem.layer.bias,
                "weight": problem.layer.weight,
                "geometry": asdict(problem.geometry),
                "terms": [
                    {
                        "place": place,
                        "type": choice.term.type_name,
                        "term": choice.term.facts(),
                        "theta": theta.facts(),
                        "codes": _codes(choice.term, theta),
                    }
                    for place, (choice, theta) in enumerate(zip(problem.choices, made.factors, strict=True))
                    if theta.units > 0
                ],
            }
        )
    return recipe


def assemble(
    source: Path,
    recipe: Recipe,
    device: torch.device,
    thetas: Mapping[str, Sequence[Any]] | None = None,
    trained: Mapping[str, Tensor] | None = None,
    *,
    as_stored: bool = False,
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
    thetas : mapping, optional
        Layer name to the Θ of each of its terms; untrained ones of the same shapes where they are loaded later.
    trained : mapping, optional
        Trained parameters by name, from which the biases are taken; the reference's own where it is not given.
    as_stored : bool
        Hold numbers in the dtypes of the file; otherwise wide enough to be trained, with the same answers.

    Returns
    -------
    ScriptModule
        Saved and loaded again: an edited module must not be run (it may keep an old plan).
    """
    module = load_model(source, "cpu")
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    biases = parameters if trained is None else trained
    replacements: dict[str, nn.Module | Replacement] = {}
    for layer in recipe:
        weight = parameters[layer["weight"]]
        bias = biases[layer["bias"]].detach() if layer["bias"] else None
        given = thetas[layer["name"]] if thetas is not None else None
        made = _emit(layer, given, bias, weight.dtype)
        for part in (made.branch, made.weight):
            if part is not None and not as_stored:
                widen_factors(part)
        replacements[layer["name"]] = made
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


def _emit(layer: dict[str, Any], given: Sequence[Any] | None, bias: Tensor | None, dtype: torch.dtype) -> Replacement:
    """Make what stands in the layer's place: the branch of its factored terms, the weight of its composed ones."""
    geometry = geometry_from(layer["geometry"])
    composed: list[nn.Module] = []
    factored: list[tuple[Term, Any]] = []
    for spec in layer["terms"]:
        term = term_class(spec["type"]).from_facts(spec["term"], geometry)
        if given is None:
            theta = _untrained(term, spec["theta"], dtype)
        else:
            theta = term.restore(_of_dtype(given[spec["place"]].tensors(), dtype), spec["theta"])
        if term.composed:
            composed.append(term.emit_weight(theta))
        else:
            factored.append((term, theta))
    weight = (composed[0] if len(composed) == 1 else SumOfWeights(composed)) if composed else None
    if not factored and not composed:
        return _nothing(geometry, bias, dtype)
    if not factored:
        return Replacement(None, weight)
    branches = [
        term.emit(theta, bias if number == 0 and weight is None else None)
        for number, (term, theta) in enumerate(factored)
    ]
    return Replacement(branches[0] if len(branches) == 1 else SumOfBranches(branches), weight)


def _nothing(geometry: Geometry, bias: Tensor | None, dtype: torch.dtype) -> Replacement:
    """What stands for a layer whose terms all fell away: its bias, or a weight of zeros for operators unknown."""
    if geometry.kind == "parameter":
        return Replacement(None, ZeroWeight(list(geometry.weight_shape), dtype))
    return Replacement(bias_alone(geometry, bias, dtype), None)


def _untrained(term: Term, facts: dict[str, Any], dtype: torch.dtype) -> Any:
    """Make a Θ whose numbers are loaded later; what it stores in another dtype than the layer's stays so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return term.restore({}, facts)
    finally:
        torch.set_default_dtype(before)


def code_count(recipe: Recipe) -> int:
    """Numbers that the artifact holds as packed codes, in buffers and not in parameters."""
    return sum(int(term["codes"]) for layer in recipe for term in layer["terms"])


def geometry_from(held: Mapping[str, Any]) -> Geometry:
    """Make a geometry from JSON; its calls too, by which an emitted chain chooses its cheaper order."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in held.items()}
    calls = tuple(Call(tuple(call["input_shape"]), tuple(call["output_shape"])) for call in held["calls"])
    return Geometry(**(values | {"calls": calls}))


def _codes(term: Term, theta: Any) -> int:
    """Numbers of a Θ that its module holds in buffers."""
    module = term.emit_weight(theta) if term.composed else term.emit(theta, None)
    trained: int = sum(parameter.numel() for parameter in module.parameters())
    return int(term.counts(theta).params) - trained


def _of_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers in the layer's dtype, on the CPU; codes and indices as they are."""
    return {
        name: tensor.detach().cpu().to(dtype) if tensor.is_floating_point() else tensor.detach().cpu()
        for name, tensor in tensors.items()
    }
