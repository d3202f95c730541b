"""A term of one's own: a circulant matrix (Cheng et al., ICCV 2015), without PyTorch."""

from typing import ClassVar, Literal

from service.contract.term_specs import TermSpec


class CirculantTermSpec(TermSpec):
    """A square matrix whose rows are turns of one row: n numbers for n² weights."""

    engine: ClassVar[str] = "circulant_term:CirculantTerm"
    type: Literal["circulant"] = "circulant"
