"""The job spec, version 1: one meaning of what to do, with every default in one place."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from service.contract.data_spec import DataSpec, ExampleInput
from service.contract.errors import ErrorCode, FieldError, ProblemError
from service.contract.layer_rule import LayerRule
from service.contract.learning_compression_spec import LearningCompressionSpec, MuSchedule
from service.contract.method_specs import AnyMethod, MethodSpec, method_specs
from service.contract.numbers import Auto, Positive
from service.contract.objective_spec import Objective
from service.contract.size_spec import Budget, CostWeights, Metric
from service.contract.strict import StrictModel
from service.contract.term_specs import term_specs
from service.contract.training_spec import SCHEDULES, FineTune, SgdSpec, Training

__all__ = [
    "Budget",
    "CostWeights",
    "DataSpec",
    "ExampleInput",
    "FineTune",
    "JobSpec",
    "LearningCompressionSpec",
    "Metric",
    "MuSchedule",
    "Objective",
    "SgdSpec",
    "Training",
    "parse_spec",
]

Output = Literal["torchscript"]


class Deadlines(StrictModel):
    """How long a job may take, in seconds; null is the service's own limit.

    `queue_seconds` is how long it may wait before it begins.
    """

    queue_seconds: Positive | None = None
    run_seconds: Positive | None = None
    first_forward_seconds: Positive | None = None


class Resources(StrictModel):
    """What a worker must have to run the job."""

    min_gpu_memory_bytes: int | None = Field(default=None, gt=0, lt=2**63)


class JobSpec(StrictModel):
    """What to do with a model. Only the size must be said: `{"budget": {"max_macs_fraction": 0.3}}`."""

    version: Literal[1] = 1
    method: Annotated[MethodSpec, AnyMethod] = LearningCompressionSpec()
    layers: list[LayerRule] = Field(default_factory=lambda: [LayerRule()], min_length=1)
    budget: Budget | None = None
    cost: Auto | Metric | CostWeights = "auto"
    objective: Objective = Objective()
    data: DataSpec = DataSpec()
    example_inputs: list[ExampleInput] | None = Field(default=None, min_length=1)
    training: Training = Training()
    fine_tune: FineTune = FineTune()
    outputs: list[Output] = Field(default_factory=lambda: list[Output](["torchscript"]), min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deadlines: Deadlines = Deadlines()
    resources: Resources = Resources()
    priority: int = Field(default=0, ge=-100, le=100)  # lower runs first
    max_attempts: int | None = Field(default=None, ge=1, le=100)

    @model_validator(mode="after")
    def _size_is_said(self) -> Self:
        if self.budget is not None and self.method.steers_size:
            raise PydanticCustomError(
                "budget_and_lambda", "budget and method.lambda both steer the size; keep one and remove the other"
            )
        if self.budget is None and not self.method.steers_size and not self.fixes_its_size:
            raise PydanticCustomError(
                "SIZE_MISSING",
                "the size is not said: give budget (for example {example}), or method.lambda, or a fixed size (a rank, "
                "values, keep_fraction, …) for every term of every rule",
                {"example": '{"max_macs_fraction": 0.3}'},
            )
        return self

    @model_validator(mode="after")
    def _gpu_memory_is_of_a_gpu(self) -> Self:
        if self.device == "cpu" and self.resources.min_gpu_memory_bytes is not None:
            raise PydanticCustomError(
                "gpu_memory_on_cpu", "resources.min_gpu_memory_bytes asks for a GPU, device for the CPU; remove one"
            )
        return self

    @property
    def fixes_its_size(self) -> bool:
        """Whether every rule fixes the ranks of its layers."""
        return all(rule.fixes_its_size for rule in self.layers)

    @property
    def cost_metric(self) -> Metric | CostWeights:
        """The C of the papers: by default the budget's metric, without a budget what the terms make less of."""
        if self.cost != "auto":
            return self.cost
        if self.budget is not None:
            return self.budget.metric
        return "bytes" if any(rule.saves == "bytes" for rule in self.layers) else "params"

    def cost_weights(self) -> CostWeights:
        """The same as weights of counts."""
        cost = self.cost_metric
        return cost if isinstance(cost, CostWeights) else CostWeights.model_validate({cost: 1.0})

    def on_the_wire(self) -> dict[str, Any]:
        """The spec as JSON, with the field names a user writes."""
        return self.model_dump(mode="json", by_alias=True)


