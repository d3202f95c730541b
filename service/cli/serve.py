"""`serve` and `migrate`: the composition root, where the extras are imported, lazily."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from service.cli import services_file
from service.cli.exits import ExitCode
from service.cli.output import note

data_dir_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="RANKPRESS_DATA_DIR",
    help="Folder of the embedded service: database, blobs, key.  [default: the user's data folder]",
)


@click.command()
@data_dir_option
@click.option("--host", default=None, help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Port; 0 takes a free one.  [default: 8080]")
def serve(data_dir: Path | None, host: str | None, port: int | None) -> int:
    """Run the whole service in one process: API, worker and store."""
    return ExitCode.DONE


@click.command()
@data_dir_option
def migrate(data_dir: Path | None) -> int:
    """Bring the database's schema to this version."""
    return ExitCode.DONE
