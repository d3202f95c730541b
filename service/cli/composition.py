"""What the commands of the service's own side share: settings, the extras they need, and a database to work on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.output import note
from service.contract.errors import ErrorCode, ProblemError

if TYPE_CHECKING:
    from service.services import Services
    from service.settings import Settings
    from service.store.session import Database

data_dir_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="This process's folder; embedded, it holds everything.  [default: the user's data folder]",
)


@contextmanager
def extras(command: str, extra: str) -> Iterator[None]:
    """Say which extra to install where a package of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in {"service", "worker", "migrations"}:
            raise
        raise click.UsageError(
            f"`rankpress {command}` needs the package {missing}, which comes with an extra: "
            f"pip install 'rankpress[{extra}]'"
        ) from error


def read_settings(**given: Any) -> "Settings":
    """The settings of the environment, with what the command line says above them."""
    from pydantic import ValidationError

    from service.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise click.UsageError(f"the settings (RANKPRESS_… in the environment) do not fit: {told}") from error


@contextmanager
def open_database(settings: "Settings") -> Iterator["Database"]:
    """The settings' database, closed at the end."""
    from service.store.session import Database

    if not settings.database_url:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.resolved_database_url, timeout_seconds=settings.database_timeout_seconds)
    try:
        yield database
    finally:
        database.dispose()


def require_schema(database: "Database") -> None:
    """Refuse a database that does not answer (`UNAVAILABLE`) or has another schema (`STATE_CONFLICT`)."""
    from service.checks.urls import shown_url
    from service.store.migration import has_schema, schema_at_head

    if not database.ping():
        raise ProblemError(
            ErrorCode.UNAVAILABLE,
            f"expected the database {shown_url(database.url)} to answer; it does not: look at it with "
            "`rankpress doctor`, or change RANKPRESS_DATABASE_URL",
        )
    if not schema_at_head(database):
        found, first = ("another", "stop what still runs of it, then ") if has_schema(database) else ("none", "")
        raise ProblemError(
            ErrorCode.STATE_CONFLICT,
            f"expected the schema of this version in {shown_url(database.url)}; found {found}: {first}"
            "run `rankpress migrate`",
        )


def open_services(settings: "Settings") -> "Services":
    """Everything that requests need; refuses where the shared folder of files is not there (`UNAVAILABLE`)."""
    from service.blobs.errors import BlobStoreAwayError
    from service.services import build_services

    try:
        return build_services(settings)
    except BlobStoreAwayError as error:
        raise ProblemError(ErrorCode.UNAVAILABLE, str(error)) from error


def warn_of_one_machine(settings: "Settings") -> None:
    """Tell what a service with a broker keeps where only this machine finds it."""
    from service.checks.configuration import one_machine_parts

    for found, advice in one_machine_parts(settings):
        note(f"warning: {found}: {advice}")
