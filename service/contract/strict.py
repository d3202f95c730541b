"""The base of every part of the spec: unknown fields are refused with the nearest valid name."""

from difflib import get_close_matches
from typing import Any

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
            nearest = get_close_matches(unknown[0], names, n=1, cutoff=0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"valid fields are {', '.join(names)}"
            raise PydanticCustomError(
                "unknown_field", "unknown field '{field}'; {hint}", {"field": unknown[0], "hint": hint}
            )
        return value
