"""Slots, GPUs without torch, and the worker's own row."""

import subprocess
import sys
import threading

from service.store.workers import list_workers
from worker.slots import Slots, WorkerRow, visible_gpus


def test_gpus_are_named_by_the_environment():
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-abc"}) == ["2", "GPU-abc"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_slots_are_shared_out(make_house):
    slots = Slots(make_house(slots=2).settings, gpus=["A", "B"])
    with slots.take() as first, slots.take() as second:
        assert [(slot.number, slot.gpu) for slot in (first, second)] == [(0, "A"), (1, "B")]
        assert slots.busy == 2
        taken = threading.Event()

        def third():
            with slots.take():
                taken.set()

        threading.Thread(target=third, daemon=True).start()
        assert not taken.wait(0.1)
    assert taken.wait(1.0)


def test_more_slots_than_gpus_share_them(make_house):
    slots = Slots(make_house(slots=2).settings, gpus=["A"])
    with slots.take() as first, slots.take() as second:
        assert first.gpu == second.gpu == "A"


def test_the_row_lives_and_retires(house):
    slots = Slots(house.settings, gpus=["A"])
    row = WorkerRow(house.database, house.settings, slots)
    row.start()
    with slots.take():
        house.wait(lambda: workers(house)[0].busy == 1)
    assert workers(house)[0].devices == {"cuda": ["A"]}
    row.stop()
    assert workers(house) == []


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
