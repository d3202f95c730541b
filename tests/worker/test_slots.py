"""Slots, GPUs without torch, and the worker's own row."""

import subprocess
import sys
import time
from contextlib import ExitStack

import pynvml
import pytest
from sqlalchemy.exc import InternalError

from service.settings import QUEUES
from service.store.workers import list_workers
from worker.gpus import Gpu, visible_gpus
from worker.row import WorkerRow
from worker.slots import Slots

A, B = Gpu("GPU-a", "H200", 141 * 2**30), Gpu("GPU-b", "T4", 16 * 2**30)


@pytest.fixture
def driver(monkeypatch):
    """A driver that knows two GPUs, in the order of their addresses."""

    class Memory:
        def __init__(self, total):
            self.total = total

    known = [A, B]
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(known))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: known[index])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda gpu: gpu.uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda gpu: gpu.name)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: Memory(gpu.memory_bytes))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [A, B]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, [B, A]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-b"}, [B]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-elsewhere"}, [Gpu("GPU-elsewhere")]),
    ],
)
def test_gpus_are_known_by_uuid(driver, environment, expected):
    assert visible_gpus(environment) == expected


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def absent():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert visible_gpus({}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == [Gpu("0")]


def test_a_gpu_belongs_to_one_slot(make_house):
    slots = Slots(make_house(slots=3).settings, gpus=[A, B])
    with ExitStack() as held:
        taken = [held.enter_context(slots.take("gpu")) for _ in range(3)]
        assert [slot and slot.gpu for slot in taken] == [B, A, None]
        assert slots.busy == 2
        assert held.enter_context(slots.take("cpu")).gpu is None
        assert held.enter_context(slots.take("cpu")) is None
    assert slots.busy == 0


def test_work_for_the_cpu_leaves_the_gpus_free_while_it_can(make_house):
    slots = Slots(make_house(slots=2).settings, gpus=[A])
    with slots.take("cpu") as first, slots.take("cpu") as second:
        assert (first.gpu, second.gpu) == (None, A)


@pytest.mark.parametrize(
    ("changes", "gpus", "queues", "count"),
    [
        ({}, [], QUEUES, 1),  # embedded: whatever comes is answered here
        ({"broker_url": "redis://h"}, [], ("cpu",), 1),
        ({"broker_url": "redis://h"}, [A, B], QUEUES, 2),
        ({"broker_url": "redis://h", "worker_queues": "cpu"}, [A, B], ("cpu",), 1),
        ({"broker_url": "redis://h", "worker_queues": "gpu"}, [A, B], ("gpu",), 2),
        ({"broker_url": "redis://h", "slots": 3}, [A, B], QUEUES, 3),
    ],
)
def test_queues_and_slots_follow_the_gpus(make_house, changes, gpus, queues, count):
    slots = Slots(make_house(**{"slots": None, **changes}).settings, gpus=gpus)
    assert (slots.queues, slots.count) == (queues, count)


def test_the_row_lives_and_retires(house):
    slots = Slots(house.settings, gpus=[A])
    row = WorkerRow(house.database, house.settings, slots)
    row.start()
    with slots.take("cpu"):
        house.wait(lambda: workers(house)[0].busy == 1)
    assert workers(house)[0].devices == {"cuda": [{"uuid": "GPU-a", "name": "H200", "memory_bytes": 141 * 2**30}]}
    assert workers(house)[0].queues == ["gpu", "cpu"]
    row.stop()
    assert workers(house) == []


def test_an_idle_worker_that_hears_no_bell_says_so(make_house):
    house = make_house(worker_deaf_seconds=0.5, reconcile_seconds=0.2)
    called, depths = [], [None]

    class SomeBell:
        def queue_depth(self, queue):
            return depths[0]

    slots = Slots(house.settings, gpus=[])
    row = WorkerRow(house.database, house.settings, slots, bell=SomeBell(), on_deaf=lambda: called.append(1))
    row.start()
    house.wait(lambda: workers(house))
    assert not called
    with slots.take("cpu"):
        house.submit({})
        house.wait(lambda: workers(house)[0].busy == 1)
        assert not called  # a busy worker is not deaf
    time.sleep(0.8)
    assert not called  # nobody can hear a broker that is away
    depths[0] = 0
    house.wait(lambda: called)
    row.stop()


def test_a_row_outlives_what_the_database_does_to_it(house, monkeypatch):
    row = WorkerRow(house.database, house.settings, Slots(house.settings, gpus=[]))
    row.start()
    house.wait(lambda: workers(house))
    seen = workers(house)[0].last_seen_at
    with monkeypatch.context() as patch:
        error = InternalError("UPDATE", {}, Exception("cannot execute UPDATE in a read-only transaction"))
        for raised in (error, RuntimeError("a mistake of our own")):
            patch.setattr(house.database, "write", lambda raised=raised: raise_(raised))
            time.sleep(0.5)
    row._registered = False  # as if the answer to its registration had been lost
    house.wait(lambda: workers(house)[0].last_seen_at > seen)
    row.stop()


def raise_(error):
    raise error


def test_what_waits_for_a_large_gpu_finds_it_behind_a_small_one(make_house):
    house = make_house(slots=2, broker_url="redis://127.0.0.1:1/0", worker_queues="gpu")
    house.gpus = [B, A]
    supervisor = house.another_supervisor()
    slots = supervisor._slots
    with slots.take("gpu") as small, slots.take("gpu") as large:
        assert (small.gpu, large.gpu) == (B, A)
    assert slots.memory_bytes_free("gpu") == A.memory_bytes
    job_id = house.submit({}, spec={"device": "cuda"}, queue="gpu", min_gpu_memory_bytes=40 * 2**30)
    assert supervisor.run_next()
    assert house.attempts(job_id)[0].gpu == "GPU-a"
    assert not supervisor.run_next()


def test_the_supervising_side_imports_no_torch_and_no_http():
    code = (
        "import sys, worker.app, worker.tasks, worker.supervisor, worker.lease, worker.embedded; "
        "print([m for m in ('torch', 'fastapi', 'worker.engine', 'worker.runner') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def workers(house):
    with house.database.read() as session:
        return list_workers(session)
