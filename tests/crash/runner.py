"""The child of a fleet's workers: notes that it lives, then is the fake runner or the real one, by its model file.

Called with the folder of the fleet's journal. A child holds a lock of its job for as long as it lives, whatever kills
it: a child that finds the lock taken has met another one of the same job, and writes so.
"""

import fcntl
import hashlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "worker"))

import fake_runner

from service.contract.events import EventKind, Progress
from service.contract.marks import mark
from worker.channel import CheckpointMessage, EventMessage, MessageWriter, ProgressMessage
from worker.sandbox import apply_limits


class Journal:
    """The children's own account of one job, beside the tables."""

    def __init__(self, folder, assignment):
        self.path = folder / f"{assignment.job_id}.jsonl"
        self.assignment = assignment
        self.lock = os.open(folder / f"{assignment.job_id}.lock", os.O_CREAT | os.O_RDWR)

    def open(self):
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.note("overlap")
        self.note("start", resumes=self.assignment.resume_path is not None)

    def note(self, what, **more):
        line = {"what": what, "epoch": self.assignment.epoch, "stage": self.assignment.stage, "pid": os.getpid()}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"time": time.time()} | more) + "\n")


class ChainRunner(fake_runner.FakeRunner):
    """A run without torch whose artifact depends on every step of it: a chain of hashes."""

    def __init__(self, assignment, writer, journal):
        super().__init__(assignment, writer)
        self.journal = journal
        self.value = ""
        if assignment.resume_path:
            state = json.loads(Path(assignment.resume_path).read_text())
            self.step, self.value = state["step"], state.get("value", "")
        journal.note("resumed", step=self.step)

    def chain(self, total, seconds, every=1, die_every=0):
        """Steps of so many seconds, a checkpoint after each `every`; with `die_every` it dies after so many steps."""
        first = self.step
        while self.step < total:
            time.sleep(seconds / 2)
            mark("mid_l_step")
            time.sleep(seconds / 2)
            self.value = hashlib.sha256(f"{self.value} {self.step}".encode()).hexdigest()
            mark("mid_c_step")
            self.step += 1
            self.journal.note("step", step=self.step)
            progress = Progress(step=self.step, total_steps=total, fraction=self.step / total)
            self.writer.send(ProgressMessage(progress=progress))
            self.writer.send(EventMessage(kind=EventKind.STEP, data={"step": self.step}))
            if self.step % every == 0:
                self.checkpoint(self.step)
            if die_every and self.step - first >= die_every and self.step < total:
                os.kill(os.getpid(), signal.SIGKILL)
        (self.work_dir / "trained.json").write_text(json.dumps({"step": self.step, "value": self.value}))

    def checkpoint(self, step):
        path = self.work_dir / f"step-{step}.checkpoint"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": step, "value": self.value}))
        mark("checkpoint_written")
        temporary.rename(path)
        mark("checkpoint_renamed")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.writer.send(CheckpointMessage(path=str(path), sha256=digest, bytes=len(content), position=step))

    def done(self, result=None):
        self.journal.note("done")
        super().done(result)


def main():
    line = sys.stdin.buffer.readline()
    assignment = fake_runner.Assignment.model_validate_json(line)
    journal = Journal(Path(sys.argv[1]), assignment)
    journal.open()
    model = Path(assignment.model_path).read_bytes()
    if model[:1] == b"{":
        apply_limits(assignment)
        ChainRunner(assignment, MessageWriter.from_environment(), journal).run(json.loads(model))
    else:
        from worker import runner

        sys.stdin = SimpleNamespace(buffer=io.BytesIO(line))
        sys.exit(runner.main())


if __name__ == "__main__":
    main()
