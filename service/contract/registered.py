"""Spec classes that packages register under an entry point group, and the field that takes any of them."""

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


@cache
def registered(group: str) -> dict[str, type[Any]]:
    """Spec classes by their type, in order of the types."""
    return {point.name: point.load() for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def union_json_schema(default: str, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """JSON Schema of such a field: what is not the default must say its type."""
    made = handler(schema)
    for index, (name, branch) in enumerate(zip(schema["choices"], made["oneOf"], strict=True)):
        if name != default:
            made["oneOf"][index] = {**branch, "required": ["type"]}
    return made


def union_schema(group: str, default: str, noun: str, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Schema of a field that takes any registered spec class, told apart by `type`; without one it is the default."""

    def type_of(value: Any) -> Any:
        return value.get("type", default) if isinstance(value, dict) else getattr(value, "type", None)

    known = registered(group)
    return core_schema.tagged_union_schema(
        {name: handler.generate_schema(spec) for name, spec in known.items()},
        discriminator=type_of,
        custom_error_type=f"{noun}_type",
        custom_error_message=f"a {noun}'s type is one of {', '.join(known)}",
    )
