"""The benchmark of C steps: what it compares is the same problem, and its peer is the closed form."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import cstep
from worker.engine.csteps.additive import project


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_measures_every_way_at_toy_size(tmp_path: Path) -> None:
    assert cstep.main(["--quick", "--results", str(tmp_path)]) in {0, 1}
    (run,) = json.loads((tmp_path / "cstep.local.json").read_text())["runs"]
    ways = [f"toy, {scheme}: {way}" for scheme in cstep.SPEED for way in ("full SVD", "C step", "last C step")]
    assert set(run["figures"]) == {*ways, "toy: all layers, workers: 1", "toy: all layers, workers: 2"}
    limits = {limit["name"]: limit for limit in run["limits"]}
    assert [limits[f"toy, {scheme}: speed"]["bound"] for scheme in cstep.SPEED] == [4.0, 2.0, 10.0]
    good = [limit for name, limit in limits.items() if "objective" in name or "apart" in name or "bits" in name]
    assert len(good) == 3 * 2 * 2 + 1
    assert all(limit["kept"] for limit in good)


def test_the_peer_is_the_closed_form() -> None:
    layer = cstep.Layer.make((24, 16, 3, 3), 1)
    (choice,) = layer.terms("scheme 1")
    peer = cstep.by_full_svd(layer.weight, [choice], layer.pressure, None)
    made = project(layer.weight, [choice], layer.pressure)
    assert peer.ranks == made.ranks
    assert cstep.objective(layer, [choice], peer) == pytest.approx(made.objective, rel=1e-5)
    one = cstep.Layer.make((24, 16, 1, 1), 1)
    assert len(one.terms("additive")) == 1  # both reshapes have the same matrix
