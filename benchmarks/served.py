"""`rankpress serve` in a process of its own, on a folder of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.client.api import Client

COMMAND = (sys.executable, "-c", "from service.cli import main; main()")
START_SECONDS, STOP_SECONDS = 60.0, 40.0


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    url: str
    key: str
    pid: int
    data_dir: Path

    def client(self) -> Client:
        """A client with the key."""
        return Client(self.url, self.key)


def clean_environment() -> dict[str, str]:
    """This process's environment without the settings of a service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RANKPRESS_")}


@contextmanager
def served(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Start the service on a free port, the embedded one unless settings say otherwise, and stop it at the end."""
    environment = clean_environment() | dict(settings or {})
    environment["XDG_STATE_HOME"] = str(folder / "state")  # the user's own record of services stays as it is
    data_dir, log_path = folder / "service", folder / "service.log"
    with log_path.open("w", encoding="utf-8") as log:
        command = [*COMMAND, "serve", "--data", str(data_dir), "--port", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        url = _wait_for_url(process, log_path)
        key = environment.get("RANKPRESS_API_KEY") or (data_dir / "api-key").read_text(encoding="utf-8").strip()
        yield Served(url, key, process.pid, data_dir)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process politely, or after a while without asking."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log_path: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"listens on (http://\S+)", log_path.read_text(encoding="utf-8"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the service did not start:\n{log_path.read_text(encoding='utf-8')}")
