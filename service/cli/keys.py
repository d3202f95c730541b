"""`keys`: who may speak to the service, besides the configured key; works on the database itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli.composition import data_dir_option, extras, open_database, read_settings, require_schema
from service.cli.connection import json_option
from service.cli.exits import ExitCode
from service.cli.output import note, print_json
from service.cli.tables import table
from service.contract.errors import ErrorCode, ProblemError
from service.contract.keys import new_api_key

if TYPE_CHECKING:
    from service.settings import Settings
    from service.store.session import Database
    from service.store.tables import ApiKey

_ID_LENGTH = 8


@click.group()
def keys() -> None:
    """Make, list and revoke API keys, on the database itself.

    The key in RANKPRESS_API_KEY, or the one an embedded service made, works beside them and is not listed.
    """


@keys.command()
@click.argument("name")
@click.option("--owner", help="Whom the key speaks for.  [default: RANKPRESS_OWNER]")
@data_dir_option
def add(name: str, owner: str | None, data_dir: Path | None) -> int:
    """Make a key and print it, this once: only its digest is kept."""
    with _database(data_dir) as (settings, database):
        from service.store.keys import insert_key

        key = new_api_key()
        owner = owner or settings.owner
        try:
            with database.write() as session:
                insert_key(session, key, owner, name)
        except ValueError as error:
            raise ProblemError(ErrorCode.STATE_CONFLICT, str(error)) from error
    click.echo(key)
    note(f"the key {name!r} speaks for {owner!r}; it is not shown again")
    return ExitCode.DONE


@keys.command(name="list")
@json_option
@data_dir_option
def list_(as_json: bool, data_dir: Path | None) -> int:
    """List the keys that were made, the revoked ones too."""
    with _database(data_dir) as (_, database):
        found = _all(database)
    if as_json:
        print_json([_document(key) for key in found])
    elif found:
        rows = [[str(value or "–") for value in _document(key).values()] for key in found]
        click.echo(table(["name", "id", "owner", "made", "revoked"], rows))
    return ExitCode.DONE


@keys.command()
@click.argument("name")
@data_dir_option
def revoke(name: str, data_dir: Path | None) -> int:
    """Refuse the key NAME from now on; the beginning of its id, or the key itself, does as well.

    Services forget it within RANKPRESS_KEY_CACHE_SECONDS.
    """
    with _database(data_dir) as (settings, database):
        from service.store.keys import digest_of, revoke_key

        valid = [key for key in _all(database) if key.revoked_at is None]
        named = [key for key in valid if key.name == name]
        named = named or [key for key in valid if key.digest.startswith(name) or key.digest == digest_of(name)]
        if len(named) != 1:
            raise ProblemError(
                ErrorCode.NOT_FOUND,
                f"expected the name or id of one valid key; {name!r} is that of {len(named)}: see `rankpress "
                "keys list`",
            )
        with database.write() as session:
            revoke_key(session, str(named[0].name))
        click.echo(f"revoked {named[0].name}; it is refused within {settings.key_cache_seconds:g} seconds")
    return ExitCode.DONE


@contextmanager
def _database(data_dir: Path | None) -> Iterator[tuple["Settings", "Database"]]:
    with extras("keys", "api"):
        settings = read_settings(data_dir=data_dir)
        with open_database(settings) as database:
            require_schema(database)
            yield settings, database


def _all(database: "Database") -> "Sequence[ApiKey]":
    from service.store.keys import list_keys

    with database.read() as session:
        return list_keys(session)


def _document(key: "ApiKey") -> dict[str, str | None]:
    return {
        "name": key.name,
        "id": key.digest[:_ID_LENGTH],
        "owner": key.owner,
        "created_at": key.created_at.isoformat(timespec="seconds"),
        "revoked_at": None if key.revoked_at is None else key.revoked_at.isoformat(timespec="seconds"),
    }
