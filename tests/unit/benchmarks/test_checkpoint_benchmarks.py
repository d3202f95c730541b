import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import checkpoint, idle


def only_run(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.local.json").read_text())
    (run,) = content["runs"]
    return dict(run)


def test_checkpoint_times_saving_and_resuming_of_a_real_child(tmp_path: Path) -> None:
    arguments = ["--quick", "--saves", "1", "--threads", "1", "--results", str(tmp_path)]
    assert checkpoint.main(arguments) in {0, 1}
    run = only_run(tmp_path, "checkpoint")
    assert {limit["name"]: limit["bound"] for limit in run["limits"]} == {
        "standstill of a checkpoint / default cadence": 0.02,
        "resume, to the first update": 15.0,
    }
    standstill = run["figures"]["standstill of a checkpoint"]["median"]
    assert run["limits"][0]["measured"] == pytest.approx(standstill / 300)
    assert 0 < standstill < run["figures"]["resume, to the first update"]["median"]


def test_the_idle_share_is_that_of_the_process_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        assert idle.idle_share(psutil.Process(busy.pid), 0.5) > 0.05
        assert idle.idle_share(psutil.Process(os.getpid()), 0.2) < 0.5
        busy.kill()


def test_pytorch_is_seen_in_a_process_that_loads_it() -> None:
    import torch  # noqa: F401

    assert idle.loads_torch(psutil.Process())
    command = [sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not idle.loads_torch(psutil.Process(other.pid))
        other.kill()


@pytest.mark.full
def test_idle_watches_a_real_worker(tmp_path: Path) -> None:
    assert idle.main(["--quick", "--results", str(tmp_path)]) in {0, 1}
    run = only_run(tmp_path, "idle")
    assert [limit["bound"] for limit in run["limits"]] == [0.01, 120.0, 0.0]
    assert run["limits"][2]["measured"] == 0
