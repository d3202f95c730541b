"""What do checkpoints cost, and what does a resume?

A network of 25 million parameters in big linear layers is trained by the real child process in an L step that does not
end, saved often. The training stands still for each checkpoint; that time over the default 300 s between two must be at
most 2 % of the run. Resuming, from the start of the process to the first update, must take at most 15 s (what was done
since the checkpoint is done again on top of that). A drain, from the signal to the exit, is shown beside them.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.networks import CLASSES
from benchmarks.options import parser
from benchmarks.outcome import Limit, Sample, conclude, say
from service.contract.events import EventKind
from service.settings import Settings
from worker.channel import (
    DRAIN_SIGNAL,
    Assignment,
    CheckpointMessage,
    DoneMessage,
    EventMessage,
    FailedMessage,
    Message,
    parse_message,
)
from worker.sandbox import child_environment

SHARE_MAX, RESUME_SECONDS_MAX = 0.02, 15.0
WIDTH, DEPTH, WIDTH_QUICK, DEPTH_QUICK = 2048, 6, 32, 2  # 25.2 million parameters
SAVES, SAVES_QUICK = 9, 2
RESUMES, RESUMES_QUICK = 3, 1
SPACING_SECONDS, SPACING_SECONDS_QUICK = 3.0, 0.05  # so that several are seen soon; the share is that of the default
SAMPLES, BATCH_SIZE = 2048, 64
MIB = 2**20
SPEC: dict[str, Any] = {
    "method": {"type": "learning_compression", "lambda": 1e-4, "mu": {"initial": 1e-3, "steps": 2}},
    "training": {"epochs_per_step": 10_000, "batch_size": BATCH_SIZE, "optimizer": {"lr": 1e-3}},
    "fine_tune": {"epochs": 0},
    "device": "cpu",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure."""
    options = parser("checkpoint", __doc__)
    options.add_argument("--saves", type=int, help=f"checkpoints that are timed  [default: {SAVES}]")
    options.add_argument("--rounds", type=int, help=f"resumes that are timed  [default: {RESUMES}]")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    given = options.parse_args(arguments)
    saves = given.saves or (SAVES_QUICK if given.quick else SAVES)
    rounds = given.rounds or (RESUMES_QUICK if given.quick else RESUMES)
    cadence = float(Settings.model_fields["checkpoint_seconds"].default)
    with tempfile.TemporaryDirectory(prefix="rankpress-checkpoint-") as name:
        bench = Bench.make(Path(name), given.threads, quick=given.quick)
        run = bench.save_and_leave(saves)
        resumes = [bench.resume(run.files[-1], number) for number in range(rounds)]
    costs = Sample("standstill of a checkpoint", tuple(run.save_seconds))
    share = Sample(f"share of {cadence:g} s", tuple(100 * cost / cadence for cost in run.save_seconds), "%")
    samples = [
        costs,
        share,
        Sample("size of a checkpoint", tuple(size / MIB for size in run.sizes), "MiB"),
        Sample("resume, to the first update", tuple(resumes)),
        Sample("drain, from the signal to the exit", (run.drain_seconds,)),
    ]
    limits = [
        Limit("standstill of a checkpoint / default cadence", costs.median / cadence, SHARE_MAX),
        Limit("resume, to the first update", max(resumes), RESUME_SECONDS_MAX, "s"),
    ]
    facts = {"parameters": bench.parameters, "threads": given.threads, "spec": SPEC, "cadence_seconds": cadence}
    return conclude("checkpoint", samples, limits, quick=given.quick, facts=facts, folder=given.results)


@dataclass
class Run:
    """What one child told."""

    save_seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    first_update_at: float | None = None
    drain_seconds: float = 0.0

    def take(self, message: Message) -> None:
        """Keep a message."""
        if isinstance(message, CheckpointMessage):
            for path in self.files:
                path.unlink(missing_ok=True)
            self.files.append(Path(message.path))
            self.sizes.append(message.bytes)
        elif isinstance(message, EventMessage) and message.kind == EventKind.LOG:
            if message.data.get("what") == "saved":
                self.save_seconds.append(message.data["seconds"])
            elif message.data.get("what") == "first_update":
                self.first_update_at = message.data["at"]
        elif isinstance(message, FailedMessage | DoneMessage):
            raise SystemExit(f"the child ended too early: {message}")


