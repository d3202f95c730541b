"""What every method has in a spec, and the methods that are installed (entry points ``rankpress.methods``)."""

from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.contract.registered import registered, union_json_schema, union_schema
from service.contract.strict import StrictModel

GROUP = "rankpress.methods"
DEFAULT = "learning_compression"


class MethodSpec(StrictModel):
    """A method of compression."""

    engine: ClassVar[str]  # "package.module:Class", a worker.engine.methods.context.Method
    type: str

    @property
    def steers_size(self) -> bool:
        """Whether the method itself says how far to compress, so that no budget is needed (nor allowed)."""
        return False

    @property
    def step_count(self) -> int:
        """Steps before the factored network is trained."""
        return 1

    def epochs_of_steps(self, epochs_per_step: int) -> int:  # noqa: ARG002
        """Epochs of these steps."""
        return 0

    def resolutions(self) -> dict[str, Any]:
        """Fields whose `auto` needs neither model nor data, resolved, by their dotted paths."""
        return {}


class AnyMethod:
    """Annotation of a field that takes any installed method."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Tell methods apart by their type."""
        return union_schema(GROUP, DEFAULT, "method", handler)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The same in words of JSON Schema."""
        return union_json_schema(DEFAULT, schema, handler)


def method_specs() -> dict[str, type[MethodSpec]]:
    """The spec class of every installed method, by its type."""
    return registered(GROUP)
