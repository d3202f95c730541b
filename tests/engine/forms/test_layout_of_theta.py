"""Numbers of Θ lie in memory as they do once they were saved: products of other layouts may round otherwise."""

import pytest
import torch

from service.contract.term_specs import TermSpec
from service.contract.terms import LowRankTermSpec, PruneTermSpec, QuantizeTermSpec, Tucker2TermSpec
from worker.engine.forms.geometry import Call, Geometry
from worker.engine.forms.registry import term_class
from worker.engine.forms.term import Accuracy, Ask, Price

SPECS: list[TermSpec] = [
    LowRankTermSpec(reshape="channel"),
    LowRankTermSpec(reshape="spatial"),
    LowRankTermSpec(reshape="best"),
    LowRankTermSpec(reshape="channel", store_dtype="float16"),
    LowRankTermSpec(reshape="channel", then=QuantizeTermSpec(bits=3)),
    Tucker2TermSpec(),
    QuantizeTermSpec(values=4),
    QuantizeTermSpec(scheme="fixed_point", bits=4, per_channel=True),
    PruneTermSpec(),
    PruneTermSpec(group="channel"),
    PruneTermSpec(group="channel", norm="l1", keep_fraction=0.5),
    PruneTermSpec(norm="l1", form="penalty", group="channel", alpha=0.1),
]


GROUPED = [spec for spec in SPECS if not isinstance(spec, Tucker2TermSpec)]  # which takes no grouped convolution


@pytest.mark.parametrize(
    ("spec", "groups"),
    [(spec, 1) for spec in SPECS] + [(spec, 3) for spec in GROUPED],
    ids=lambda value: str(getattr(value, "distinct_key", value)),
)
@pytest.mark.parametrize("shape", [(6, 12, 3, 3), (24, 3, 3, 3)])
def test_contiguous(spec: TermSpec, shape: tuple[int, ...], groups: int) -> None:
    calls = (Call((1, groups * shape[1], 5, 5), (1, shape[0], 5, 5)),)
    geometry = Geometry("conv2d", shape, calls, (1, 1), (1, 1), (1, 1), (0, 0), groups)
    term = term_class(spec.type).from_spec(spec, geometry)
    weight, warm = torch.randn(shape), None
    for accuracy in (Accuracy.SINGLE, Accuracy.WARM, Accuracy.EXACT):
        asked = term.units_asked(spec)
        low, high = asked if asked is not None else (2, min(3, term.units_max))
        warm = term.fit(weight.double(), Ask(0.0, low, high, 1.0, Price(params=1e-6), accuracy), warm)
        assert warm.units > 0
        for name, tensor in warm.tensors().items():
            assert tensor.is_contiguous(), name
