"""What the child tells its supervisor, when it writes a checkpoint, and how it leaves when it is asked to."""

import io
import json
import os
import signal
import time

import pytest
import torch

from worker import runner
from worker.channel import DRAIN_SIGNAL, Assignment, MessageWriter
from worker.checkpoint import write_checkpoint
from worker.engine.observer import Saved

SAVED = Saved({"weight": torch.ones(2)}, {"step": 1})


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(runner, "time", made)
    return made


@pytest.fixture
def stream():
    return io.BytesIO()


@pytest.fixture
def assignment(tmp_path):
    return Assignment(stage="learn", job_id="job_1", epoch=1, model_path="m.pt", spec={}, work_dir=str(tmp_path))


@pytest.fixture
def relay(assignment, stream, clock):
    return runner.RelayingObserver(assignment, MessageWriter(stream))


def save():
    return SAVED


def never():
    raise AssertionError("the state is made, and is not written")


def told(stream):
    return [json.loads(line)["type"] for line in stream.getvalue().splitlines()]


def positions(stream):
    return [json.loads(line)["position"] for line in stream.getvalue().splitlines()]


def test_a_checkpoint_too_soon_after_the_last_is_left_out_and_not_even_made(relay, stream, clock):
    clock.now += 29
    relay.checkpoint(never, 1)
    clock.now += 1
    relay.checkpoint(save, 2)
    relay.checkpoint(never, 3)
    relay.checkpoint(save, 4, must=True)
    assert positions(stream) == [2, 4]


def test_in_the_middle_of_a_step_one_is_due_after_five_minutes(relay, clock):
    clock.now += 299
    assert not relay.pulse("l_step", 1, 9)
    clock.now += 1
    assert relay.pulse("l_step", 2, 9)
    relay.checkpoint(save, 2, must=True)
    assert not relay.pulse("l_step", 3, 9)


def test_between_steps_they_take_at_most_a_fiftieth_of_the_time(relay, stream, clock):
    def slowly():
        clock.now += 4
        return SAVED

    relay.checkpoint(slowly, 1, must=True)
    clock.now += 199
    relay.checkpoint(never, 2)
    clock.now += 1
    relay.checkpoint(slowly, 3)
    assert positions(stream) == [1, 3]


def test_however_long_one_takes_none_waits_longer_than_asked(relay, stream, clock):
    def slowly():
        clock.now += 60
        return SAVED

    relay.checkpoint(slowly, 1, must=True)
    clock.now += 300
    assert relay.pulse("l_step", 1, 2)
    relay.checkpoint(save, 2)
    assert positions(stream) == [1, 2]


def test_without_a_spacing_every_pulse_and_boundary_writes_one(assignment, stream):
    always = assignment.model_copy(update={"checkpoint_seconds": 0.0, "checkpoint_spacing_seconds": 0.0})
    relay = runner.RelayingObserver(always, MessageWriter(stream))
    for position in (1, 2, 3):
        assert relay.pulse("l_step", position, 3)
        relay.checkpoint(save, position, must=True)
        relay.checkpoint(never, position)  # what is written already is not written again
    relay.checkpoint(save, 4)
    assert positions(stream) == [1, 2, 3, 4]


def test_marks_are_passed_in_the_middle_of_a_step(relay, monkeypatch):
    passed = []
    monkeypatch.setattr(runner, "mark", passed.append)
    for kind, total in (("fine_tune", 3), ("l_step", 1), ("l_step", 4), ("l_step", 5)):
        for done in range(1, total + 1):
            relay.pulse(kind, done, total)
    assert passed == ["mid_l_step"] * 7  # but not at the ends of epochs
    relay.pulse("c_step", 1, 1)
    assert passed[7:] == ["mid_c_step"]


def test_marks_are_passed_before_and_after_the_rename(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "worker.checkpoint.mark", lambda point: seen.append((point, sorted(path.suffix for path in tmp_path.iterdir())))
    )
    write_checkpoint(SAVED, tmp_path, 1)
    assert seen == [("checkpoint_written", [".tmp"]), ("checkpoint_renamed", [".safetensors"])]


@pytest.fixture
def draining(monkeypatch, assignment, relay):
    """Run the first stage with another engine, and put the signal's handler back."""
    before = signal.getsignal(DRAIN_SIGNAL)
    monkeypatch.setattr("service.contract.spec.parse_spec", dict)

    def run(learn):
        monkeypatch.setattr("worker.engine.learn.learn", learn)
        with pytest.raises(SystemExit) as left:
            runner._learn(assignment, relay)
        assert left.value.code == 0

    yield run
    signal.signal(DRAIN_SIGNAL, before)


def test_a_drained_child_leaves_after_the_next_update_with_a_checkpoint(draining, stream):
    def learn(_sources, _spec, observer, _saved):
        assert not observer.pulse("l_step", 1, 9)
        os.kill(os.getpid(), DRAIN_SIGNAL)
        time.sleep(0.01)  # a signal's handler runs between two instructions
        assert observer.pulse("l_step", 2, 9)
        observer.checkpoint(save, 7, must=True)
        raise AssertionError("it went on")

    draining(learn)
    assert positions(stream) == [7]


def test_a_drained_child_leaves_between_steps_too(draining, stream):
    def learn(_sources, _spec, observer, _saved):
        os.kill(os.getpid(), DRAIN_SIGNAL)
        time.sleep(0.01)
        observer.checkpoint(save, 7)
        raise AssertionError("it went on")

    draining(learn)
    assert positions(stream) == [7]


def test_a_drained_child_does_not_write_what_is_written(draining, stream):
    def learn(_sources, _spec, observer, _saved):
        observer.checkpoint(save, 7, must=True)
        os.kill(os.getpid(), DRAIN_SIGNAL)
        time.sleep(0.01)
        observer.checkpoint(never, 7)
        raise AssertionError("it went on")

    draining(learn)
    assert positions(stream) == [7]


def test_a_checkpoint_of_another_release_begins_the_job_anew(assignment, relay, stream, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "old.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"rankpress_state": json.dumps({"step": 3})})
    resumed = assignment.model_copy(update={"resume_path": str(path)})
    assert runner._saved(resumed, relay) is None
    assert told(stream) == ["event"]
    assert json.loads(stream.getvalue())["data"]["code"] == "CHECKPOINT_NOT_READ"
    assert runner._saved(assignment, relay) is None
    kept = write_checkpoint(SAVED, tmp_path, 2)
    assert runner._saved(assignment.model_copy(update={"resume_path": kept.path}), relay).state == {"step": 1}
