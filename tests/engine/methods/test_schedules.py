"""Learning rates of the published runs, and those of `auto`; when the loop may end."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from service.contract.training_spec import EarlyStop, ExponentialSchedule, FineTune, Schedule
from worker.engine.methods.early_stop import Stability
from worker.engine.methods.learning_rate import step_rate, tuning_rate

STEPS, EPOCHS, MU = 30, 15, 1e-3


def schedule(**fields: Any) -> Any:
    return TypeAdapter(Schedule).validate_python(fields)


def rate(given: Any, initial: float, step: int, epoch: int, mu: float = MU) -> float:
    return step_rate(initial, step, STEPS, mu, given, epoch, EPOCHS)


def test_the_published_schedules() -> None:
    lenet = schedule(type="exponential", factor=0.98, per="step")
    resnet = schedule(type="exponential", factor=0.99, per="epoch", restart=True)
    for step, epoch in ((0, 0), (0, 7), (11, 3), (29, 14)):
        assert rate(lenet, 0.1, step, epoch) == pytest.approx(0.1 * 0.98**step)
        assert rate(resnet, 7e-4, step, epoch) == pytest.approx(7e-4 * 0.99**epoch)
    assert tuning_rate(0.02, schedule(type="exponential", factor=0.99), 100, 200) == pytest.approx(0.02 * 0.99**100)


def test_cosine_step_and_constant() -> None:
    over_all, each = schedule(type="cosine", to=0.1), schedule(type="cosine", restart=True)
    assert rate(over_all, 1.0, 0, 0) == 1.0
    assert rate(over_all, 1.0, STEPS // 2, 0) == pytest.approx(0.55)
    assert 0.1 < rate(over_all, 1.0, STEPS - 1, EPOCHS - 1) < 0.101
    assert rate(each, 1.0, 7, 0) == 1.0
    assert rate(each, 1.0, 7, 14) < 0.02
    stairs = schedule(type="step", factor=0.1, at=[0.5, 0.75])
    assert [tuning_rate(1.0, stairs, epoch, 8) for epoch in range(8)] == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert rate(schedule(type="constant"), 0.2, 20, 3) == 0.2


def test_no_rate_is_above_one_over_mu() -> None:
    for given in ("auto", schedule(type="constant"), schedule(type="cosine", restart=True)):
        assert rate(given, 0.1, 3, 0, mu=50.0) == 1 / 50


def test_auto_is_what_it_was() -> None:
    for step in range(25):
        for epoch in range(3):
            assert step_rate(0.1, step, 25, MU, "auto", epoch, 3) == pytest.approx(0.1 * 0.95**step)
    assert [tuning_rate(1.0, "auto", epoch, 4) for epoch in range(4)] == pytest.approx(
        [1, 0.853553, 0.5, 0.146447], abs=1e-6
    )


def test_schedules_that_cannot_be_meant() -> None:
    with pytest.raises(ValidationError, match="cannot restart"):
        schedule(type="exponential", per="step", restart=True)
    with pytest.raises(ValidationError, match="no L steps"):
        FineTune(schedule=ExponentialSchedule(per="step"))
    with pytest.raises(ValidationError):
        schedule(type="step", at=[1.5])


def test_the_loop_may_end_when_ranks_stay_and_weights_meet() -> None:
    spec, stability = EarlyStop(steps=2, distance=0.01), Stability()
    told = []
    for ranks, distance in (([3, 4], 0.0), ([3, 5], 0.0), ([3, 5], 0.0), ([3, 5], 2.0), ([3, 5], 0.5), ([3, 4], 0.5)):
        stability.count(ranks)
        told.append(stability.reached(spec, distance, 100.0))
    assert told == [False, False, False, False, True, False]
    assert not Stability([1], 9).reached(None, 0.0, 1.0)
