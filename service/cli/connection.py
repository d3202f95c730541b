"""The service that a command speaks to, and its key."""

import os

import click

from service.cli import services_file
from service.client import Client
from service.client.api import DEFAULT_URL

url_option = click.option(
    "--url", envvar="RANKPRESS_URL", default=DEFAULT_URL, show_default=True, help="The service's address."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def connect(url: str) -> Client:
    """A client with the key from `RANKPRESS_API_KEY`, else the one of the service that runs here."""
    key = os.environ.get("RANKPRESS_API_KEY") or services_file.find_key(url)
    try:
        return Client(url, key)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