@dataclass
class Bench:
    """A network and data as files, and the assignment of a child."""

    folder: Path
    assignment: Assignment
    parameters: int

    @classmethod
    def make(cls, folder: Path, threads: int, *, quick: bool) -> "Bench":
        """Save the network and random data."""
        width, depth = (WIDTH_QUICK, DEPTH_QUICK) if quick else (WIDTH, DEPTH)
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        network = nn.Sequential(*layers, nn.Linear(width, CLASSES))
        torch.jit.save(torch.jit.script(network), str(folder / "network.pt"))
        random = np.random.default_rng(0)
        inputs = random.standard_normal((SAMPLES, width), dtype=np.float32)
        np.savez(folder / "data.npz", inputs=inputs, targets=random.integers(0, CLASSES, SAMPLES))
        spacing = SPACING_SECONDS_QUICK if quick else SPACING_SECONDS
        assignment = Assignment(
            stage="learn",
            job_id="job_checkpoint",
            epoch=1,
            model_path=str(folder / "network.pt"),
            data_path=str(folder / "data.npz"),
            data_format="npz",
            spec=SPEC,
            work_dir=str(folder),
            thread_count=threads,
            device="cpu",
            checkpoint_seconds=spacing,
            checkpoint_spacing_seconds=spacing,
        )
        return cls(folder, assignment, sum(parameter.numel() for parameter in network.parameters()))

    def save_and_leave(self, saves: int) -> Run:
        """Train from the beginning until so many checkpoints inside of the L step are written, and drain."""
        run = Run()

        def enough() -> bool:
            return run.first_update_at is not None and len(run.save_seconds) >= saves

        with Child(self.assignment, self.folder / "first") as child:
            say(f"the child trains until {saves} checkpoints are written")
            child.read(run, enough)
            asked = time.monotonic()
            child.process.send_signal(DRAIN_SIGNAL)
            child.read(run)
            run.drain_seconds = time.monotonic() - asked
        if child.process.returncode != 0:
            raise SystemExit(f"the child did not leave as asked: exit code {child.process.returncode}")
        return run

    def resume(self, checkpoint: Path, number: int) -> float:
        """Seconds from the start of a process that takes up a checkpoint to its first update."""
        say(f"resume {number + 1}")
        run = Run()
        resumed = self.assignment.model_copy(update={"resume_path": str(checkpoint), "checkpoint_seconds": 600.0})
        began = time.monotonic()
        with Child(resumed, self.folder / f"resume-{number}") as child:
            child.read(run, lambda: run.first_update_at is not None)
            child.process.kill()
        assert run.first_update_at is not None
        return run.first_update_at - began


class Child:
    """A child process as a supervisor starts it, but with a stopwatch."""

    def __init__(self, assignment: Assignment, work_dir: Path) -> None:
        work_dir.mkdir()
        reading, writing = os.pipe()
        environment = child_environment(
            os.environ, work_dir=work_dir, thread_count=assignment.thread_count, channel_fd=writing
        )
        command = [sys.executable, "-m", "benchmarks.timed_child"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=(writing,), env=environment, cwd=work_dir
        )
        os.close(writing)
        self._channel = os.fdopen(reading, "rb")
        assert self.process.stdin is not None
        told = assignment.model_copy(update={"work_dir": str(work_dir)})
        self.process.stdin.write(told.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._channel.close()

    def read(self, run: Run, enough: Callable[[], bool] = lambda: False) -> None:
        """Take what the child says, until that is enough or it has left."""
        while not enough():
            line = self._channel.readline()
            if not line:
                self.process.wait()
                return
            run.take(parse_message(line))


if __name__ == "__main__":
    sys.exit(main())
