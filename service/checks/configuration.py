"""Whether the settings can be read, and whether they mean what their author meant."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from service.checks.finding import Finding, failed, ok, warning
from service.settings import Settings

PREFIX = "RANKPRESS_"
_READ_ELSEWHERE = frozenset({"RANKPRESS_URL", "RANKPRESS_MARK"})


def check_settings(environment: Mapping[str, str], given: Mapping[str, Any]) -> tuple[Settings | None, list[Finding]]:
    """Make the settings, with what the command line says above the environment; None where they do not fit."""
    try:
        settings = Settings(**given)
    except ValidationError as error:
        return None, [_invalid(item["loc"], item["msg"]) for item in error.errors()]
    known = _READ_ELSEWHERE | {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    findings = [
        warning("settings", f"{name} is no setting", "it has no effect: see docs/settings.md for its right name")
        for name in unknown
    ]
    findings += [warning("settings", found, advice) for found, advice in one_machine_parts(settings)]
    mode = "embedded: one process" if settings.embedded else "many machines"
    return settings, findings or [ok("settings", f"valid; {mode}")]


def one_machine_parts(settings: Settings) -> list[tuple[str, str]]:
    """What a service with a broker keeps where only this machine finds it, each with what to set instead."""
    if settings.embedded:
        return []
    parts = []
    if settings.resolved_database_url.startswith("sqlite"):
        found = "the database is SQLite, which only the processes of this machine can share"
        parts.append((found, "set RANKPRESS_DATABASE_URL to a postgresql:// URL before a second machine joins"))
    if not settings.blob_url:
        found = f"files are kept in {settings.data_dir.absolute() / 'blobs'}, which only processes with this --data see"
        parts.append((found, "set RANKPRESS_BLOB_URL to a shared file:// folder or to an s3:// bucket"))
    return parts


def _invalid(place: tuple[int | str, ...], message: str) -> Finding:
    name = "".join(str(part) for part in place)
    found = message.removeprefix("Value error, ")
    if not name:
        return failed("settings", found, "change one of these variables (docs/settings.md)")
    return failed("settings", f"{PREFIX}{name.upper()}: {found}", "change this variable (docs/settings.md)")
