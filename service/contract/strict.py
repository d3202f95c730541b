"""The base of every part of the spec: unknown fields are refused with the nearest valid name."""

from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """A part of the spec; immutable, closed against unknown fields, and strict as its schema: "25" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names = [field.alias or name for name, field in cls.model_fields.items()]
        accepted = {*names, *cls.model_fields}
        unknown = [str(key) for key in value if key not in accepted]
        if unknown:
            deeper = [f"{name}.{unknown[0]}" for name in names if unknown[0] in _fields_inside(cls, name)]
            nearest = deeper or get_close_matches(unknown[0], names, n=1, cutoff=0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"valid fields are {', '.join(names)}"
            raise PydanticCustomError(
                "unknown_field", "unknown field '{field}'; {hint}", {"field": unknown[0], "hint": hint}
            )
        return value


def _fields_inside(part: type[BaseModel], name: str) -> set[str]:
    """Name the fields of the objects that a field takes."""
    pending: list[Any] = [field.annotation for key, field in part.model_fields.items() if name in (key, field.alias)]
    found: set[str] = set()
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(annotation.model_fields)
        pending.extend(get_args(annotation))
    return found