def parse_spec(raw: object) -> JobSpec:
    """Read a spec, or raise `SPEC_INVALID`, `TERMS_NOT_DISTINCT` or `SIZE_MISSING` with each wrong place."""
    if not isinstance(raw, dict):
        raise ProblemError(
            ErrorCode.SPEC_INVALID, f"a spec is a JSON object such as {{'budget': …}}; found {type(raw).__name__}"
        )
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        # Of a union's complaints the one that reaches deepest is the branch the user meant.
        errors = sorted(_meant([_field_error(detail) for detail in details]), key=lambda item: -item.pointer.count("/"))
        known = [ErrorCode(item.code) for item in errors if item.code in ErrorCode.__members__]
        code = known[0] if known else ErrorCode.SPEC_INVALID
        first = errors[0]
        more = f" (and {len(errors) - 1} more, see errors)" if len(errors) > 1 else ""
        where = f"{first.pointer}: " if first.pointer else ""
        raise ProblemError(code, f"{where}{first.message}{more}", errors=errors) from None


_UNION_TAGS = frozenset({"constrained-float", "constrained-int", "int", "float", "str", "literal['auto']"})
_WITHOUT_TAG = frozenset({"union_tag_not_found", "union_tag_invalid", "model_attributes_type"})
_OF_A_TYPE = frozenset({"term_type", "method_type"})
_CLASS = re.compile(r"a valid dictionary or instance of \w+")
_SHOULD_BE = "Input should be "


def _meant(errors: list[FieldError]) -> list[FieldError]:
    """Leave out what branches of a union say that the user did not mean, and say what several expect in one line."""
    made: dict[str, FieldError] = {}
    kept: list[FieldError] = []
    for error in errors:
        if not _is_mismatch(error):
            kept.append(error)
        elif any(_says_more(other, error) for other in errors):
            continue
        elif error.pointer in made:
            first, (expected, semicolon, found) = made[error.pointer], made[error.pointer].message.partition("; found ")
            other = error.message.removeprefix(_SHOULD_BE).partition("; found ")[0]
            made[error.pointer] = FieldError(
                pointer=first.pointer, code=first.code, message=f"{expected}, or {other}{semicolon}{found}"
            )
        else:
            made[error.pointer] = error
    return [*kept, *made.values()]


def _is_mismatch(error: FieldError) -> bool:
    """Whether a value is of another kind than a branch takes."""
    return error.message.startswith(_SHOULD_BE) and (error.code == "literal_error" or error.code.endswith("_type"))


def _says_more(other: FieldError, mismatch: FieldError) -> bool:
    same = other.pointer == mismatch.pointer
    return (same and not _is_mismatch(other)) or other.pointer.startswith(f"{mismatch.pointer}/")


def _field_error(detail: ErrorDetails) -> FieldError:
    """Turn pydantic's location into a JSON pointer of the user's own document: without the names of unions."""
    loc = detail["loc"]
    parts = [
        str(part)
        for before, part in zip((None, *loc), loc, strict=False)
        if isinstance(part, int)
        or (
            (part.islower() and part not in _UNION_TAGS and "[" not in part)
            and not (isinstance(before, int) and part in term_specs())
            and not (before == "method" and part in method_specs())
            and not (str(before).startswith("tagged-union[") and part in SCHEDULES)
        )
    ]
    if detail["type"] == "unknown_field":
        parts.append(str(detail["ctx"]["field"]))
    pointer = "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in parts)
    if parts[-1:] == ["schedule"] and detail["type"] in _WITHOUT_TAG:
        known = ", ".join(SCHEDULES)
        message = f'expected "auto" or an object such as {{"type": "cosine"}}, whose type is one of {known}'
        return FieldError(pointer=pointer, code="schedule_type", message=message)
    found = detail.get("input")
    if detail["type"] in _OF_A_TYPE and isinstance(found, dict):
        found = found.get("type")
    shown = f"; found {found!r}" if isinstance(found, (str, int, float, bool)) or found is None else ""
    shown = "" if detail["type"] in {"unknown_field", "missing"} or len(shown) > 100 else shown
    said = _CLASS.sub("an object", detail["msg"])
    return FieldError(pointer=pointer, code=detail["type"], message=f"{said}{shown}")
