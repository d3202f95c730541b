"""The terms that come with the product, as a spec writes them (methods L.1, L.3, L.4)."""

from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from service.contract.strict import StrictModel
from service.contract.term_specs import Saving, TermSpec

NamedReshape = Literal["channel", "spatial", "spatial_transposed", "matrix", "chunked", "kronecker", "best"]
NAMED_RESHAPES: tuple[NamedReshape, ...] = (
    "channel",
    "spatial",
    "spatial_transposed",
    "matrix",
    "chunked",
    "kronecker",
    "best",
)
Rank = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Unpack = Literal["load", "call"]  # load: once, at the first call in evaluation mode; call: at every call
Scheme = Literal["codebook", "binary", "scaled_binary", "ternary", "fixed_point", "power_of_two"]


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


class QuantizeTermSpec(TermSpec):
    """Weights of a few values: a codebook of k learned values, or a grid, stored as packed codes (methods L.4)."""

    engine: ClassVar[str] = "worker.engine.forms.quantized:QuantizeTerm"
    type: Literal["quantize"] = "quantize"
    scheme: Scheme = "codebook"
    values: Annotated[int, Field(ge=2, le=65536)] | None = None  # of a codebook
    bits: Annotated[int, Field(ge=1, le=16)] | None = None  # of a grid, or of a codebook of 2^bits values
    per_channel: bool = False  # one codebook or scale for each output channel
    joint: bool = False  # one codebook or scale for all layers of the rule
    unpack: Unpack = "load"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        grid, named = self.scheme in {"fixed_point", "power_of_two"}, self.scheme
        if self.scheme == "codebook" and (self.values is None) == (self.bits is None):
            raise PydanticCustomError("values", "a codebook has either values (their number) or bits; give one of them")
        if grid and (self.bits is None or self.values is not None):
            raise PydanticCustomError("bits", "the scheme '{scheme}' takes bits, and no values", {"scheme": named})
        if self.scheme in {"binary", "scaled_binary", "ternary"} and (self.values, self.bits) != (None, None):
            raise PydanticCustomError(
                "values", "the scheme '{scheme}' has its values; remove values and bits", {"scheme": named}
            )
        if self.scheme == "power_of_two" and self.bits == 1:
            raise PydanticCustomError("bits", "power_of_two needs 2 bits or more: a sign and exponents")
        if self.joint and self.per_channel:
            raise PydanticCustomError("joint", "joint and per_channel contradict each other; keep one")
        return self

    @property
    def saves(self) -> Saving:
        """The numbers stay, each in few bits."""
        return "bytes"

    @property
    def codebook_size(self) -> int:
        """Number of distinct values."""
        named = {"binary": 2, "scaled_binary": 2, "ternary": 3}
        return named.get(self.scheme) or self.values or 2 ** (self.bits or 1)

    @property
    def distinct_key(self) -> object:
        """Two layers of codes on the same weight are allowed only where they differ in their values."""
        return (self.type, self.scheme, self.codebook_size, self.per_channel)

    @classmethod
    def abilities(cls) -> dict[str, Any]:
        """The schemes."""
        return {**super().abilities(), "schemes": list(get_args(Scheme))}


class LowRankTermSpec(TermSpec):
    """A low-rank matrix under one reshape; its rank is learned unless `rank` fixes it."""

    engine: ClassVar[str] = "worker.engine.forms.low_rank_forms:LowRankForms"
    type: Literal["low_rank"] = "low_rank"
    reshape: NamedReshape | GeneralReshape = "best"  # best: the C step chooses for each layer
    chunks: PositiveInt | Literal["auto"] = "auto"
    kronecker: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None  # (m₁, n₁) of Aₖ
    rank: PositiveInt | None = None
    min_rank: Rank | None = None
    max_rank: Rank | None = None
    then: QuantizeTermSpec | None = None  # the factors quantized
    store_dtype: Literal["float16", "bfloat16"] | None = None  # of the factors in the file

    @model_validator(mode="after")
    def _ranks_agree(self) -> Self:
        if self.chunks != "auto" and self.reshape != "chunked":
            raise PydanticCustomError("chunks", "chunks belongs to the reshape 'chunked'; remove it here")
        if self.kronecker is not None and self.reshape != "kronecker":
            raise PydanticCustomError("kronecker", "kronecker belongs to the reshape 'kronecker'; remove it here")
        if self.then is not None and self.store_dtype is not None:
            raise PydanticCustomError("then", "then and store_dtype both say how factors are stored; keep one")
        if self.then is not None and (self.then.joint or self.then.per_channel):
            raise PydanticCustomError("then", "the factors of a term have one codebook each: no joint, no per_channel")
        check_ranks(self.rank, self.min_rank, self.max_rank)
        return self

    @property
    def fixes_its_size(self) -> bool:
        """Whether the rank is given."""
        return self.rank is not None

    @property
    def saves(self) -> Saving:
        """Fewer numbers, and with `then` or `store_dtype` in fewer bits."""
        return "params" if self.then is None and self.store_dtype is None else "bytes"

    @property
    def distinct_key(self) -> object:
        """The reshape: two terms under the same one are one low-rank matrix."""
        return (self.reshape, self.chunks, self.kronecker)

    @classmethod
    def abilities(cls) -> dict[str, Any]:
        """The reshapes."""
        return {**super().abilities(), "reshapes": [*NAMED_RESHAPES, "general"]}


