"""Layer rules and the terms of a sum, as a spec writes them."""

from collections.abc import Sequence
from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.strict import StrictModel

NamedReshape = Literal["channel", "spatial", "spatial_transposed", "matrix", "chunked"]
NAMED_RESHAPES: tuple[NamedReshape, ...] = ("channel", "spatial", "spatial_transposed", "matrix", "chunked")
Rank = Annotated[int, Field(ge=0)]


class GeneralReshape(StrictModel):
    """Any reshape: view the weight, permute the axes, read the result as a p×q matrix (methods L.3)."""

    view: list[PositiveInt] = Field(min_length=1, max_length=16)
    permute: list[Rank] = Field(min_length=1, max_length=16)
    matrix: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]  # a list in JSON

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if sorted(self.permute) != list(range(len(self.view))):
            raise PydanticCustomError(
                "reshape", "permute must name each of the {axes} axes of view once", {"axes": len(self.view)}
            )
        if prod(self.view) != prod(self.matrix):
            raise PydanticCustomError(
                "reshape",
                "view holds {viewed} elements and matrix {matrix}; they must be equal",
                {"viewed": prod(self.view), "matrix": prod(self.matrix)},
            )
        return self


class LowRankTermSpec(StrictModel):
    """A low-rank matrix under one reshape; its rank is learned unless `rank` fixes it."""

    type: Literal["low_rank"] = "low_rank"
    reshape: NamedReshape | GeneralReshape
    chunks: PositiveInt | Literal["auto"] = "auto"
    rank: PositiveInt | None = None
    min_rank: Rank | None = None
    max_rank: Rank | None = None

    @model_validator(mode="after")
    def _ranks_agree(self) -> Self:
        if self.chunks != "auto" and self.reshape != "chunked":
            raise PydanticCustomError("chunks", "chunks belongs to the reshape 'chunked'; remove it here")
        check_ranks(self.rank, self.min_rank, self.max_rank)
        return self


TermSpec = LowRankTermSpec


class LayerRule(StrictModel):
    """What may become of the layers whose names match; the first rule that matches a layer holds."""

    match: str = Field(default="*", min_length=1)
    kind: Literal["linear", "conv2d"] | None = None
    terms: Literal["auto"] | list[TermSpec] = "auto"
    keep: Literal["dense"] | None = None
    rank: PositiveInt | None = None
    min_rank: PositiveInt | None = None  # of the layer in total; without it a layer keeps at least rank 1
    max_rank: PositiveInt | None = None  # of each term that does not set its own
    cost_factor: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.keep and (self.rank or self.min_rank or self.max_rank or self.terms != "auto"):
            raise PydanticCustomError("keep", "keep 'dense' leaves nothing for terms or ranks; remove one of them")
        if isinstance(self.terms, list):
            if not self.terms:
                raise PydanticCustomError("terms", "terms must name at least one term, or be 'auto'")
            check_distinct(self.terms)
        check_ranks(self.rank, self.min_rank, self.max_rank)
        return self

    @property
    def fixes_its_size(self) -> bool:
        """Whether every rank under this rule is given, so that no budget is needed to choose it."""
        if self.keep or self.rank is not None:
            return True
        return isinstance(self.terms, list) and all(term.rank is not None for term in self.terms)


def check_ranks(rank: int | None, min_rank: int | None, max_rank: int | None) -> None:
    """Refuse ranks that contradict each other."""
    if rank is not None and (min_rank is not None or max_rank is not None):
        raise PydanticCustomError("rank", "rank fixes the rank; min_rank and max_rank must not stand beside it")
    if min_rank is not None and max_rank is not None and min_rank > max_rank:
        raise PydanticCustomError(
            "rank", "min_rank {low} is above max_rank {high}", {"low": min_rank, "high": max_rank}
        )


def check_distinct(terms: Sequence[TermSpec]) -> None:
    """Refuse two terms with the same reshape: their sum is one low-rank matrix (methods L.1)."""
    seen: list[object] = []
    for term in terms:
        key = (term.reshape, term.chunks) if term.reshape == "chunked" else term.reshape
        if key in seen:
            name = term.reshape if isinstance(term.reshape, str) else "the same view, permute and matrix"
            raise PydanticCustomError(
                "TERMS_NOT_DISTINCT",
                "two terms have the reshape {name}; their sum equals one term of that reshape: remove one",
                {"name": name},
            )
        seen.append(key)
