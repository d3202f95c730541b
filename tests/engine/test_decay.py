"""Weight decay on products: the gradient of what it says, and its place in an update."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import ConvNet, save_model
from torch import nn
from torch.nn import functional as F

from service.contract.spec import DataSpec, SgdSpec, Training
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.course import Course
from worker.engine.data import Dataset
from worker.engine.decay import ProductDecay, factor_pairs
from worker.engine.forms.modules import ComposedWeight, SumOfBranches
from worker.engine.network.load import load_model, reload
from worker.engine.network.replace import Replacement, replace_layers
from worker.engine.objective import Objective
from worker.engine.training import Trainer

CPU = torch.device("cpu")
DECAY = 0.3


@pytest.mark.parametrize(
    ("first", "second", "product"),
    [
        (nn.Linear(7, 3, bias=False), nn.Linear(3, 5), lambda v, u: u @ v),
        (
            nn.Conv2d(4, 3, 3, bias=False),
            nn.Conv2d(3, 5, 1),
            lambda v, u: torch.einsum("nr,rcyx->ncyx", u[:, :, 0, 0], v),
        ),
        (
            nn.Conv2d(4, 3, (1, 3), bias=False),
            nn.Conv2d(3, 5, (3, 1)),
            lambda v, u: torch.einsum("nry,rcx->ncyx", u[..., 0], v[:, :, 0]),
        ),
    ],
)
def test_the_gradient_is_that_of_the_dense_weights_decay(first: nn.Module, second: nn.Module, product: Any) -> None:
    dense = product(first.weight, second.weight)
    (0.5 * DECAY * dense.square().sum()).backward()
    wanted = [first.weight.grad.clone(), second.weight.grad.clone()]
    first.weight.grad, second.weight.grad = None, torch.ones_like(second.weight)
    decay = ProductDecay([(second.weight, first.weight)], DECAY)
    decay.add_gradient()
    assert torch.allclose(first.weight.grad, wanted[0], atol=1e-5)
    assert torch.allclose(second.weight.grad, wanted[1] + 1, atol=1e-5)
    assert decay.value() == pytest.approx(0.5 * DECAY * float(dense.detach().square().sum()), rel=1e-5)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer__factors = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.layer__factors(x)))


def trainer_on(spec: SgdSpec) -> Trainer:
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Chain()), buffer)
    buffer.seek(0)
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 6)).astype(np.float32)
    data = Dataset({"inputs": x, "targets": random.integers(0, 3, 30)}, DataSpec(), 0, ["x"])
    objective = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.0))
    return Trainer(torch.jit.load(buffer), data, objective, None, Training(optimizer=spec, batch_size=64), 0, CPU)


def test_an_update_decays_the_product_and_everything_else_as_ever(tmp_path: Path) -> None:
    spec = SgdSpec(lr=0.1, momentum=0.0, nesterov=False, weight_decay=DECAY, weight_decay_on="product")
    trainer = trainer_on(spec)
    net = Chain()
    net.load_state_dict(trainer.module.state_dict())
    course = Course.begin(trainer, 0.1)
    course.epoch((1,))
    batch = trainer.dataset.rows("train", np.arange(trainer.dataset.size("train")), CPU)
    loss = F.cross_entropy(net(batch.inputs[0]), batch.targets[0])
    product = net.layer__factors[1].weight @ net.layer__factors[0].weight
    others = [net.layer__factors[1].bias, net.head.weight, net.head.bias]
    (loss + 0.5 * DECAY * (product.square().sum() + sum(each.square().sum() for each in others))).backward()
    for name, parameter in net.named_parameters():
        made = dict(trainer.module.named_parameters())[name]
        assert torch.allclose(made, parameter - 0.1 * parameter.grad, atol=1e-6), name


def test_momenta_are_saved_by_name_in_both_groups() -> None:
    spec = SgdSpec(lr=0.1, weight_decay=DECAY, weight_decay_on="product")
    course = Course.begin(trainer_on(spec), 0.1)
    assert len(course.optimizer.param_groups) == 2
    course.epoch((1,))
    saved = course.save()
    again = Course.begin(trainer_on(spec), 0.1)
    again.load(saved)
    for name, parameter in course.trainer.module.named_parameters():
        other = dict(again.trainer.module.named_parameters())[name]
        one, two = (c.optimizer.state[p]["momentum_buffer"] for c, p in ((course, parameter), (again, other)))
        assert torch.equal(one, two), name
    assert len(Course.begin(trainer_on(SgdSpec(lr=0.1, weight_decay=DECAY)), 0.1).optimizer.param_groups) == 1


def test_the_pairs_of_a_factored_network(tmp_path: Path) -> None:
    module = load_model(save_model(tmp_path / "model.pt", ConvNet()))
    chain = nn.Sequential(nn.Conv2d(2, 3, (1, 3), padding=(0, 1), bias=False), nn.Conv2d(3, 8, (3, 1), padding=(1, 0)))
    composed = ComposedWeight(
        torch.zeros(12, 2), torch.zeros(2, 72), permuted=[12, 8, 3, 3], inverse=[0, 1, 2, 3], weight_shape=[12, 8, 3, 3]
    )
    sums = SumOfBranches([nn.Sequential(nn.Linear(192, r, bias=False), nn.Linear(r, 4, bias=False)) for r in (1, 2)])
    replace_layers(module, {"conv1": chain, "conv2": Replacement(weight=composed), "fc": sums})
    network = reload(module, CPU)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = [(names[id(left)], names[id(right)]) for left, right in factor_pairs(network)]
    assert found == [
        ("conv1__factors.1.weight", "conv1__factors.0.weight"),
        ("conv2__weight.left", "conv2__weight.right"),
        ("fc__factors.branches.0.1.weight", "fc__factors.branches.0.0.weight"),
        ("fc__factors.first.1.weight", "fc__factors.first.0.weight"),
    ]
    assert factor_pairs(load_model(tmp_path / "model.pt")) == []
