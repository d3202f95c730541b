"""`capabilities` and `schema`: what can be asked for."""

import click

from service.cli.connection import connect, url_option
from service.cli.exits import ExitCode
from service.cli.output import print_json
from service.contract.schemas import spec_schema


@click.command()
@url_option
def capabilities(url: str) -> int:
    """Print what the service can do, as JSON."""
    with connect(url) as client:
        print_json(client.capabilities().model_dump(mode="json"))
    return ExitCode.DONE


@click.command()
def schema() -> int:
    """Print the JSON Schema of the job spec; no service is needed."""
    print_json(spec_schema())
    return ExitCode.DONE
