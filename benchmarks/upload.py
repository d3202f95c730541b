"""How fast, and in how much memory, does the service take in a large file?

A TorchScript archive of 2 GiB is the raw body of POST /v1/models. Limits: the service's process grows by at most
64 MiB over all uploads together, and an upload has at least 0.4 of the speed of one process that reads, hashes, writes
and syncs the same file. Both ways run in turn, each in a fresh process, and the client's time counts.
"""

import json
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil

from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from benchmarks.served import Served, served
from tests.api.archives import members

MIB = 1024**2
GROWTH_MIB_MAX, SPEED_SHARE_MIN = 64.0, 0.4
BYTES, BYTES_QUICK = 2048 * MIB, 8 * MIB
ROUNDS, ROUNDS_QUICK = 5, 2
SAMPLE_SECONDS = 0.005
BLOCK_BYTES = 4 * MIB


class ResidentSize:
    """The largest resident size of a process while it is watched; in MiB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.peak = self._now()
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample in a thread for the length of the block."""
        self._over.clear()
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._now())

    def _now(self) -> float:
        return float(self._process.memory_info().rss) / MIB


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("upload", __doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="disk to measure on  [default: the temporary folder]")
    options.add_argument("--rounds", type=int, help=f"uploads  [default: {ROUNDS}]")
    given = options.parse_args(arguments)
    size = BYTES_QUICK if given.quick else BYTES
    rounds = given.rounds or (ROUNDS_QUICK if given.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="rankpress-upload-", dir=given.data) as name:
        folder = Path(name)
        source = make_archive(folder / "large.pt", size)
        with served(folder) as service:
            plain, sent, memory = measure(folder, source, service, rounds)
    gibibytes = size / 1024 / MIB
    samples = [
        Sample("read, hash, write and sync", tuple(plain)),
        Sample("upload", tuple(sent)),
        Sample("read, hash, write and sync: speed", tuple(gibibytes / seconds for seconds in plain), "GiB/s"),
        Sample("upload: speed", tuple(gibibytes / seconds for seconds in sent), "GiB/s"),
        Sample("resident size before", (memory.before,), "MiB"),
        Sample("resident size at most", (memory.peak,), "MiB"),
    ]
    limits = [
        Limit("growth of the service", memory.peak - memory.before, GROWTH_MIB_MAX, "MiB"),
        Limit(
            "speed of an upload / plain speed", samples[0].median / samples[1].median, SPEED_SHARE_MIN, at_least=True
        ),
    ]
    return conclude("upload", samples, limits, quick=given.quick, facts={"bytes": size}, folder=given.results)


def measure(folder: Path, source: Path, service: Served, rounds: int) -> tuple[list[float], list[float], ResidentSize]:
    """Seconds of each way, in turn."""
    with service.client() as client:
        client.health()
    memory = ResidentSize(service.pid)
    plain: list[float] = []
    sent: list[float] = []
    hashes = set()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        target = folder / "plain.pt"
        seconds, sha256 = _run("plain", source, target)
        target.unlink()
        plain.append(seconds)
        hashes.add(sha256)
        with memory.watched():
            seconds, sha256 = _run("send", source, service.url, service.data_dir / "api-key")
        sent.append(seconds)
        hashes.add(sha256)
        # The next upload would replace this one; that deleting is no part of taking a file in.
        (service.data_dir / "blobs" / "sha256" / sha256[:2] / sha256[2:]).unlink()
    if len(hashes) != 1:
        raise SystemExit(f"the same file came out with different contents: {sorted(hashes)}")
    return plain, sent, memory


def make_archive(path: Path, size: int) -> Path:
    """A TorchScript archive of exactly this size, whose weight cannot be compressed."""
    random = Random(0)
    small = members()
    del small["net/data/0"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in small.items():
            archive.writestr(name, content)
        overhead = archive.fp.tell() + _directory_bytes([*small, "net/data/0"]) if archive.fp is not None else 0
        left = size - overhead - 30 - len("net/data/0")  # 30: a zip's local header without the name
        with archive.open("net/data/0", "w") as weight:
            block = random.randbytes(BLOCK_BYTES)
            while left > 0:
                weight.write(block[:left])
                left -= len(block)
    if path.stat().st_size != size:
        raise SystemExit(f"expected an archive of {size} bytes; made one of {path.stat().st_size}")
    return path


def _directory_bytes(names: list[str]) -> int:
    return sum(46 + len(name) for name in names) + 22  # a zip's directory entries and its end


def _run(way: str, *arguments: Path | str) -> tuple[float, str]:
    command = [sys.executable, "-m", "benchmarks.senders", way, *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent).stdout
    answer = json.loads(said)
    return answer["seconds"], answer["sha256"]


if __name__ == "__main__":
    sys.exit(main())
