"""The processes of a fleet: workers, each a machine of its own, and the service; and what they leave when killed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
ORPHAN_SECONDS = 2.0  # how long a child may outlive what it belongs to
KEY = "a-key-of-the-fleet-of-some-length"
SERVE = "from service.cli import main; main()"


@dataclass
class Part:
    """One process of the fleet, started again as often as it is killed."""

    name: str
    folder: Path  # its data directory; every child has it in its environment
    command: list[str]
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    deaths: list[int] = field(default_factory=list)  # exit codes

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        self.starts += 1

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """Its children at work, found by their home, whether their parent lives or not."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                home = process.environ().get("HOME", "")
                if home.startswith(f"{self.folder}/") and lives(process):
                    found.append(process)
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def kill_whole(self) -> None:
        """End it and its children at once, as a machine that loses its power does."""
        children = self.children()
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.process.wait()

    def reap(self) -> float:
        """After its end: wait until nothing of it lives; returns how long that took."""
        assert self.process is not None
        self.deaths.append(self.process.wait())
        since = time.monotonic()
        while orphans := self.children():
            waited = time.monotonic() - since
            assert waited < ORPHAN_SECONDS, f"{self.name} has left {orphans} behind\n{self.tail()}"
            time.sleep(0.02)
        return time.monotonic() - since

    def tail(self, count: int = 60) -> str:
        """The end of its log, for messages of failure."""
        if not self.log_path.exists():
            return f"{self.name}: no log"
        lines = self.log_path.read_text(errors="replace").splitlines()[-count:]
        return "\n".join([f"--- {self.name} (started {self.starts} times, ends {self.deaths})", *lines])


@dataclass
class ServicePart(Part):
    """`rankpress serve` of the many-machine mode: API and reconciler."""

    @property
    def url(self) -> str:
        found = re.findall(r"listens on (http://\S+)", self.log_path.read_text())
        return found[-1] if len(found) >= self.starts else ""

    def wait_until_it_listens(self) -> str:
        until = time.monotonic() + START_SECONDS
        while self.alive() and time.monotonic() < until:
            if url := self.url:
                return url
            time.sleep(0.02)
        raise AssertionError(f"the service did not start\n{self.tail()}")


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.Error:
        return False


def clean_environment() -> dict[str, str]:
    """This process's environment without settings, for one thread of computation."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RANKPRESS_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def service_command(folder: Path) -> list[str]:
    return [sys.executable, "-c", SERVE, "serve", "--data", str(folder), "--port", "0"]


def machine_command(journal: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("machine.py")), str(journal)]
