"""Top-5, perplexity and PSNR against plain formulas, their intervals, and where they do not belong."""

from math import exp, log10
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.spec import DataSpec
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine.data import Dataset
from worker.engine.evaluation import Scores, metric_difference
from worker.engine.metrics import METRICS, Metric
from worker.engine.objective import Objective


def objective(**spec: Any) -> Objective:
    return Objective(ObjectiveSpec.model_validate({"distillation": 0.0, **spec}))


def scores(sums: np.ndarray, counts: np.ndarray, metric: Metric) -> Scores:
    ones = np.ones_like(sums)
    return Scores(ones, sums, counts, ones, 0.0, metric)


def test_top5() -> None:
    y = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    target = torch.arange(40) % 12
    made = objective(loss="cross_entropy", metric="top5").scores([y], [target], None)
    by_hand = [int(label) in y[row].argsort(descending=True)[:5].tolist() for row, label in enumerate(target)]
    assert made.sums.tolist() == [float(right) for right in by_hand]
    assert made.counts.tolist() == [1.0] * 40
    data = Dataset({"inputs": np.zeros((20, 3)), "targets": np.zeros(20, int)}, DataSpec(), 0, ["x"])
    with pytest.raises(ProblemError) as caught:
        objective(loss="cross_entropy", metric="top5").check([torch.zeros(2, 5)], data)
    assert caught.value.code == ErrorCode.SPEC_INVALID


def test_perplexity_is_the_exponential_of_the_mean_loss_of_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(6, 9, 11, generator=generator)  # samples, tokens, words
    target = torch.randint(0, 11, (6, 9), generator=generator)
    target[0, 3:] = -100  # a short one
    target[5] = -100  # nothing of it counts
    spec = objective(loss="cross_entropy", metric="perplexity", class_dim=-1)
    made = spec.scores([y], [target], None)
    assert made.counts[:5].tolist() == [3.0, 9.0, 9.0, 9.0, 9.0]
    assert bool(torch.isnan(made.counts[5]))
    kept = scores(made.sums[:5].numpy(), made.counts[:5].numpy(), METRICS["perplexity"])
    assert kept.metric == pytest.approx(exp(float(F.cross_entropy(y.movedim(2, 1), target))), rel=1e-5)


def test_psnr() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(5, 3, 4, 4, generator=generator)
    target = y + 0.1 * torch.randn(y.shape, generator=generator)
    target[4] = y[4]
    made = objective(loss="mse", metric="psnr", peak=2.0).scores([y], [target], None)
    assert float(made.sums[0]) == pytest.approx(10 * log10(4 / float((y[0] - target[0]).square().mean())), rel=1e-5)
    assert float(made.sums[4]) == 100.0
    assert torch.allclose(made.losses[:4], (y - target).double().square().flatten(1).mean(1)[:4])
    images = np.linspace(-0.5, 1.0, 20 * 48, dtype=np.float32).reshape(20, 3, 4, 4)
    data = Dataset(
        {"inputs": images, "targets": images, "test_inputs": images, "test_targets": images}, DataSpec(), 0, []
    )
    ranged = objective(loss="mse", metric="psnr")
    ranged.check([torch.zeros(2, 3, 4, 4)], data)
    at_range = ranged.scores([y], [target], None).sums[0]
    assert float(at_range) == pytest.approx(float(made.sums[0]) + 20 * log10(1.5 / 2.0), rel=1e-5)


@pytest.mark.parametrize(("loss", "metric"), [("mse", "accuracy"), ("cross_entropy", "psnr"), ("distillation", "mse")])
def test_a_metric_of_another_loss(loss: str, metric: str) -> None:
    with pytest.raises(ProblemError) as caught:
        Objective(ObjectiveSpec(metric=metric).model_copy(update={"loss": loss}))  # the loss was found from the data
    assert caught.value.code == ErrorCode.SPEC_INVALID


@pytest.mark.parametrize(("loss", "name"), [("cross_entropy", "accuracy"), ("mse", "mse")])
def test_auto(loss: str, name: str) -> None:
    made = objective(loss=loss)
    assert made.metric.name == name
    assert made.resolved == {"loss": loss, "metric": name}
    assert objective(loss="distillation").metric.name == "relative_output_error"


@pytest.mark.parametrize(("name", "verdicts"), [("accuracy", ("worse", "better")), ("mse", ("better", "worse"))])
def test_less_is_better_or_worse(name: str, verdicts: tuple[str, str]) -> None:
    generator = np.random.default_rng(0)
    reference = 10 + generator.normal(size=50)
    for shift, verdict in zip((-0.5, 0.5), verdicts, strict=True):
        pair = [scores(each, np.ones(50), METRICS[name]) for each in (reference + shift, reference)]
        pair[0].sums[:] += 0.01 * generator.normal(size=50)
        assert metric_difference(*pair).verdict == verdict
    same = scores(reference + 0.01 * generator.normal(size=50), np.ones(50), METRICS[name])
    assert metric_difference(same, scores(reference, np.ones(50), METRICS[name])).verdict == "unclear"


@pytest.mark.parametrize("metric", [Metric("iou", higher_is_better=True), METRICS["perplexity"]])
def test_intervals_of_pooled_metrics_cover_the_truth(metric: Metric) -> None:
    """Sums over counts that differ from sample to sample and, for an overlap, from network to network."""
    generator = np.random.default_rng(0)
    hits, repeats, count = 0, 1500, 60

    def draw(size: int) -> tuple[Scores, Scores]:
        counts = generator.integers(5, 60, size).astype(float)
        rate = generator.beta(6, 3, size)
        other = counts if metric.value_of else counts * generator.uniform(0.8, 1.2, size)
        wanted = scores(rate * counts, counts, metric)
        return scores(np.clip(rate - 0.05 + 0.1 * generator.normal(size=size), 0, 1) * other, other, metric), wanted

    large = draw(400_000)
    truth = large[0].metric - large[1].metric
    for _ in range(repeats):
        found = metric_difference(*draw(count))
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / repeats <= 0.97
