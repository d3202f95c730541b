"""`serve` and `migrate`: the composition root, where the extras are imported, lazily."""

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli import services_file
from service.cli.data_lock import hold
from service.cli.exits import ExitCode
from service.cli.logs import set_up_logs

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.services import Services
    from service.settings import Settings

BACKLOG = 2048
SHUTDOWN_SECONDS = 10  # how long open requests may take once the service was asked to stop

data_dir_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the embedded service: database, blobs, key.  [default: the user's data folder]",
)


@click.command()
@data_dir_option
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: 8080]")
def serve(data_dir: Path | None, host: str | None, port: int | None) -> int:
    """Run the whole service in one process.

    It holds the API, a worker and the store, and needs no other program beside it.
    """
    with _extras("serve", "all"):
        from service.keys_file import ensure_api_key
        from service.services import build_services
        from service.store.migration import migrate as migrate_database

        settings = _settings(data_dir=data_dir, host=host, port=port)
        set_up_logs(settings.log_level)
        with hold(settings.lock_file):
            services = build_services(settings)
            migrate_database(services.database)
            _, key_file = ensure_api_key(settings)
            listener = _listen(settings.host, settings.port)
            _run(_application(services), listener, lambda: _announce(settings, listener, key_file))
    return ExitCode.DONE


@click.command()
@data_dir_option
def migrate(data_dir: Path | None) -> int:
    """Bring the database's schema to this version."""
    with _extras("migrate", "api"):
        from service.store.migration import migrate as migrate_database
        from service.store.session import Database

        settings = _settings(data_dir=data_dir)
        if not settings.database_url:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        migrate_database(Database(settings.resolved_database_url))
    click.echo("the schema is up to date")
    return ExitCode.DONE


@contextmanager
def _extras(command: str, extra: str) -> Iterator[None]:
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


def _settings(**given: Any) -> "Settings":
    from pydantic import ValidationError

    from service.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise click.UsageError(f"the settings (RANKPRESS_… in the environment) do not fit: {told}") from error


def _application(services: "Services") -> "FastAPI":
    from service.app import Component, create_app
    from service.reconcile import Reconciler
    from worker.embedded import EmbeddedWorker

    components: list[Component] = [
        Reconciler(services.database, services.bell, services.settings, services.blobs),
    ]
    if services.settings.embedded:
        components.append(EmbeddedWorker(services))
    return create_app(services, components=components)


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything else starts, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error


def _announce(settings: "Settings", listener: socket.socket, key_file: Path | None) -> None:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    url = f"http://{reachable}:{port}"
    click.echo(f"Rankpress listens on {url}  (documentation: {url}/docs)")
    if key_file is None:
        click.echo("The API key is the one in RANKPRESS_API_KEY")
    else:
        click.echo(f"The API key is in {key_file}{_remember(url, key_file)}")
    click.echo(f"Data is kept in {settings.data_dir.absolute()}; stop with Ctrl-C")
    sys.stdout.flush()


def _remember(url: str, key_file: Path) -> str:
    try:
        services_file.record(url, key_file)
    except OSError:
        return "; give it to the rankpress command as RANKPRESS_API_KEY"
    return "; the rankpress command finds it by itself"


def _run(app: "FastAPI", listener: socket.socket, announce: Callable[[], None]) -> None:
    import uvicorn

    class AnnouncingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            click.echo("stopping; a job that runs goes on at the next start")
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        # Once it has stopped in order, uvicorn raises the signal that asked for it a second time.
        signal.signal(number, lambda *_: None)
    with listener:
        AnnouncingServer(config).run(sockets=[listener])
