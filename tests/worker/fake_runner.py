"""A child that does what the model file says: a JSON object {stage: [[operation, argument, …], …]}.

It speaks the same words as the real child and binds itself to its supervisor in the same way, without torch.
"""

import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from service.contract.errors import ErrorCode, ProblemError
from service.contract.events import EventKind, Progress
from service.contract.plan import Form, LayerFacts, RankRow
from worker.channel import (
    ARTIFACT_FILE,
    DRAIN_SIGNAL,
    REPORT_FILE,
    Assignment,
    CheckpointMessage,
    DoneMessage,
    EventMessage,
    LayersMessage,
    MessageWriter,
    PhaseMessage,
    ProgressMessage,
    RanksMessage,
    ResolvedMessage,
    failure,
)
from worker.sandbox import apply_limits

DEFAULTS = {
    "learn": [["phase", "learning"], ["steps", 2, 0.0]],
    "emit": [["emit"]],
    "verify": [["verify"]],
}


class FakeRunner:
    def __init__(self, assignment, writer):
        self.assignment = assignment
        self.writer = writer
        self.work_dir = Path(assignment.work_dir)
        self.step = 0
        if assignment.resume_path:
            self.step = json.loads(Path(assignment.resume_path).read_text())["step"]

    def run(self, script):
        for name, *arguments in script.get(self.assignment.stage, DEFAULTS[self.assignment.stage]):
            getattr(self, name)(*arguments)
        self.done()

    # What a well-behaved child does.
    def phase(self, name):
        self.writer.send(PhaseMessage(phase=name))

    def steps(self, total, seconds):
        while self.step < total:
            time.sleep(seconds)
            self.step += 1
            progress = Progress(step=self.step, total_steps=total, fraction=self.step / total)
            self.writer.send(ProgressMessage(progress=progress))
            self.writer.send(EventMessage(kind=EventKind.STEP, data={"step": self.step}))
            self.checkpoint(self.step)
        (self.work_dir / "trained.json").write_text(json.dumps({"step": self.step}))

    def checkpoint(self, step):
        self.step = step
        path = self.work_dir / f"step-{step}.checkpoint"
        path.write_text(json.dumps({"step": step}))
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.writer.send(CheckpointMessage(path=str(path), sha256=digest, bytes=len(content), position=step))

    def layers(self, name="fc"):
        facts = [LayerFacts(position=0, name=name, kind="linear", weight_shape=[4, 4], params=20, macs=16)]
        self.writer.send(LayersMessage(layers=facts))

    def ranks(self, step, rank, chosen):
        row = RankRow(step=step, layer="fc", term=0, form=Form.MATRIX, rank=rank, params=8, macs=8, chosen=chosen)
        self.writer.send(RanksMessage(rows=[row]))

    def resolved(self, seed):
        self.writer.send(ResolvedMessage(spec={**self.assignment.spec, "seed": seed}))

    def event(self, kind, data):
        self.writer.send(EventMessage(kind=EventKind(kind), data=data))

    def events(self, count):
        for number in range(count):
            self.event("log", {"level": "info", "message": f"line {number}"})

    def emit(self):
        trained = (self.work_dir / "trained.json").read_text()
        (self.work_dir / ARTIFACT_FILE).write_text(f"artifact of {trained}")

    def report(self):
        artifact = (self.work_dir / ARTIFACT_FILE).read_bytes()
        (self.work_dir / REPORT_FILE).write_text(json.dumps({"artifact": hashlib.sha256(artifact).hexdigest()}))

    def verify(self):
        self.report()
        self.done({"summary": {"params_fraction": 0.5, "macs_fraction": 0.5, "file_bytes_fraction": 0.5}})

    def done(self, result=None):
        self.writer.send(DoneMessage(result=result or {}))
        sys.exit(0)

    def fail(self, code, detail, permanent):
        self.writer.send(failure(ProblemError(ErrorCode(code), detail), permanent=permanent))
        sys.exit(1)

    def environment(self):
        self.event(
            "log", {"level": "info", "environment": dict(os.environ), "assignment": self.assignment.model_dump()}
        )

    # What a bad one does.
    def sleep(self, seconds):
        time.sleep(seconds)

    def wait_for(self, path):
        while not Path(path).exists():
            time.sleep(0.05)

    def exit(self, code):
        os._exit(code)

    def kill(self, number):
        os.kill(os.getpid(), number)

    def kill_supervisor(self):
        os.kill(os.getppid(), signal.SIGKILL)

    def fresh(self, *operation):
        """Only an attempt that resumes nothing does this."""
        if not self.assignment.resume_path:
            getattr(self, operation[0])(*operation[1:])

    def epoch(self, epoch, *operation):
        if self.assignment.epoch == epoch:
            getattr(self, operation[0])(*operation[1:])

    def line(self, text):
        os.write(int(os.environ["RANKPRESS_CHANNEL_FD"]), text.encode() + b"\n")

    def endless_line(self):
        while True:
            os.write(int(os.environ["RANKPRESS_CHANNEL_FD"]), b"x" * 65536)

    def stderr(self, text, times):
        for _ in range(times):
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def allocate(self, size):
        self.memory = b"x" * size

    def reserve(self, size):
        """Take address space and never touch it."""
        try:
            self.memory = mmap.mmap(-1, size)
        except OSError as error:
            raise MemoryError from error

    def ignore_term(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def checkpoint_on_drain(self, step):
        def leave(*_):
            self.checkpoint(step)
            sys.exit(0)

        signal.signal(DRAIN_SIGNAL, leave)

    def write_pid(self, path):
        Path(path).write_text(str(os.getpid()))

    def grandchild(self, path):
        process = subprocess.Popen(["sleep", "60"])
        Path(path).write_text(str(process.pid))

    def link_artifact(self, target):
        (self.work_dir / ARTIFACT_FILE).symlink_to(target)


def main():
    assignment = Assignment.model_validate_json(sys.stdin.buffer.readline())
    apply_limits(assignment)
    writer = MessageWriter.from_environment()
    try:
        FakeRunner(assignment, writer).run(json.loads(Path(assignment.model_path).read_text()))
    except MemoryError:
        writer.send(failure(ProblemError(ErrorCode.OUT_OF_MEMORY, "the fake child met its limit")))


if __name__ == "__main__":
    main()
