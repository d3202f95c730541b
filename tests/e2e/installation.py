"""A database, a broker and a folder of files that several `rankpress` processes share, and a way to start those."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

ROOT = Path(__file__).parents[2]
# The module named by `without` cannot be imported, as on a machine that does not have it.
PROGRAM = """
import sys
for name in {without!r}:
    sys.modules[name] = None
from service.cli import main
main()
"""
START_SECONDS, STOP_SECONDS = 60, 40


@dataclass
class Fleet:
    """What the processes of a many-machine service share."""

    folder: Path
    environment: dict[str, str]
    processes: list["Running"] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, postgres_url: str, valkey_url: str, name: str) -> "Fleet":
        """Share an empty database of this name."""
        server = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {name}"))
        server.dispose()
        database_url = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
        clean = {variable: value for variable, value in os.environ.items() if not variable.startswith("RANKPRESS_")}
        shared = {
            "RANKPRESS_DATABASE_URL": database_url,
            "RANKPRESS_BROKER_URL": valkey_url,
            "RANKPRESS_BLOB_URL": (folder / "blobs").as_uri(),
        }
        own = {
            "RANKPRESS_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "XDG_DATA_HOME": str(folder / "home"),
        }
        return cls(folder, clean | shared | own)

    def run(self, *arguments: str, without: tuple[str, ...] = (), **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; `changes` are variables."""
        return subprocess.run(
            [sys.executable, "-c", PROGRAM.format(without=without), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment | changes,
            timeout=60,
            cwd=self.folder,
        )

    def start(self, *arguments: str, says: str, without: tuple[str, ...] = (), **changes: str) -> "Running":
        """Start a command and wait until it says this."""
        out, err = (self.folder / f"{len(self.processes)}.{name}" for name in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(without=without), *arguments],
                stdout=out_file,
                stderr=err_file,
                env=self.environment | changes,
                cwd=self.folder,
            )
        running = Running(process, out, err)
        self.processes.append(running)
        running.wait_for(says)
        return running

    def stop(self) -> None:
        """End everything that still runs."""
        for running in self.processes:
            with contextlib.suppress(ProcessLookupError):
                running.process.kill()
            running.process.wait()


@dataclass
class Running:
    """A process, and what it has said so far."""

    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path

    def wait_for(self, said: str) -> "re.Match[str]":
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if found := re.search(said, self.out.read_text()):
                return found
            time.sleep(0.05)
        pytest.fail(f"it did not say {said!r}:\n{self.out.read_text()}\n{self.err.read_text()}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)
