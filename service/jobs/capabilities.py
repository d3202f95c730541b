"""What this service can do."""

from importlib.metadata import version
from typing import Any, get_args

from service.contract.errors import ErrorCode, title_of
from service.contract.layer_rule import LayerRule
from service.contract.method_specs import method_specs
from service.contract.plan import REASON_MEANINGS
from service.contract.resources import Capabilities
from service.contract.schemas import spec_schema
from service.contract.spec import Output
from service.contract.term_specs import term_specs
from service.jobs.files import DATA_FORMATS
from service.services import Services
from service.store import workers


def read_capabilities(services: Services) -> Capabilities:
    """Everything a client may want to know before it writes a spec."""
    settings = services.settings
    with services.database.read() as session:
        known = workers.list_workers(session)
    devices = {kind for worker in known for kind, present in worker.devices.items() if present} | {"cpu"}
    return Capabilities(
        version=version("rankpress"),
        methods=list(method_specs()),
        terms=installed_terms(),
        layer_kinds=_layer_kinds(),
        outputs=list(get_args(Output)),
        data_formats=list(DATA_FORMATS),
        devices=sorted(devices),
        limits={
            "max_model_bytes": settings.max_model_bytes,
            "max_dataset_bytes": settings.max_dataset_bytes,
            "max_spec_bytes": settings.max_spec_bytes,
            "max_archive_entries": settings.max_archive_entries,
            "max_page_size": settings.max_page_size,
        },
        reason_codes={code.value: meaning for code, meaning in REASON_MEANINGS.items()},
        error_codes={code.value: title_of(code) for code in ErrorCode},
        spec_schema=spec_schema(),
    )


def installed_terms() -> list[dict[str, Any]]:
    """The terms that a layer's sum may have, ours and those of other packages."""
    return [{"type": name, **spec.abilities()} for name, spec in term_specs().items()]


def _layer_kinds() -> list[str]:
    """The kinds that a rule can name: those that can be compressed."""
    annotation = LayerRule.model_fields["kind"].annotation
    return sorted(kind for choice in get_args(annotation) for kind in get_args(choice))
