"""The training loop against plain PyTorch: the same updates, the pull, memory, and repetition bit for bit."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, Mlp, save_data, save_model
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec, SgdSpec, Training
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine import training
from worker.engine.data import Dataset, epoch_order
from worker.engine.forward import call
from worker.engine.methods.learning_rate import CANDIDATES, range_test, step_rate
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.training import Penalty, Trainer

CPU = torch.device("cpu")
PLACE = (1, 2)


def make_trainer(
    tmp_path: Path, batch_size: int = 32, net: Any = Mlp, shape: tuple[int, ...] = (20,), **sgd: Any
) -> Trainer:
    model = tmp_path / "model.pt"
    if not model.exists():
        save_model(model, net())
        save_data(tmp_path / "data.npz", model, shape, count=100)
    dataset = Dataset(dict(np.load(tmp_path / "data.npz")), DataSpec(), 0, ["x"])
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.0))
    spec = Training(optimizer=SgdSpec.model_validate(sgd), batch_size=batch_size)
    return Trainer(load_model(model), dataset, objective, None, spec, 5, CPU)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.module.named_parameters()}


def test_an_epoch_is_plain_training_with_the_pull(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, weight_decay=1e-3)
    net = Mlp()
    net.load_state_dict(trainer.module.state_dict())
    anchor = torch.randn(32, 20)
    weight = dict(trainer.module.named_parameters())["fc1.weight"]
    optimizer = trainer.optimizer(0.05)
    losses = [trainer.epoch(optimizer, (*PLACE, epoch), Penalty([weight], [anchor], 0.7)) for epoch in range(3)]
    plain = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    rows = np.arange(trainer.dataset.size("train"))
    whole = trainer.dataset.rows("train", rows, CPU)
    for epoch in range(3):
        order = torch.from_numpy(epoch_order(len(rows), 5, *PLACE, epoch))
        total = 0.0
        for batch in order.split(32):
            loss = F.cross_entropy(net(whole.inputs[0][batch]), whole.targets[0][batch])
            pull = 0.35 * (net.fc1.weight - anchor).square().sum()
            plain.zero_grad()
            (loss + pull).backward()
            plain.step()
            total += loss.item() * len(batch)
        assert losses[epoch] == pytest.approx(total / len(rows), rel=1e-4)
    for name, parameter in net.named_parameters():
        assert torch.allclose(weights_of(trainer)[name], parameter, atol=1e-5), name


def test_penalty_value_and_gradient_of_a_weight_that_the_loss_does_not_reach() -> None:
    weight, anchor = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    penalty = Penalty([weight], [anchor], 2.0)
    assert penalty.value() == pytest.approx(float((weight - anchor).square().sum()))
    penalty.add_gradient()
    assert torch.allclose(weight.grad, 2.0 * (weight.detach() - anchor), atol=1e-6)
    Penalty([], [], 1.0).add_gradient()


def test_an_epoch_repeats_bit_for_bit_whatever_ran_before(tmp_path: Path, plain_executor: None) -> None:
    made = []
    for before in (0, 3):
        torch.manual_seed(before)
        torch.rand(before)
        trainer = make_trainer(tmp_path, net=ConvNet, shape=(2, 8, 8))  # with dropout
        trainer.epoch(trainer.optimizer(0.05), PLACE)
        made.append(weights_of(trainer))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_micro_batches_add_up_to_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_trainer(tmp_path)
    whole.epoch(whole.optimizer(0.05), PLACE)
    sizes = []

    def small(net: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(net, inputs)

    monkeypatch.setattr(training, "call_nested", small)
    halved = make_trainer(tmp_path)
    halved.epoch(halved.optimizer(0.05), PLACE)
    assert sizes[:3] == [32, 16, 8]
    assert halved.micro_batch_size == 8
    for name, weight in weights_of(whole).items():
        assert torch.allclose(weights_of(halved)[name], weight, atol=1e-6), name


@pytest.mark.parametrize("batch_size", [32, 1000])  # 1000: more than there are samples
def test_a_quarter_that_does_not_fit_fails(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def never(net: torch.jit.ScriptModule, inputs: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(len(inputs[0]))
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(training, "call_nested", never)
    trainer = make_trainer(tmp_path, batch_size)
    with pytest.raises(ProblemError) as caught:
        trainer.epoch(trainer.optimizer(0.05), PLACE)
    assert caught.value.code == ErrorCode.OUT_OF_MEMORY
    assert "Lower training.batch_size" in caught.value.detail
    whole = min(batch_size, 80)
    assert sizes == [whole, whole // 2, whole // 4]


def test_other_errors_are_not_taken_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)

    def wrong(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(training, "call_nested", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.epoch(trainer.optimizer(0.05), PLACE)


def test_divergence_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    optimizer = trainer.optimizer(1e30)
    with pytest.raises(ProblemError) as caught:
        trainer.epoch(optimizer, PLACE)  # the second update meets what the first has made
    assert caught.value.code == ErrorCode.DIVERGED


def test_one_sample_at_a_time_still_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, batch_size=1)
    before = weights_of(trainer)
    assert trainer.epoch(trainer.optimizer(0.01), PLACE) > 0
    assert not torch.equal(before["fc1.weight"], weights_of(trainer)["fc1.weight"])


def test_a_single_sample_left_over_is_passed_over(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, batch_size=79)  # of 80
    optimizer = trainer.optimizer(0.01)
    updates: list[int] = []
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    trainer.epoch(optimizer, PLACE)
    assert len(updates) == 1


def test_only_the_train_part_is_trained_on(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    changed = make_trainer(tmp_path)
    for part in ("select", "report"):
        rows = changed.dataset.part(part)  # type: ignore[arg-type]
        for array in (*rows.inputs, *rows.targets):
            array[rows.rows] = 0
    for each in (trainer, changed):
        each.epoch(each.optimizer(0.05), PLACE)
    assert all(torch.equal(weight, weights_of(changed)[name]) for name, weight in weights_of(trainer).items())


def test_the_range_test_finds_a_rate_that_learns_and_leaves_the_network_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = weights_of(trainer)

    def fresh() -> Trainer:
        made = make_trainer(tmp_path)
        with torch.no_grad():
            for parameter in made.module.parameters():
                parameter.mul_(0.3)
        return made

    rate = range_test(fresh)
    assert rate in CANDIDATES
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    assert range_test(fresh) == rate


def test_the_range_test_says_when_nothing_converges(tmp_path: Path) -> None:
    def hopeless() -> Trainer:
        made = make_trainer(tmp_path)
        with torch.no_grad():
            made.module.fc1.weight.fill_(float("inf"))
        return copy.copy(made)

    with pytest.raises(ProblemError) as caught:
        range_test(hopeless)
    assert caught.value.code == ErrorCode.DIVERGED
    assert "data.scale" in caught.value.detail


def test_the_rate_of_a_step_is_never_above_one_over_mu() -> None:
    for step in range(25):
        assert step_rate(0.1, step, 25, 50.0) <= 1 / 50
        assert step_rate(0.1, step, 25, 1e-3) == pytest.approx(0.1 * 0.95**step)
