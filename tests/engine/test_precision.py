"""Narrow arithmetic and another memory format give the same training, nearly; the scale of losses is saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, save_data, save_model

from service.contract.spec import DataSpec, SgdSpec, Training
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.course import Course
from worker.engine.data import Dataset
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.teacher import Teacher
from worker.engine.training import Penalty, Trainer

pytestmark = pytest.mark.usefixtures("plain_executor")
CPU = torch.device("cpu")


def course_on(folder: Path, device: torch.device = CPU, **training: Any) -> Course:
    model = folder / "model.pt"
    if not model.exists():
        save_data(folder / "data.npz", save_model(model, ConvNet()), (2, 8, 8), count=100)
    data = Dataset(dict(np.load(folder / "data.npz")), DataSpec(), 0, ["x"])
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.5))
    spec = Training(optimizer=SgdSpec(lr=0.05), batch_size=16, **training)
    teacher = Teacher(load_model(model, device), data, device)
    return Course.begin(Trainer(load_model(model, device), data, objective, teacher, spec, 3, device), 0.05)


def trained(course: Course, pull: float = 0.0) -> dict[str, torch.Tensor]:
    weight = dict(course.trainer.module.named_parameters())["conv1.weight"]
    penalty = Penalty([weight], [torch.zeros_like(weight)], pull) if pull else None
    course.epoch((1,), penalty)
    return {name: tensor.detach().cpu().clone() for name, tensor in course.trainer.module.state_dict().items()}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_arithmetic_trains_wide_weights(precision: str, tmp_path: Path) -> None:
    wide, narrow = trained(course_on(tmp_path), 0.5), trained(course_on(tmp_path, precision=precision), 0.5)
    start = load_model(tmp_path / "model.pt").state_dict()
    for name, tensor in wide.items():
        assert narrow[name].dtype == tensor.dtype
        if name.endswith("weight") and not name.startswith("bn"):
            moved = (tensor - start[name]).norm()
            assert 0 < (narrow[name] - tensor).norm() < 0.1 * moved, name


def test_auto_is_the_networks_own_precision(tmp_path: Path) -> None:
    plain, given = trained(course_on(tmp_path)), trained(course_on(tmp_path, precision="float32"))
    assert all(torch.equal(tensor, given[name]) for name, tensor in plain.items())
    assert course_on(tmp_path).save().state["scale"] is None


def test_channels_last_is_the_same_training(tmp_path: Path) -> None:
    course = course_on(tmp_path, memory_format="channels_last")
    plain, given = trained(course_on(tmp_path)), trained(course)
    assert all(torch.allclose(tensor, given[name], atol=1e-5) for name, tensor in plain.items())
    assert all(parameter.is_contiguous() for parameter in course.trainer.module.parameters())


def test_an_update_that_overflows_is_left_out_and_the_scale_is_saved(tmp_path: Path) -> None:
    course = course_on(tmp_path, precision="float16")
    course.trainer.precision.load({"scale": 2.0**120, "growth_factor": 2.0, "backoff_factor": 0.5,
                                   "growth_interval": 2000, "_growth_tracker": 0})  # fmt: skip
    before = {name: each.clone() for name, each in course.trainer.module.named_parameters()}
    course.epoch((1,))
    assert all(torch.equal(each, before[name]) for name, each in course.trainer.module.named_parameters())
    saved = course.save()
    assert saved.state["scale"]["scale"] == 2.0 ** (120 - course.trainer.updates_per_epoch)
    again = course_on(tmp_path, precision="float16")
    again.load(saved)
    assert again.save().state["scale"] == saved.state["scale"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_the_device(precision: str, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    wide = trained(course_on(tmp_path, cuda), 0.5)
    narrow = trained(course_on(tmp_path, cuda, precision=precision, memory_format="channels_last"), 0.5)
    for name, tensor in wide.items():
        if name.endswith("weight"):
            assert torch.allclose(narrow[name], tensor, atol=0.02), name
