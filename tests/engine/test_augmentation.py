"""Crops, flips and shifts against a slow loop; the same moves in the same place of the run; who is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, save_data, save_model

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec, SgdSpec, Training
from service.contract.spec import Objective as ObjectiveSpec
from service.contract.training_spec import Augmentation
from worker.engine.augmentation import Augmenter
from worker.engine.course import Course
from worker.engine.data import Dataset
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.observer import Saved
from worker.engine.teacher import Teacher
from worker.engine.training import Trainer

CPU = torch.device("cpu")


def images(count: int = 40, **spec: Any) -> Dataset:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, 3, 7, 6), dtype=np.uint8)
    return Dataset({"inputs": x, "targets": np.arange(count)}, DataSpec.model_validate(spec), 0, ["x"])


def slowly(spec: Augmentation, images: np.ndarray, black: np.ndarray, moves: Any, positions: np.ndarray) -> np.ndarray:
    made = []
    for image, at in zip(images, positions, strict=True):
        _, height, width = image.shape
        moved = image.copy()
        for offsets, repeated in ((moves.crop[at], False), (moves.shift[at], True)):
            before = moved.copy()
            for y in range(height):
                for x in range(width):
                    there = (y + offsets[0], x + offsets[1])
                    near = (min(max(there[0], 0), height - 1), min(max(there[1], 0), width - 1))
                    inside = there == near
                    moved[:, y, x] = before[:, near[0], near[1]] if inside or repeated else black
        made.append(moved[:, :, ::-1] if moves.flip[at] else moved)
    return np.stack(made)


@pytest.mark.parametrize(
    "spec",
    [{"crop_pixels": 2}, {"flip": True}, {"shift_pixels": 3}, {"crop_pixels": 1, "shift_pixels": 1, "flip": True}, {}],
)
def test_moves_are_what_a_loop_makes(spec: dict[str, Any]) -> None:
    data = images(scale=1 / 255, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    given = Augmentation.model_validate(spec)
    augmenter = Augmenter(given, data)
    moves = augmenter.moves((0, 1, 2, 3))
    positions = np.array([3, 0, 7, 30, 11])
    batch = data.rows("train", positions, CPU)
    moved = augmenter.apply(batch, positions, moves)
    black = ((0 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.4])).astype(np.float32)
    np.testing.assert_allclose(
        moved.inputs[0].numpy(), slowly(given, batch.inputs[0].numpy(), black, moves, positions), atol=1e-6
    )
    assert torch.equal(moved.targets[0], batch.targets[0])


def test_moves_follow_from_the_place_in_the_run() -> None:
    augmenter = Augmenter(Augmentation(crop_pixels=2, flip=True, shift_pixels=1), images(400))
    once, again, other = (augmenter.moves(path) for path in ((5, 1, 0), (5, 1, 0), (5, 1, 1)))
    assert np.array_equal(once.crop, again.crop)
    assert not np.array_equal(once.crop, other.crop)
    assert set(np.unique(once.crop)) == {-2, -1, 0, 1, 2}
    assert set(np.unique(once.shift)) == {-1, 0, 1}
    assert 0.4 < once.flip.mean() < 0.6


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"inputs": np.zeros((20, 9), np.float32)}, "needs images"),
        ({"inputs": np.zeros((20, 1, 9, 9), np.int64)}, "needs images"),
        ({"inputs": np.zeros((20, 1, 4, 9), np.float32)}, "expected less than a side"),
        ({"inputs": np.zeros((20, 1, 9, 9), np.float32), "targets": np.zeros((20, 9, 9), np.int64)}, "the targets"),
    ],
)
def test_what_cannot_be_moved(arrays: dict[str, np.ndarray], said: str) -> None:
    data = Dataset(arrays, DataSpec(), 0, ["x"])
    with pytest.raises(ProblemError, match=said) as caught:
        Augmenter(Augmentation(crop_pixels=4), data)
    assert caught.value.code == ErrorCode.DATASET_INVALID


class Seen:
    """A teacher that notes what it is asked."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.inputs = teacher, list[torch.Tensor]()

    def answers(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self.inputs.append(inputs[0].clone())
        return self.teacher.answers(inputs)


def trainer_on(tmp_path: Path, augmentation: Augmentation | None) -> Trainer:
    model = tmp_path / "model.pt"
    if not model.exists():
        save_data(tmp_path / "data.npz", save_model(model, ConvNet()), (2, 8, 8), count=60)
    data = Dataset(dict(np.load(tmp_path / "data.npz")), DataSpec(), 0, ["x"])
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.5))
    spec = Training(optimizer=SgdSpec(lr=0.05), batch_size=16, augmentation=augmentation)
    teacher: Any = Seen(Teacher(load_model(model), data, CPU))
    return Trainer(load_model(model), data, objective, teacher, spec, 3, CPU)


def test_the_reference_answers_to_what_the_network_sees(tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path, Augmentation(crop_pixels=2, flip=True))
    course = Course.begin(trainer, 0.05)
    course.epoch((1,))
    teacher: Any = trainer.teacher
    plain = trainer.dataset.rows("train", np.arange(trainer.dataset.size("train")), CPU).inputs[0]
    seen = torch.cat(teacher.inputs)
    assert len(seen) == len(plain)
    assert 0 < sum(bool((image == plain).flatten(1).all(1).any()) for image in seen) < len(seen) / 2


def test_an_epoch_goes_on_in_its_middle_with_the_same_moves(tmp_path: Path, plain_executor: None) -> None:
    augmentation = Augmentation(crop_pixels=2, flip=True, shift_pixels=1)
    whole = Course.begin(trainer_on(tmp_path, augmentation), 0.05)
    kept: list[Any] = []

    def after_update() -> None:
        if whole.place.updates == 2:
            saved = whole.save()
            saved = Saved({name: tensor.clone() for name, tensor in saved.tensors.items()}, saved.state)
            kept.append(({k: v.clone() for k, v in whole.trainer.module.state_dict().items()}, saved))

    whole.epoch((1,), after_update=after_update)
    resumed = Course.begin(trainer_on(tmp_path, augmentation), 0.05)
    state, saved = kept[0]
    resumed.trainer.module.load_state_dict(state)
    resumed.load(saved)
    resumed.epoch((1,))
    for name, tensor in whole.trainer.module.state_dict().items():
        assert torch.equal(tensor, resumed.trainer.module.state_dict()[name]), name
