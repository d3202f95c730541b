"""What training minimises and what the report measures, as a spec says it."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from service.contract import ids
from service.contract.numbers import Magnitude
from service.contract.strict import StrictModel

OBJECTIVE_PART = "objective"  # the part of a multipart request that brings the module with it

NamedLoss = Literal["auto", "cross_entropy", "mse", "distillation"]
NamedMetric = Literal["auto", "accuracy", "top5", "perplexity", "mse", "psnr"]
METRICS_OF_LOSS: dict[str, tuple[NamedMetric, ...]] = {  # the first one is "auto"
    "cross_entropy": ("accuracy", "top5", "perplexity"),
    "mse": ("mse", "psnr"),
    "distillation": (),  # the relative error of the outputs
}


class ModuleLoss(StrictModel):
    """A TorchScript module with `loss(outputs, batch)`: an uploaded one's id, or `objective`, the request's part."""

    module: str

    @field_validator("module")
    @classmethod
    def _is_a_reference(cls, value: str) -> str:
        if value != OBJECTIVE_PART and not ids.is_id(value, ids.MODEL):
            raise PydanticCustomError(
                "module",
                "expected the id of an uploaded TorchScript module, or '{part}' with a part of that name",
                {"part": OBJECTIVE_PART},
            )
        return value


class Objective(StrictModel):
    """What training minimises, and the metric of the report."""

    loss: NamedLoss | ModuleLoss = "auto"
    metric: NamedMetric = "auto"
    distillation: float = Field(default=0.7, ge=0, le=1)  # weight of T²·KL to the reference's outputs
    temperature: Magnitude = 2.0
    class_dim: int = Field(default=1, ge=-16, le=15)
    ignore_index: int = Field(default=-100, ge=-(2**63), lt=2**63)
    peak: Magnitude | None = None  # of a psnr; by default the range of the targets that are trained on

    @model_validator(mode="before")
    @classmethod
    def _no_distillation_beside_a_module(cls, value: Any) -> Any:
        """Leave a loss of one's own alone, unless the spec asks for the mix."""
        if isinstance(value, dict) and isinstance(value.get("loss"), dict | ModuleLoss) and "distillation" not in value:
            return {**value, "distillation": 0.0}
        return value

    @model_validator(mode="after")
    def _metric_belongs_to_loss(self) -> Self:
        if self.metric == "auto":
            return self
        if isinstance(self.loss, ModuleLoss):
            raise PydanticCustomError(
                "metric", "a loss module says its metric itself, by a method metric(outputs, batch); remove metric"
            )
        if self.loss != "auto" and self.metric not in METRICS_OF_LOSS[self.loss]:
            known = ", ".join(METRICS_OF_LOSS[self.loss]) or "none but auto"
            raise PydanticCustomError(
                "metric",
                "the metric '{metric}' does not belong to the loss '{loss}', whose metrics are: {known}",
                {"metric": self.metric, "loss": self.loss, "known": known},
            )
        return self

    @property
    def module(self) -> str | None:
        """What names the loss module, if there is one."""
        return self.loss.module if isinstance(self.loss, ModuleLoss) else None


def with_module(document: dict[str, Any], module_id: str | None) -> dict[str, Any]:
    """A spec's document with the loss module named by its id; as it was where there is none."""
    if module_id is None:
        return document
    return {**document, "objective": {**document.get("objective", {}), "loss": {"module": module_id}}}
