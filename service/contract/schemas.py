"""The JSON Schema of the job spec, for editors and for clients that write specs."""

from typing import Any

from service.contract.spec import JobSpec

SPEC_SCHEMA_PATH = "/v1/schemas/job"


def spec_schema() -> dict[str, Any]:
    """The schema, with the field names a user writes."""
    schema = JobSpec.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SPEC_SCHEMA_PATH, **schema}


def spec_components() -> dict[str, Any]:
    """The same as components of an OpenAPI document, where `JobSpec` is one among others."""
    schema = JobSpec.model_json_schema(by_alias=True, ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = schema.pop("$defs")
    return parts | {"JobSpec": schema}