class Tucker2TermSpec(TermSpec):
    """A convolution as 1×1, a smaller k×k core, and 1×1 (HOSVD and HOOI); ranks are learned unless given."""

    engine: ClassVar[str] = "worker.engine.forms.tucker2:Tucker2Term"
    type: Literal["tucker2"] = "tucker2"
    ranks: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = (
        None  # (outputs, inputs) of the core
    )

    @property
    def fixes_its_size(self) -> bool:
        """Whether the ranks are given."""
        return self.ranks is not None

    @property
    def distinct_key(self) -> object:
        """The sum of two such terms is one of the sum of their ranks' outputs and inputs, whose core has blocks."""
        return self.type


class PruneTermSpec(TermSpec):
    """Few weights, filters or channels that are not zero; how many is learned unless the spec says (methods L.4).

    Single weights save bytes and no multiply-adds; whole filters and channels save both.
    """

    engine: ClassVar[str] = "worker.engine.forms.pruned:PruneTerm"
    type: Literal["prune"] = "prune"
    norm: Literal["l0", "l1"] = "l0"
    form: Literal["constraint", "penalty"] = "constraint"
    keep_fraction: Share | None = None  # l0 constraint: κ; l1 constraint: the ball's radius as a part of ‖W‖₁
    alpha: Annotated[float, Field(gt=0)] | None = None  # of a penalty
    group: Literal["weight", "filter", "channel"] = "weight"
    joint: bool = False  # one κ, radius or threshold for all layers of the rule
    unpack: Unpack = "load"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.form == "penalty") != (self.alpha is not None):
            raise PydanticCustomError("alpha", "alpha is the weight of a penalty: give it with form 'penalty' alone")
        if self.form == "penalty" and self.keep_fraction is not None:
            raise PydanticCustomError("keep_fraction", "keep_fraction belongs to form 'constraint'; remove it here")
        if self.norm == "l1" and self.form == "constraint" and self.keep_fraction is None:
            raise PydanticCustomError(
                "keep_fraction", "an l1 constraint needs keep_fraction: its radius as a part of the weight's own norm"
            )
        if self.joint and self.keep_fraction is None and self.alpha is None:
            raise PydanticCustomError("joint", "joint needs keep_fraction or alpha to share among the layers")
        return self

    @property
    def saves(self) -> Saving:
        """Single weights are stored with their positions: fewer numbers are not always fewer bytes."""
        return "bytes" if self.group == "weight" else "params"

    @property
    def fixes_its_size(self) -> bool:
        """Whether the spec says how much is kept, or what weighs against keeping it."""
        return self.keep_fraction is not None or self.alpha is not None

    @property
    def distinct_key(self) -> object:
        """Two sparse terms of the same groups are one."""
        return (self.type, self.group)


def check_ranks(rank: int | None, min_rank: int | None, max_rank: int | None) -> None:
    """Refuse ranks that contradict each other."""
    if rank is not None and (min_rank is not None or max_rank is not None):
        raise PydanticCustomError("rank", "rank fixes the rank; min_rank and max_rank must not stand beside it")
    if min_rank is not None and max_rank is not None and min_rank > max_rank:
        raise PydanticCustomError(
            "rank", "min_rank {low} is above max_rank {high}", {"low": min_rank, "high": max_rank}
        )
