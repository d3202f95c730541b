"""`serve` and `migrate`: the composition root of the API, where the extras are imported, lazily."""

import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.cli import services_file
from service.cli.composition import (
    data_dir_option,
    extras,
    open_database,
    open_services,
    read_settings,
    require_schema,
    warn_of_one_machine,
)
from service.cli.data_lock import hold
from service.cli.exits import ExitCode
from service.cli.logs import set_up_logs
from service.contract.errors import ErrorCode, ProblemError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.app import Component
    from service.services import Services
    from service.settings import Settings
    from service.store.session import Database

BACKLOG = 2048
SHUTDOWN_SECONDS = 10  # how long open requests may take once the service was asked to stop


@click.command()
@data_dir_option
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: 8080]")
def serve(data_dir: Path | None, host: str | None, port: int | None) -> int:
    """Run the service.

    Without a broker it is the whole service in one process: API, worker and store, with no other program beside it.
    With RANKPRESS_BROKER_URL it is the API alone, as often and on as many machines as you like; jobs run in
    `rankpress worker`, and the schema must have been brought up by `rankpress migrate`.
    """
    with extras("serve", "all"):
        settings = read_settings(data_dir=data_dir, host=host, port=port)
    set_up_logs(settings.log_level, settings.log_format)
    if settings.embedded:
        with extras("serve", "all"), hold(settings.lock_file):
            _serve_everything(settings)
    else:
        with extras("serve", "api"):
            _serve_api(settings)
    return ExitCode.DONE


@click.command()
@data_dir_option
def migrate(data_dir: Path | None) -> int:
    """Bring the database's schema to this version, and make the shared folder of RANKPRESS_BLOB_URL if there is none.

    Run it where that folder is mounted: no other command makes it.
    """
    with extras("migrate", "api"):
        from service.blobs.opening import make_store
        from service.store.migration import migrate as migrate_database

        settings = read_settings(data_dir=data_dir)
        with open_database(settings) as database:
            migrate_database(database)
        made = make_store(settings)
    click.echo("the schema is up to date")
    if made:
        click.echo(f"made the store of files in {settings.blob_url}")
    return ExitCode.DONE


def _serve_everything(settings: "Settings") -> None:
    from service.keys_file import ensure_api_key
    from service.store.migration import migrate as migrate_database
    from worker.embedded import EmbeddedWorker

    services = open_services(settings)
    migrate_database(services.database)
    _, key_file = ensure_api_key(settings)
    listener = _listen(settings.host, settings.port)
    app = _application(services, EmbeddedWorker(services))

    def announce() -> None:
        url = _announce_address(listener)
        if key_file is None:
            click.echo("The API key is the one in RANKPRESS_API_KEY")
        else:
            click.echo(f"The API key is in {key_file}{_remember(url, key_file)}")
        click.echo(f"Data is kept in {settings.data_dir.absolute()}; stop with Ctrl-C")

    _run(app, listener, announce, "stopping; a job that runs goes on at the next start")


def _serve_api(settings: "Settings") -> None:
    """Serve without a worker; nothing of it belongs to one process, so any number may run."""
    from service.checks.urls import shown_url

    with open_database(settings) as database:
        require_schema(database)
        keys = _keys_said(settings, database)
    services = open_services(settings)
    listener = _listen(settings.host, settings.port)

    def announce() -> None:
        _announce_address(listener)
        click.echo(keys)
        click.echo(
            f"API only, jobs run in `rankpress worker`; database {shown_url(settings.resolved_database_url)}, "
            f"broker {shown_url(settings.broker_url)}, files {shown_url(settings.resolved_blob_url)}"
        )
        warn_of_one_machine(settings)

    _run(_application(services), listener, announce, "stopping; jobs go on in their workers")


def _keys_said(settings: "Settings", database: "Database") -> str:
    """Which keys are taken; refuses a service that nobody could speak to."""
    from service.store.keys import list_keys

    with database.read() as session:
        count = sum(key.revoked_at is None for key in list_keys(session))
    if settings.api_key is not None:
        return "The API key is the one in RANKPRESS_API_KEY" + (f"; in the database: {count} more" if count else "")
    if count:
        return f"The API keys are those in the database: {count} (`rankpress keys list`)"
    raise ProblemError(
        ErrorCode.STATE_CONFLICT,
        "expected an API key that is the same on every machine; found neither RANKPRESS_API_KEY nor a key in the "
        "database: set the variable, or make a key with `rankpress keys add NAME`",
    )


def _application(services: "Services", *beside: "Component") -> "FastAPI":
    from service.app import create_app
    from service.reconcile import Reconciler

    reconciler = Reconciler(services.database, services.bell, services.settings, services.blobs)
    return create_app(services, components=[reconciler, *beside])


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything else starts, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error
    # Connections inherit it: an answer's head and body are two writes, and the second must not wait 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _announce_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    url = f"http://{reachable}:{port}"
    click.echo(f"Rankpress listens on {url}  (documentation: {url}/docs)")
    return url


def _remember(url: str, key_file: Path) -> str:
    try:
        services_file.record(url, key_file)
    except OSError:
        return "; give it to the rankpress command as RANKPRESS_API_KEY"
    return "; the rankpress command finds it by itself"


def _run(app: "FastAPI", listener: socket.socket, announce: Callable[[], None], goodbye: str) -> None:
    import uvicorn

    class AnnouncingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce()
                sys.stdout.flush()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            click.echo(goodbye)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # Once it has stopped in order, uvicorn raises the signal that asked for it a second time.
        signal.signal(number, lambda *_: None)
    with listener:
        AnnouncingServer(config).run(sockets=[listener])
