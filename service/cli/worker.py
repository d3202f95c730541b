"""`worker`: the composition root of a machine that computes."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from service.cli.composition import (
    data_dir_option,
    extras,
    open_database,
    read_settings,
    require_schema,
    warn_of_one_machine,
)
from service.cli.exits import ExitCode
from service.cli.logs import set_up_logs
from service.contract.errors import ErrorCode, ProblemError

if TYPE_CHECKING:
    from service.settings import Settings
    from worker.app import HostedWorker

_QUEUES = ("gpu", "cpu")
STUCK_SECONDS = 10.0  # after the drain's own time, a worker that still lives is ended


@click.command()
@click.option("--queue", "queues", multiple=True, type=click.Choice(_QUEUES), help="Queue to serve; repeatable.")
@click.option("--slots", type=click.IntRange(min=1), help="Jobs that run at once.  [default: one for each GPU, or one]")
@data_dir_option
def worker(queues: tuple[str, ...], slots: int | None, data_dir: Path | None) -> int:
    """Run jobs until a signal asks for the end.

    Serves the queues of RANKPRESS_WORKER_QUEUES unless --queue is given; with neither "cpu", and "gpu" where a GPU is
    visible. SIGTERM and SIGINT drain: running jobs write a checkpoint and go back to the queue, uncounted, within
    RANKPRESS_DRAIN_GRACE_SECONDS; a second signal ends at once.
    """
    with extras("worker", "worker"):
        settings = read_settings(worker_queues=",".join(queues) or None, slots=slots, data_dir=data_dir)
        _require_many_machines(settings)
        set_up_logs(settings.log_level, settings.log_format)
        from worker.app import create_worker, run_worker

        with open_database(settings) as database:
            require_schema(database)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        _require_blobs(settings)
        hosted = create_worker(settings)
        _require_gpus(hosted)
        asked_to_stop = _speak(hosted, settings)
        code = run_worker(hosted, settings)
        return ExitCode.DONE if asked_to_stop.is_set() else code  # Celery takes Ctrl-C for a failure


def _require_many_machines(settings: "Settings") -> None:
    if settings.embedded:
        raise click.UsageError(
            "expected a broker that this worker shares with the API; found the in-process memory://: set "
            "RANKPRESS_BROKER_URL (redis://…), RANKPRESS_DATABASE_URL (postgresql://…) and RANKPRESS_BLOB_URL as the "
            "API has them. `rankpress serve` alone has a worker inside"
        )


def _require_gpus(hosted: "HostedWorker") -> None:
    from service.checks.machine import unknown_gpus

    if strangers := unknown_gpus(hosted.slots.gpus):
        raise click.UsageError(
            f"expected GPUs in CUDA_VISIBLE_DEVICES; the driver does not know {', '.join(strangers)}: compare with "
            "`nvidia-smi -L`, or serve --queue cpu"
        )
    if "gpu" in hosted.slots.queues and not hosted.slots.gpus:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise click.UsageError(
            "expected a GPU for the queue gpu; none is visible"
            + (f" (CUDA_VISIBLE_DEVICES is {named!r})" if named is not None else "")
            + ": see `rankpress doctor --queue gpu`, or serve --queue cpu"
        )


def _require_blobs(settings: "Settings") -> None:
    """Refuse a store that does not answer: jobs would be claimed only to fail."""
    from service.blobs.errors import BlobStoreAwayError
    from service.blobs.opening import open_blobs
    from service.checks.urls import shown_url

    try:
        open_blobs(settings).check()
    except (BlobStoreAwayError, OSError) as error:
        raise ProblemError(
            ErrorCode.UNAVAILABLE,
            f"expected the store of files {shown_url(settings.resolved_blob_url)} to take a small object: {error}; "
            "look at it with `rankpress doctor`, or change RANKPRESS_BLOB_URL",
        ) from error


def _speak(hosted: "HostedWorker", settings: "Settings") -> threading.Event:
    """Say when the worker is ready and that it stops; from then on a second signal forces, and so does time.

    Returns what is set once it was asked to stop.
    """
    from celery import signals

    asked_to_stop = threading.Event()

    def leave_logs_alone(**_: Any) -> None:
        pass

    def ready(**_: Any) -> None:
        # Said at each loss of the broker, of a setting that is set on purpose; Celery has made its own filters by now.
        warnings.filterwarnings("ignore", message=r"\s*In Celery 5\.1 we introduced")
        slots = hosted.slots
        gpus = ", ".join(f"{gpu.name or 'GPU'} {gpu.uuid}" for gpu in slots.gpus)
        click.echo(
            f"Rankpress worker {hosted.row.worker_id} is ready: queues {', '.join(slots.queues)}; "
            f"slots {slots.count}; {f'GPUs {gpus}' if gpus else 'no GPU'}"
        )
        warn_of_one_machine(settings)
        sys.stdout.flush()

    def stopping(**_: Any) -> None:
        asked_to_stop.set()
        grace = settings.drain_grace_seconds
        click.echo(
            f"stopping; running jobs go back to the queue within {grace:g} seconds, a second signal ends at once"
        )
        sys.stdout.flush()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, _end_at_once)
        guard = threading.Timer(grace + STUCK_SECONDS, _end_at_once)
        guard.daemon = True
        guard.start()

    signals.setup_logging.connect(leave_logs_alone, weak=False)  # a receiver keeps Celery from setting up its own
    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(stopping, weak=False)
    return asked_to_stop


def _end_at_once(_number: int | None = None, _frame: FrameType | None = None) -> None:
    """End without waiting for anything: children die with this process, their jobs go on when the leases end."""
    os.write(sys.stderr.fileno(), b"ended before the drain was over\n")
    os._exit(ExitCode.FAILED)
