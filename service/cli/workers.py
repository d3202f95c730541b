"""`workers`: the processes that run jobs."""

import click

from service.cli.connection import connect, json_option, url_option
from service.cli.exits import ExitCode
from service.cli.output import print_json
from service.cli.tables import table
from service.contract.resources import WorkerResource


@click.command()
@click.option("--all", "include_gone", is_flag=True, help="Those too that have stopped or fallen silent.")
@json_option
@url_option
def workers(include_gone: bool, *, as_json: bool, url: str) -> int:
    """List the workers."""
    with connect(url) as client:
        found = client.workers(include_gone=include_gone)
    if as_json:
        print_json({"items": [worker.model_dump(mode="json") for worker in found]})
    else:
        head = ("worker", "state", "host", "process", "queues", "busy", "GPUs", "version", "last seen")
        click.echo(table(head, [_line(worker) for worker in found]))
    return ExitCode.DONE


def _line(worker: WorkerResource) -> tuple[str, ...]:
    return (
        worker.id,
        worker.state,
        worker.host,
        str(worker.pid),
        ", ".join(worker.queues),
        f"{worker.busy} of {worker.slots}",
        ", ".join(gpu.name or gpu.uuid for gpu in worker.gpus),
        worker.version,
        f"{worker.last_seen_at:%Y-%m-%d %H:%M:%S}",
    )
