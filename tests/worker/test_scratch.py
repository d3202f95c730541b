"""A worker's own directory: nobody else's while it lives, and gone after it."""

import os
import subprocess
import sys
import time

from worker.scratch import Scratch


def age(path):
    old = time.time() - 3600
    os.utime(path, (old, old))


def test_the_directories_of_dead_workers_are_removed_and_no_others(tmp_path):
    code = (
        f"from worker.scratch import Scratch; from pathlib import Path; Scratch(Path({str(tmp_path)!r}), 'wrk_{{0}}')"
    )
    dead = subprocess.run([sys.executable, "-c", code.format("dead") + ".open(alone=False)"], check=True)
    assert dead.returncode == 0
    live = Scratch(tmp_path, "wrk_live")
    live.open(alone=False)
    for name in ("wrk_dead", "wrk_live"):
        (tmp_path / name / "job_x" / "1").mkdir(parents=True)
        age(tmp_path / name)
    (tmp_path / "wrk_young").mkdir()
    third = Scratch(tmp_path, "wrk_third")
    third.open(alone=False)
    assert {path.name for path in tmp_path.iterdir()} == {"wrk_live", "wrk_young", "wrk_third"}
    live.close()
    third.close()
    assert {path.name for path in tmp_path.iterdir()} == {"wrk_young"}


def test_who_is_alone_removes_everything_else(tmp_path):
    (tmp_path / "job_of_an_older_version" / "1").mkdir(parents=True)
    scratch = Scratch(tmp_path, "wrk_own")
    scratch.open(alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {"wrk_own"}
    scratch.close()


def test_an_attempt_has_a_place_of_its_own(tmp_path):
    scratch = Scratch(tmp_path, "wrk_own")
    assert scratch.attempt("job_x", 2) == tmp_path / "wrk_own" / "job_x" / "2"
