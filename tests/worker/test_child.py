"""A child process on its own: its words, its limits, its environment and its end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from worker.channel import Assignment, DoneMessage, EventMessage, parse_message
from worker.child import STDERR_TAIL_BYTES, ChannelBrokenError, ChildProcess, regular_file
from worker.sandbox import child_environment

FAKE_RUNNER = Path(__file__).with_name("fake_runner.py")


class Started:
    """A fake child and what it has said so far."""

    def __init__(self, tmp_path, operations, **fields):
        script = tmp_path / "script.json"
        script.write_text(json.dumps({"learn": operations}))
        self.work_dir = tmp_path / "work"
        self.work_dir.mkdir(exist_ok=True)
        assignment = Assignment(
            stage="learn",
            job_id="job_x",
            epoch=1,
            model_path=str(script),
            spec={},
            work_dir=str(self.work_dir),
            **fields,
        )
        self.child = ChildProcess(
            [sys.executable, str(FAKE_RUNNER)],
            assignment,
            lambda fd: child_environment(os.environ, work_dir=self.work_dir, thread_count=1, channel_fd=fd),
        )
        self.lines = []

    def read_until(self, condition, seconds=10.0):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.child.stderr_tail
            self.lines += self.child.read_lines(0.05)

    def finish(self):
        self.read_until(lambda: self.child.exited() and self.child.drained())
        return self.child.close()


@pytest.fixture
def start(tmp_path):
    started = []

    def starter(operations, **fields):
        started.append(Started(tmp_path, operations, **fields))
        return started[-1]

    yield starter
    for one in started:
        one.child.close()


def test_a_child_says_its_messages_and_ends(start):
    child = start([["event", "log", {"message": "hello"}]])
    assert child.finish() == 0
    event, done = map(parse_message, child.lines)
    assert isinstance(event, EventMessage)
    assert event.data == {"message": "hello"}
    assert isinstance(done, DoneMessage)


def test_the_environment_holds_no_secret(start, monkeypatch):
    monkeypatch.setenv("RANKPRESS_API_KEY", "a-secret-of-the-service")
    monkeypatch.setenv("RANKPRESS_DATABASE_URL", "postgresql://user:password@host/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    child = start([["environment"]])
    child.finish()
    environment = parse_message(child.lines[0]).data["environment"]
    assert [name for name in environment if name.startswith("RANKPRESS_")] == ["RANKPRESS_CHANNEL_FD"]
    assert "secret" not in json.dumps(environment)
    assert "password" not in json.dumps(environment)
    assert environment["PYTHONHASHSEED"] == "0"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"
    assert environment["HOME"] == environment["TMPDIR"] == str(child.work_dir)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_the_address_space_is_limited_on_a_cpu(start):
    child = start([["reserve", 2**31]], memory_bytes_max=2**30, device="cpu")
    child.finish()
    assert parse_message(child.lines[-1]).problem.code == "OUT_OF_MEMORY"


def test_the_address_space_is_free_where_cuda_reserves_it(start):
    child = start([["reserve", 2**31]], memory_bytes_max=2**30, device="cuda")
    child.finish()
    assert isinstance(parse_message(child.lines[-1]), DoneMessage)


def test_the_child_ends_when_its_standard_input_closes(start):
    child = start([["phase", "learning"], ["sleep", 60]])
    child.read_until(lambda: child.lines)
    child.child._stdin.close()
    child.read_until(child.child.exited, seconds=3.0)
    assert child.child.close() == -signal.SIGKILL


def test_the_child_of_another_parent_leaves_at_once(start):
    child = start([["sleep", 60]], supervisor_pid=os.getpid() + 1)
    child.read_until(child.child.exited, seconds=5.0)
    assert child.child.close() == 1


def test_the_child_dies_with_the_thread_that_started_it(start):
    children = []

    def start_and_leave():
        children.append(start([["phase", "learning"], ["sleep", 60]]))
        children[0].read_until(lambda: children[0].lines)  # it has asked for the signal now

    thread = threading.Thread(target=start_and_leave)
    thread.start()
    thread.join()
    children[0].read_until(children[0].child.exited, seconds=3.0)
    assert children[0].child.close() == -signal.SIGKILL


def test_a_grandchild_ends_with_the_child(start, tmp_path):
    child = start([["grandchild", str(tmp_path / "pid")], ["phase", "learning"], ["sleep", 60]])
    child.read_until(lambda: child.lines)
    grandchild = int((tmp_path / "pid").read_text())
    assert child.child.close() == -signal.SIGKILL
    until = time.monotonic() + 3
    while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_only_the_tail_of_standard_error_is_kept(start):
    child = start([["stderr", "x" * 99, 3000], ["stderr", "the last word", 1]])
    child.finish()
    assert len(child.child.stderr_tail) <= STDERR_TAIL_BYTES
    assert child.child.last_error_line == "the last word"


def test_a_line_without_end_is_refused(start, monkeypatch):
    monkeypatch.setattr("worker.child.LINE_BYTES_MAX", 2**20)
    child = start([["endless_line"]])
    with pytest.raises(ChannelBrokenError, match="1048576 bytes"):
        child.read_until(lambda: False)


def test_signals_after_the_end_are_harmless(start):
    child = start([])
    child.finish()
    child.child.signal_group(signal.SIGKILL)
    assert child.child.close() == 0
    assert child.child.resident_bytes() == 0


def test_a_command_that_does_not_exist_leaves_no_descriptor(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    assignment = Assignment(stage="learn", job_id="j", epoch=1, model_path="m", spec={}, work_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError):
        ChildProcess(["/does/not/exist"], assignment, lambda fd: {})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_regular_files_of_the_directory_are_taken(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "file").write_text("x")
    (inside / "link").symlink_to(outside)
    (inside / "directory").mkdir()
    assert regular_file(inside / "file", inside) == inside / "file"
    for bad in (inside / "link", outside, inside / ".." / "outside", inside / "directory", inside / "missing"):
        with pytest.raises(ChannelBrokenError, match="regular file"):
            regular_file(bad, inside)


def test_sandbox_and_channel_import_nothing_of_the_service_side():
    code = (
        "import sys, worker.sandbox, worker.child; "
        "print([m for m in ('torch', 'sqlalchemy', 'celery', 'fastapi') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_child_whose_supervisor_is_silent_exits(start):
    started = start([["sleep", 60]], first_silence_seconds_max=0.5, silence_seconds_max=0.5)
    began = time.monotonic()
    assert started.finish() == -signal.SIGKILL
    assert time.monotonic() - began < 5


def test_a_child_that_hears_of_its_supervisor_lives(start):
    started = start([["sleep", 2.5], ["done"]], first_silence_seconds_max=5.0, silence_seconds_max=1.0)
    until = time.monotonic() + 30

    def over():
        started.child.show_life()
        return started.child.exited() and started.child.drained()

    started.read_until(over, seconds=until - time.monotonic())
    assert started.child.close() == 0
