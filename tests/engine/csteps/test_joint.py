"""Terms that several layers share: one codebook, one number of kept weights, and the sums they stand in."""

import numpy as np
import pytest
import torch
from torch import Tensor

from service.contract.terms import LowRankTermSpec, PruneTermSpec, QuantizeTermSpec
from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.csteps.joint import project_jointly
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Price


class Layer:
    def __init__(self, choices: list[TermChoice]) -> None:
        self.choices = choices


def layer(weight: Tensor, *specs: object) -> Layer:
    m, n = weight.shape
    geometry = Geometry("linear", (m, n), (Call((1, n), (1, m)),))
    choices = []
    for place, spec in enumerate(specs):
        term = term_class(spec.type).from_spec(spec, geometry)  # type: ignore[attr-defined]
        joint = getattr(spec, "joint", False)
        asked = None if joint else term.units_asked(spec)
        low, high = asked or (0, term.units_max)
        choices.append(TermChoice(term, Price(params=1e-6), low, high, joint_group=f"0.{place}" if joint else None))
    return Layer(choices)


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape, scale in (((12, 20), 1.0), ((8, 12), 3.0))]


def jointly(layers: list[Layer], given: list[Tensor]) -> list[Projection]:
    alone = [project(weight, each.choices, 0.0) for weight, each in zip(given, layers, strict=True)]
    return project_jointly(layers, given, alone, 0.0)


def test_kept_weights_are_the_largest_of_all_layers() -> None:
    given = weights()
    layers = [layer(weight, PruneTermSpec(keep_fraction=0.1, joint=True)) for weight in given]
    made = jointly(layers, given)
    everything = np.concatenate([weight.double().numpy().ravel() for weight in given])
    kept = round(0.1 * everything.size)
    assert sum(projection.ranks[0] for projection in made) == kept
    threshold = np.sort(np.abs(everything))[-kept]
    for weight, each, projection in zip(given, layers, made, strict=True):
        expected = torch.where(weight.double().abs() >= threshold, weight.double(), 0.0)
        assert torch.equal(each.choices[0].term.project(projection.factors[0]), expected)


def test_a_codebook_is_that_of_all_weights_together() -> None:
    given = weights()
    spec = QuantizeTermSpec(values=3, joint=True)
    made = jointly([layer(weight, spec) for weight in given], given)
    whole = torch.cat([weight.reshape(-1) for weight in given]).reshape(1, -1)
    single = project(whole, layer(whole, QuantizeTermSpec(values=3)).choices, 0.0)
    assert sum(projection.error for projection in made) == pytest.approx(single.error, rel=1e-9)
    assert torch.equal(made[0].factors[0].values, made[1].factors[0].values)


def test_a_joint_term_in_a_sum_is_never_worse_than_the_start() -> None:
    given = weights(1)
    specs = (LowRankTermSpec(reshape="matrix", rank=2), PruneTermSpec(keep_fraction=0.05, joint=True))
    layers = [layer(weight, *specs) for weight in given]
    low_rank = [project(weight, layer(weight, specs[0]).choices, 0.0) for weight in given]
    made = jointly(layers, given)
    assert sum(each.error for each in made) < sum(each.error for each in low_rank)
    assert sum(each.ranks[1] for each in made) == round(0.05 * sum(weight.numel() for weight in given))
    for weight, each, projection in zip(given, layers, made, strict=True):
        parts = [choice.term.project(theta) for choice, theta in zip(each.choices, projection.factors, strict=True)]
        error = float((weight.double() - torch.stack(parts).sum(dim=0)).square().sum())
        assert projection.error == pytest.approx(error, rel=1e-9)


def test_layers_without_a_joint_term_stay_as_they_are() -> None:
    given = weights()
    layers = [layer(weight, LowRankTermSpec(reshape="matrix", rank=3)) for weight in given]
    alone = [project(weight, each.choices, 0.0) for weight, each in zip(given, layers, strict=True)]
    assert project_jointly(layers, given, alone, 0.0) == alone


def test_a_shared_radius_stays_what_the_first_step_made_it() -> None:
    given = weights()
    layers = [layer(weight, PruneTermSpec(norm="l1", keep_fraction=0.3, joint=True)) for weight in given]
    first = jointly(layers, given)
    moved = [
        (weight + each.choices[0].term.project(made.factors[0]).float()) / 2
        for weight, each, made in zip(given, layers, first, strict=True)
    ]
    alone = [
        project(weight, each.choices, 0.0, warm=made.factors)
        for weight, each, made in zip(moved, layers, first, strict=True)
    ]
    again = project_jointly(layers, moved, alone, 0.0)
    assert [made.factors[0].radius for made in again] == [made.factors[0].radius for made in first]
