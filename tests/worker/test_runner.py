"""What the child tells its supervisor, and how it leaves when a worker is asked to stop."""

import io
import json
import os
import signal
import time

import pytest
import torch

from worker import runner
from worker.channel import DRAIN_SIGNAL, Assignment, MessageWriter
from worker.engine.observer import Saved

SAVED = Saved({"weight": torch.ones(2)}, {"step": 1})


@pytest.fixture
def stream():
    return io.BytesIO()


@pytest.fixture
def assignment(tmp_path):
    return Assignment(stage="learn", job_id="job_1", epoch=1, model_path="m.pt", spec={}, work_dir=str(tmp_path))


@pytest.fixture
def relay(assignment, stream):
    return runner.RelayingObserver(assignment, MessageWriter(stream))


def told(stream):
    return [json.loads(line)["type"] for line in stream.getvalue().splitlines()]


def test_a_checkpoint_too_soon_after_the_last_is_left_out(relay, stream):
    relay.checkpoint(SAVED, 1)
    assert told(stream) == []
    relay.checkpoint(SAVED, 1, must=True)
    assert told(stream) == ["checkpoint"]


def test_a_drained_child_leaves_between_steps_with_a_checkpoint(monkeypatch, assignment, relay, stream):
    def learn(_sources, _spec, observer, _saved):
        os.kill(os.getpid(), DRAIN_SIGNAL)
        time.sleep(0.01)  # a signal's handler runs between two instructions
        observer.checkpoint(SAVED, 7)
        raise AssertionError("it went on")

    before = signal.getsignal(DRAIN_SIGNAL)
    monkeypatch.setattr("worker.engine.learn.learn", learn)
    monkeypatch.setattr("service.contract.spec.parse_spec", dict)
    try:
        with pytest.raises(SystemExit):
            runner._learn(assignment, relay)
    finally:
        signal.signal(DRAIN_SIGNAL, before)
    assert told(stream) == ["checkpoint"]
    assert json.loads(stream.getvalue())["position"] == 7
