import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from service.cli import main; main()"]
START_SECONDS, STOP_SECONDS = 60, 40
# Leases and pauses at a tenth of their length, in the same order.
QUICK_LEASES = {
    "HEARTBEAT_SECONDS": "0.5",
    "SELF_FENCE_SECONDS": "6",
    "LEASE_SECONDS": "8",
    "REAP_SECONDS": "9",
    "RECONCILE_SECONDS": "0.5",
    "CANCEL_GRACE_SECONDS": "2",
    "RETRY_BASE_SECONDS": "0.2",
}


@dataclass
class Service:
    """`rankpress serve` in a process of its own, on a folder that outlives it."""

    folder: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = None
    settings: dict[str, str] = field(default_factory=dict)  # RANKPRESS_… without the prefix
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Start it on a free port and wait for its URL."""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RANKPRESS_")}
        self.environment |= {"XDG_STATE_HOME": str(self.folder / "state"), "OMP_NUM_THREADS": "1"}
        told = {f"RANKPRESS_{name}": value for name, value in ({"THREADS": "1"} | self.settings).items()}
        log_path = self.folder / "service.log"
        with log_path.open("w") as log:
            command = [*COMMAND, "serve", "--data", str(self.folder / "data"), "--port", "0"]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment | told)
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            found = re.search(r"listens on (http://\S+)", log_path.read_text())
            if found:
                self.url = self.environment["RANKPRESS_URL"] = found[1]
                return
            time.sleep(0.05)
        pytest.fail(f"the service did not start:\n{log_path.read_text()}")

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def rankpress(self, *arguments: str | Path, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Run the command against it, with nothing but its URL told."""
        return subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
            timeout=timeout_seconds,
            cwd=self.folder,
        )

    @property
    def key(self) -> str:
        """The key that it made."""
        return (self.folder / "data" / "api-key").read_text().strip()
