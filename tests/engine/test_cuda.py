"""The same job on a CUDA device: ranks within two, the metric within the interval of the CPU run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, Learned, Looped, Mlp, quick, run_learn, save_data, save_model

from service.contract.report import Report
from service.contract.spec import parse_spec
from worker.checkpoint import read_checkpoint, write_checkpoint
from worker.engine.csteps.spectrum import energies_of, leading_spectrum
from worker.engine.emission import emit
from worker.engine.learn import Sources
from worker.engine.verification import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: Mlp(64, 96), (64,)),
    "convnet": (ConvNet, (2, 8, 8)),
    "looped": (Looped, (20,)),
}


def ranks(learned: Learned) -> dict[tuple[str, int], int]:
    return {(row.layer, row.term): row.rank or 0 for row in learned.final_rows if row.rank is not None}


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_same_job(name: str, tmp_path: Path) -> None:
    make, shape = NETS[name]
    model = save_model(tmp_path / "model.pt", make())
    data = save_data(tmp_path / "data.npz", model, shape, count=600, parts=("val_", "test_"))
    learned: dict[str, Learned] = {}
    reports: dict[str, Report] = {}
    for device in ("cpu", "cuda"):
        spec = quick(
            budget={"max_params_fraction": 0.6}, method={"mu": {"steps": 6}}, fine_tune={"epochs": 3}, device=device
        )
        learned[device] = run_learn(tmp_path / device, model, spec, data)
        assert learned[device].plan["device"] == device
        if name == "mlp":  # the other files are too small to shrink
            emit(model, tmp_path / device)
            reports[device] = verify(Sources(model, data, "npz", tmp_path / device), parse_spec(spec), {}, list)
    one, other = ranks(learned["cpu"]), ranks(learned["cuda"])
    for place in one.keys() | other.keys():
        if place in one and place in other:
            assert abs(one[place] - other[place]) <= 2, place
    if reports:
        (interval, metric) = (reports["cpu"].differences[0], reports["cuda"].differences[0].difference)
        assert interval.low <= metric <= interval.high
        assert torch.cuda.get_device_name() in reports["cuda"].device


def test_a_job_goes_from_one_device_to_the_other(tmp_path: Path) -> None:
    """A checkpoint of one device is taken up on the other."""
    model = save_model(tmp_path / "model.pt", Mlp(64, 96))
    data = save_data(tmp_path / "data.npz", model, (64,))
    specs = {d: quick(budget={"max_params_fraction": 0.5}, device=d) for d in ("cpu", "cuda")}
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        whole = run_learn(tmp_path / here, model, specs[here], data)
        for number, saved in enumerate(whole.recorder.checkpoints):
            message = write_checkpoint(saved, tmp_path / f"c-{here}", number)
            resumed = run_learn(
                tmp_path / f"{here}{number}", model, specs[there], data, read_checkpoint(Path(message.path))
            )
            assert resumed.plan["device"] == there
            assert all(tensor.device.type == "cpu" for tensor in resumed.state.values())


def test_energies_on_the_device_are_those_of_the_processor() -> None:
    matrix = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    wanted = energies_of(matrix).numpy()
    np.testing.assert_allclose(energies_of(matrix.cuda()).cpu().numpy(), wanted, rtol=1e-9)
    here, there = leading_spectrum(matrix, at_most=5), leading_spectrum(matrix.cuda(), at_most=5)
    np.testing.assert_allclose(there.vectors.cpu().numpy(), here.vectors.numpy(), atol=1e-8)
    threshold = float(wanted[10]) * 1.0001
    assert len(leading_spectrum(matrix.cuda(), above=threshold).energies) == 10


def test_a_model_saved_on_the_device_is_served_without_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", Mlp(64, 96))
    data = save_data(tmp_path / "data.npz", model, (64,))
    module = torch.jit.load(str(model)).cuda()
    torch.jit.save(module, tmp_path / "cuda.pt")
    learned = run_learn(tmp_path / "w", tmp_path / "cuda.pt", quick(budget={"max_params_fraction": 0.5}), data)
    assert learned.plan["device"] == "cpu"
