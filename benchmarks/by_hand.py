"""The three processes of a job started by hand: what the job costs without the service around it."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worker.attempt import STAGES
from worker.channel import Assignment, DoneMessage, FailedMessage, parse_message
from worker.sandbox import child_environment


def run_stages(
    model: Path, data: Path | None, spec: Mapping[str, Any], work_dir: Path, thread_count: int, memory_bytes: int
) -> float:
    """Run learning, emission and verification with the assignment that a supervisor gives; returns the seconds."""
    work_dir.mkdir()
    assignment = Assignment(
        stage="learn",
        job_id="job_by_hand",
        epoch=1,
        model_path=str(model),
        data_path=None if data is None else str(data),
        data_format=None if data is None else "npz",
        spec=dict(spec),
        work_dir=str(work_dir),
        thread_count=thread_count,
        device="cpu",
        memory_bytes_max=memory_bytes,
    )
    began = time.perf_counter()
    for stage in STAGES:
        _run_stage(assignment.model_copy(update={"stage": stage}))
    return time.perf_counter() - began


def _run_stage(assignment: Assignment) -> None:
    """Start one process, read what it says to its end, and let it go."""
    reading, writing = os.pipe()
    environment = child_environment(
        os.environ, work_dir=Path(assignment.work_dir), thread_count=assignment.thread_count, channel_fd=writing
    )
    command = [sys.executable, "-m", "worker.runner"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=(writing,), env=environment, cwd=assignment.work_dir
    ) as process:
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(assignment.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        last = None
        with os.fdopen(reading, "rb") as channel:
            for line in channel:
                last = parse_message(line)
        process.wait()  # its standard input stays open until then: when that closes, a child ends itself
    if isinstance(last, FailedMessage):
        raise SystemExit(f"the stage {assignment.stage} failed by hand: {last.problem.detail}")
    if not isinstance(last, DoneMessage) or process.returncode != 0:
        raise SystemExit(f"the stage {assignment.stage} ended by hand with exit code {process.returncode}")
