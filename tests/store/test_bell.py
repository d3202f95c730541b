import threading
import time

import pytest

from service.bell import RINGS_AT_ONCE, RUN_NEXT, Bell, broker_queue, celery_configuration, make_celery
from service.settings import Settings


@pytest.fixture(params=["memory", "valkey"])
def bell(request, tmp_path):
    queue = f"queue-{time.time_ns()}"
    url = "memory://" if request.param == "memory" else request.getfixturevalue("valkey_url")
    settings = Settings(data_dir=tmp_path, broker_url=url)
    return Bell(make_celery(settings)), queue


def test_bells_wait_in_the_queue(bell):
    bell, queue = bell
    assert bell.queue_depth(queue) == 0
    assert bell.ring(queue)
    assert bell.ring(queue, 2)
    assert bell.queue_depth(queue) == 3


def test_a_bell_in_memory_is_silent(tmp_path, caplog):
    bell = Bell(make_celery(Settings(data_dir=tmp_path)))
    assert bell.ring("silent")
    assert not caplog.records


def test_a_bell_carries_the_tasks_name_and_nothing_else(bell):
    bell, queue = bell
    bell.ring(queue)
    with bell.app.connection_for_read() as connection:
        simple = connection.SimpleQueue(broker_queue(queue))
        message = simple.get(timeout=5)
        message.ack()
        simple.close()
    assert message.headers["task"] == RUN_NEXT
    assert message.content_type == "application/json"
    assert message.payload[:2] == [[], {}]


def test_a_broker_that_is_away_neither_raises_nor_delays(tmp_path):
    bell = Bell(make_celery(Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0")))
    began = time.monotonic()
    assert not bell.ring("queue")
    assert bell.queue_depth("queue") is None
    assert time.monotonic() - began < 5


def test_celery_is_told_to_keep_no_promise(tmp_path):
    for url in ("memory://", "redis://127.0.0.1:1/0"):
        found = celery_configuration(Settings(data_dir=tmp_path, broker_url=url))
        assert found["task_acks_late"] is False
        assert found["task_ignore_result"] is True
        assert found["accept_content"] == ["json"]
        assert not {"result_backend", "task_time_limit", "task_soft_time_limit"} & set(found)


def test_ringing_aside_returns_at_once_and_rings(bell):
    bell, queue = bell
    for _ in range(5):
        bell.ring_soon(queue)
    until = time.monotonic() + 5
    while bell.queue_depth(queue) != 5 and time.monotonic() < until:
        time.sleep(0.01)
    assert bell.queue_depth(queue) == 5


def test_what_is_asked_for_while_a_broker_hangs_is_rung_together(tmp_path, monkeypatch):
    bell = Bell(make_celery(Settings(data_dir=tmp_path)))
    rung, hangs = [], threading.Event()

    def ring(queue, count=1):
        rung.append((queue, count))
        hangs.wait(5)

    monkeypatch.setattr(bell, "ring", ring)
    began = time.monotonic()
    for _ in range(3000):
        bell.ring_soon("a")
    assert time.monotonic() - began < 1
    hangs.set()
    while bell._ringing:
        time.sleep(0.01)
    assert [queue for queue, _ in rung] == ["a", "a"]
    assert rung[1] == ("a", RINGS_AT_ONCE)


def test_a_process_without_threads_to_spare_accepts_jobs_all_the_same(tmp_path, monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    bell = Bell(make_celery(Settings(data_dir=tmp_path)))
    monkeypatch.setattr(threading.Thread, "start", start)
    bell.ring_soon("a")
    monkeypatch.undo()
    bell.ring_soon("a")
    until = time.monotonic() + 5
    while bell.queue_depth("a") != 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert bell.queue_depth("a") == 2
