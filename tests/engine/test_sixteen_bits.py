"""Networks of 16 bits: trained in 32, and stored as they came."""

import json
from pathlib import Path

import pytest
import torch
from tiny_jobs import Mlp, save_data, save_model

from service.contract.spec import parse_spec
from worker.engine.emission import ARTIFACT, emit
from worker.engine.learn import FINAL_PLAN, Sources, learn
from worker.engine.observer import Recorder
from worker.engine.verification import verify

SPEC = {
    "budget": {"max_params_fraction": 0.6},
    "method": {"mu": {"steps": 2}},
    "training": {"epochs_per_step": 1, "optimizer": {"lr": 0.05}},
    "fine_tune": {"epochs": 2},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_file_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide.pt", Mlp(hidden=96))
    data = save_data(tmp_path / "data.npz", wide)
    network = torch.jit.load(str(wide)).to(dtype)
    model = tmp_path / "model.pt"
    torch.jit.save(network, str(model))
    work = tmp_path / "work"
    work.mkdir()
    sources, spec, recorder = Sources(model, data, "npz", work), parse_spec(SPEC), Recorder()
    learn(sources, spec, recorder)
    emit(model, work)
    report = verify(sources, spec, {}, list)
    artifact = torch.jit.load(str(work / ARTIFACT))
    assert {parameter.dtype for parameter in artifact.parameters()} == {dtype}
    assert report.params_fraction <= 0.6
    assert report.fidelity.max_abs_difference_to_trained == 0.0
    rows = json.loads((work / FINAL_PLAN).read_text(encoding="utf-8"))["rows"]
    factored = [row for row in rows if row["form"] == "matrix"]
    assert factored
    assert all(row["bits"] < 17 * row["params"] for row in factored)
