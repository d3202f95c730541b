"""Layer rules: what may become of which layers, as a spec writes it."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.strict import StrictModel
from service.contract.term_specs import AnyTerm, Saving, TermSpec
from service.contract.terms import LowRankTermSpec, Rank, check_ranks

# What says the size of a term that has no rank.
_SIZES = {
    "tucker2": ", or give the term's ranks",
    "quantize": ", or give the term's values or bits",
    "prune": ", or give the term's keep_fraction",
}
PARAMETER_PREFIX = "parameter:"
LayerKind = Literal[
    "linear",
    "matmul",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "parameter",
]


class LayerRule(StrictModel):
    """What may become of the layers whose names match; the first rule that matches a layer holds.

    A match that begins with "parameter:" names parameters by their qualified names, whatever operator uses them.
    """

    match: str = Field(default="*", min_length=1)
    kind: LayerKind | None = None
    terms: Literal["auto"] | list[Annotated[TermSpec, AnyTerm]] = "auto"
    keep: Literal["dense"] | None = None
    rank: PositiveInt | None = None
    min_rank: Rank | None = None  # of the layer in total; without it a layer keeps at least rank 1
    max_rank: PositiveInt | None = None  # of each low-rank term that does not set its own
    cost_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.keep and (self.terms != "auto" or {self.rank, self.min_rank, self.max_rank} != {None}):
            raise PydanticCustomError("keep", "keep 'dense' leaves nothing for terms or ranks; remove one of them")
        if self.match.startswith(PARAMETER_PREFIX) and self.kind not in {None, "parameter"}:
            raise PydanticCustomError("kind", "a rule for parameters has no other kind; remove kind")
        if isinstance(self.terms, list):
            if not self.terms:
                raise PydanticCustomError("terms", "terms must name at least one term, or be 'auto'")
            check_distinct(self.terms)
            self._check_ranks_have_terms(self.terms)
        check_ranks(self.rank, self.min_rank, self.max_rank)
        return self

    def _check_ranks_have_terms(self, terms: Sequence[TermSpec]) -> None:
        """Refuse ranks that no term of the rule takes."""
        given = [name for name in ("rank", "max_rank") if getattr(self, name) is not None]
        if given and not any(isinstance(term, LowRankTermSpec) for term in terms):
            raise PydanticCustomError(
                given[0],
                "{name} is of low_rank terms, and the rule has none, only {types}: remove it{instead}",
                {
                    "name": given[0],
                    "types": ", ".join(term.type for term in terms),
                    "instead": _SIZES.get(terms[0].type, ""),
                },
            )

    @property
    def fixes_its_size(self) -> bool:
        """Whether every size under this rule is given, so that no budget is needed to choose it."""
        if self.keep or (self.rank is not None and (self.terms == "auto" or self._low_rank_alone)):
            return True
        return isinstance(self.terms, list) and all(
            term.fixes_its_size or (self.rank is not None and isinstance(term, LowRankTermSpec)) for term in self.terms
        )

    @property
    def saves(self) -> Saving:
        """What its terms make less of: numbers, or bytes where any of them keeps the numbers."""
        kinds = {term.saves for term in self.terms} if isinstance(self.terms, list) else set()
        return "bytes" if "bytes" in kinds else "params"

    @property
    def _low_rank_alone(self) -> bool:
        return all(isinstance(term, LowRankTermSpec) for term in self.terms)


def check_distinct(terms: Sequence[TermSpec]) -> None:
    """Refuse two terms whose sum is one term of the same kind: two low-rank matrices of one reshape (methods L.1)."""
    seen: list[object] = []
    for term in terms:
        key = term.distinct_key
        if key is not None and key in seen:
            reshape = term.reshape if isinstance(term, LowRankTermSpec) else None
            name = f"the reshape {reshape}" if isinstance(reshape, str) else "the same view, permute and matrix"
            raise PydanticCustomError(
                "TERMS_NOT_DISTINCT",
                "two terms have {name}; their sum equals one such term: remove one",
                {"name": name if isinstance(term, LowRankTermSpec) else f"the type {term.type}"},
            )
        seen.append(key)
