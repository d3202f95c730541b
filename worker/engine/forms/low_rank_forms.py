"""What a low-rank term of a spec makes of a layer: one reshape, or the best of those that apply, factors quantized."""

from typing import Any, get_args

from service.contract.plan import Form, ReasonCode
from service.contract.terms import LowRankTermSpec, NamedReshape
from worker.engine.forms.best_reshape import best_of
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.quantized_factors import QuantizedFactorsTerm
from worker.engine.forms.term import Facts, NotApplicableError, Term


class LowRankForms(LowRankTerm):
    """Entry of the type "low_rank": its terms are of the classes that the spec and the facts ask for."""

    @classmethod
    def from_spec(cls, spec: Any, geometry: Geometry) -> Term:
        """Make the term of a `LowRankTermSpec`."""
        assert isinstance(spec, LowRankTermSpec)  # noqa: S101  registered for this spec
        one = LowRankTerm if spec.then is None else QuantizedFactorsTerm
        if spec.reshape != "best":
            return one.from_spec(spec, geometry)
        made = []
        for name in get_args(NamedReshape):
            if name == "best":
                continue
            try:
                term = one.from_spec(spec.model_copy(update={"reshape": name}), geometry)
            except NotApplicableError:
                continue
            assert isinstance(term, LowRankTerm)  # noqa: S101  of one reshape
            made.append(term)
        if not made:
            raise NotApplicableError(ReasonCode.TERM_NOT_APPLICABLE, Form.COMPOSED)
        return best_of(made)

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> Term:
        """Make the term again."""
        if "candidates" not in facts:
            return _one_from_facts(facts, geometry)
        return best_of([_one_from_facts(each, geometry) for each in facts["candidates"]])


def _one_from_facts(facts: Facts, geometry: Geometry) -> LowRankTerm:
    made = (QuantizedFactorsTerm if "then" in facts else LowRankTerm).from_facts(facts, geometry)
    assert isinstance(made, LowRankTerm)  # noqa: S101  of one reshape
    return made
