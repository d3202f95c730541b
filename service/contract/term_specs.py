"""What every term of a sum has in a spec, and the terms that are installed (entry points ``rankpress.terms``).

An entry point names a spec class that needs pydantic alone; the class names its compression in the engine, which a
worker loads when it meets the term. So the API knows, checks and describes a term without loading PyTorch.
"""

from typing import Any, ClassVar, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.contract.registered import registered, union_json_schema, union_schema
from service.contract.strict import StrictModel

Saving = Literal["params", "bytes"]
GROUP = "rankpress.terms"
DEFAULT = "low_rank"  # of a term that does not say its type


class TermSpec(StrictModel):
    """A term of the sum that a layer's weight becomes."""

    engine: ClassVar[str]  # "package.module:Class", a worker.engine.forms.term.Term
    type: str

    @property
    def fixes_its_size(self) -> bool:
        """Whether the term's size is given, so that no budget is needed to choose it."""
        return True

    @property
    def saves(self) -> Saving:
        """What the term makes less of, numbers or only bytes: what size is counted in where the spec does not say."""
        return "params"

    @property
    def distinct_key(self) -> object:
        """Equal for two terms of one rule whose sum is a single term of the same kind; None where that cannot be."""
        return None

    @classmethod
    def abilities(cls) -> dict[str, Any]:
        """What `capabilities` says of the term beside its type."""
        return {"description": (cls.__doc__ or "").strip().partition("\n")[0]}


def term_specs() -> dict[str, type[TermSpec]]:
    """The spec class of every installed term, by its type."""
    return registered(GROUP)


class AnyTerm:
    """Annotation of a field that takes any installed term."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Tell terms apart by their type."""
        return union_schema(GROUP, DEFAULT, "term", handler)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The same in words of JSON Schema."""
        return union_json_schema(DEFAULT, schema, handler)
