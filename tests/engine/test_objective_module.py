"""A loss module against our own losses; its units; and what is refused before anything is trained."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from own_objectives import CASES, Batch, CrossEntropy, Detector, NotOfOutputs, save_case
from tiny_jobs import Mlp, archive, quick, run_learn, save_data, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.ids import MODEL, new_id
from service.contract.spec import DataSpec, Training, parse_spec
from service.contract.spec import Objective as ObjectiveSpec
from worker.engine import evaluation, objective_module
from worker.engine.data import Dataset
from worker.engine.emission import emit
from worker.engine.evaluation import evaluate, evaluate_pair, loss_difference, metric_difference
from worker.engine.learn import Sources, learn
from worker.engine.methods.learning_rate import loss_limit
from worker.engine.network.load import load_model
from worker.engine.objective import Objective
from worker.engine.objective_module import ModuleObjective, load_objective
from worker.engine.observer import Recorder
from worker.engine.teacher import Teacher
from worker.engine.training import Trainer
from worker.engine.verification import summarise, verify

CPU = torch.device("cpu")
OWN = {"module": new_id(MODEL)}


class Contrast(nn.Module):
    """Compares samples with each other: nothing can be said of one alone."""

    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        assert len(outputs) > 1
        near = torch.pdist(outputs)
        return near.square().mean()


@pytest.fixture
def classes(tmp_path: Path) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset]:
    """Reference, a network near it, and data."""
    model = save_model(tmp_path / "model.pt", Mlp())
    data = save_data(tmp_path / "data.npz", model, count=600, parts=("val_", "test_"))
    reference, other = load_model(model), load_model(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return reference, other, Dataset(dict(np.load(data)), DataSpec(), 0, ["x"])


def own(module: nn.Module, dataset: Dataset, tmp_path: Path, **spec: float) -> ModuleObjective:
    (path := tmp_path / "loss.pt").write_bytes(archive(module))
    return ModuleObjective(ObjectiveSpec.model_validate({"loss": OWN, **spec}), load_objective(path, CPU), dataset)


def test_cross_entropy_of_ones_own_is_ours(
    classes: tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset], tmp_path: Path
) -> None:
    reference, other, dataset = classes
    made = own(CrossEntropy(), dataset, tmp_path)
    ours = Objective(ObjectiveSpec(loss="cross_entropy", distillation=0.0))
    found, wanted = (evaluate_pair(other, reference, dataset, each, None, CPU) for each in (made, ours))
    for mine, same in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.losses, same.losses, atol=1e-6)
        np.testing.assert_array_equal(mine.metrics, same.metrics)
        assert mine.objective == pytest.approx(same.objective, rel=1e-5)
    mine, same = metric_difference(*found), metric_difference(*wanted)
    assert mine.model_copy(update={"name": "accuracy"}) == same
    assert mine.higher_is_better
    assert mine.verdict in {"worse", "unclear"}
    assert loss_difference(*found).verdict == loss_difference(*wanted).verdict == "worse"


def test_many_samples_are_scored_in_groups(
    classes: tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, other, dataset = classes
    made = own(CrossEntropy(), dataset, tmp_path)
    single = loss_difference(*evaluate_pair(other, reference, dataset, made, None, CPU))
    monkeypatch.setattr(evaluation, "UNITS_MAX", 60)
    scores = evaluate_pair(other, reference, dataset, made, None, CPU)
    assert scores[0].samples.tolist() == [4.0] * 50  # of the 200 of the report
    grouped = loss_difference(*scores)
    assert (grouped.samples, grouped.unit_samples) == (200, 4)
    assert grouped.difference == pytest.approx(single.difference, abs=1e-6)
    width, wanted = (each.high - each.low for each in (grouped, single))
    assert 0.6 * wanted < width < 1.6 * wanted


def test_a_loss_that_compares_samples_is_scored_in_batches(
    classes: tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset], tmp_path: Path
) -> None:
    reference, other, dataset = classes
    made = own(Contrast(), dataset, tmp_path)
    assert made.metric.name == "loss"
    first = evaluate_pair(other, reference, dataset, made, None, CPU)
    assert not made.separable
    assert [set(each.samples.tolist()) for each in first] == [{6.0, 8.0}] * 2  # 200 in 33; what is left joins the last
    difference = metric_difference(*first)
    assert difference.low < difference.difference < difference.high
    assert difference.unit_samples == 7
    tried = own(Contrast(), dataset, tmp_path)
    batch = dataset.rows("train", np.arange(8), CPU)
    with torch.no_grad():
        tried.try_out(reference(*batch.inputs), batch)
    assert not tried.separable


def test_a_loss_that_likes_zeros_best_has_not_diverged_at_its_start(
    classes: tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset], tmp_path: Path
) -> None:
    class Small(nn.Module):
        @torch.jit.export
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            return outputs.square().mean() + 1e-6

    class NeverZero(CrossEntropy):
        @torch.jit.export
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            assert bool((outputs != 0).any())
            return F.cross_entropy(outputs, batch["targets"])

    reference, _, dataset = classes
    for module, bounded in ((Small(), True), (NeverZero(), False)):
        trainer = Trainer(reference, dataset, own(module, dataset, tmp_path), None, Training(batch_size=64), 0, CPU)
        batch = dataset.rows("train", np.arange(64), CPU)
        with torch.no_grad():
            now = float(trainer.objective.batch_loss(reference.eval()(*batch.inputs), batch, None))
        assert now < loss_limit(trainer) < float("inf") if bounded else loss_limit(trainer) == float("inf")


def test_the_mix_with_the_references_answers(
    classes: tuple[torch.jit.ScriptModule, torch.jit.ScriptModule, Dataset], tmp_path: Path
) -> None:
    reference, other, dataset = classes
    alone, mixed = own(CrossEntropy(), dataset, tmp_path), own(CrossEntropy(), dataset, tmp_path, distillation=0.4)
    assert (alone.needs_teacher, mixed.needs_teacher) == (False, True)
    teacher = Teacher(reference, dataset, CPU)
    batch = dataset.rows("train", np.arange(16), CPU)
    with torch.no_grad():
        outputs, wanted = other(*batch.inputs), teacher.outputs("train", np.arange(16), batch)
        match = (outputs - wanted[0]).square().mean() / wanted[0].square().mean()
        expected = 0.6 * F.cross_entropy(outputs, batch.targets[0]) + 0.4 * match
        assert float(mixed.batch_loss(outputs, batch, wanted)) == pytest.approx(float(expected), rel=1e-5)
    scores = evaluate(other, dataset, "select", mixed, teacher, CPU)
    assert scores.objective != pytest.approx(scores.loss, rel=1e-3)


def test_a_network_without_targets_learns_from_its_inputs(tmp_path: Path) -> None:
    class Rebuild(nn.Module):
        @torch.jit.export
        def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
            return F.mse_loss(outputs, batch["inputs"][:, :4])

    dataset = Dataset({"inputs": np.zeros((20, 20), np.float32)}, DataSpec(), 0, ["x"])
    made = own(Rebuild(), dataset, tmp_path)
    batch = dataset.rows("train", np.arange(8), CPU)
    made.try_out(load_model(save_model(tmp_path / "m.pt", Mlp()))(*batch.inputs).detach(), batch)


class InPlace(Mlp):
    """Its gradient needs what it has changed; without gradients it runs."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x).exp()
        z = y * y
        y.mul_(2.0)
        return self.head(self.fc2(z + y))


def test_a_network_whose_gradient_raises_is_told_so(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", InPlace())
    data = save_data(tmp_path / "data.npz", model, count=80)
    with pytest.raises(ProblemError) as caught:
        run_learn(tmp_path / "work", model, quick(budget={"max_params_fraction": 0.6}), data)
    assert caught.value.code == ErrorCode.MODEL_RAISED
    assert "inplace operation" in caught.value.detail


class CountsNothing(CrossEntropy):
    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        return outputs.sum() * 0, 0


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_a_job_whose_metric_counts_nothing_has_a_report_without_it(distillation: float, tmp_path: Path) -> None:
    """With the mix too; a batch larger than the data is timed as large as the data."""
    model = save_model(tmp_path / "model.pt", Mlp(hidden=64))
    data = save_data(tmp_path / "data.npz", model, count=60)
    objective = tmp_path / "objective.pt"
    objective.write_bytes(archive(CountsNothing()))
    spec = quick(
        budget={"max_params_fraction": 0.5},
        method={"mu": {"steps": 1}},
        training={"batch_size": 10**12},
        objective={"loss": {"module": "objective"}, "distillation": distillation},
    )
    sources = Sources(model, data, "npz", tmp_path, objective)
    learn(sources, parse_spec(spec), Recorder())
    emit(model, tmp_path)
    report = verify(sources, parse_spec(spec), {}, list)
    assert (report.metric_name, report.compressed.metric) == ("metric", None)
    assert [each.name for each in report.differences] == ["loss"]
    assert "METRIC_UNDEFINED" in {warning.code for warning in report.warnings}
    assert max(each.batch_size for each in report.compressed.latencies) <= 60
    assert summarise(report).metric_difference is None


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")
    (tmp_path / "example.py").write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("example")
    model, data, _ = save_case(CASES["tagger"], tmp_path / "case", count=40)
    dataset, network = Dataset(dict(np.load(data)), DataSpec(), 0, ["x"]), load_model(model)
    spec = ObjectiveSpec.model_validate({"loss": OWN})
    made = ModuleObjective(spec, load_objective(tmp_path / "loss.pt", CPU), dataset)
    batch = dataset.rows("train", np.arange(8), CPU)
    with torch.no_grad():
        made.try_out(network(*batch.inputs), batch)
    assert made.separable
    assert made.metric.higher_is_better


def test_lists_are_cut_like_tensors(tmp_path: Path) -> None:
    model, data, objective = save_case(CASES["detector"], tmp_path, count=40)
    network = load_model(model)
    dataset = Dataset(dict(np.load(data)), DataSpec(), 0, ["x"])
    made = ModuleObjective(ObjectiveSpec.model_validate({"loss": OWN}), load_objective(objective, CPU), dataset)
    batch = dataset.rows("report", np.arange(6), CPU)
    with torch.no_grad():
        raw = network(*batch.inputs)
        assert isinstance(raw, list)
        scores = made.batch_scores(raw, batch, None, 1)
        alone = made.batch_scores(network(batch.inputs[0][2:3]), batch.pieces(1)[2], None, 1)
    assert scores.losses[2] == pytest.approx(float(alone.losses[0]), rel=1e-5)
    assert scores.losses.mean() == pytest.approx(float(made.batch_loss(raw, batch, None)), rel=1e-5)
    assert scores.samples.tolist() == [1.0] * 6


def test_outputs_without_a_batch_axis_cannot_be_cut(tmp_path: Path) -> None:
    class Pooled(Detector):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.stem(x).mean(dim=0)]

    class PooledLoss(nn.Module):
        @torch.jit.export
        def loss(self, outputs: list[Tensor], batch: Batch) -> Tensor:
            return outputs[0].square().mean()

    dataset = Dataset({"inputs": np.ones((40, 1, 8, 8), np.float32)}, DataSpec(), 0, ["x"])
    made = own(PooledLoss(), dataset, tmp_path)
    batch = dataset.rows("train", np.arange(8), CPU)
    with torch.no_grad():
        made.try_out(torch.jit.script(Pooled())(*batch.inputs), batch)
    assert not made.separable
    assert made.forward_size(256, 640) == 20
    assert (made.forward_size(256, 8), made.forward_size(256, 10**6)) == (2, objective_module._BATCH_SAMPLES_MAX)


def test_state_of_the_module_is_not_trained(tmp_path: Path) -> None:
    (path := tmp_path / "loss.pt").write_bytes(archive(NotOfOutputs()))
    module = load_objective(path, CPU)
    assert not module.training
    assert [parameter.requires_grad for parameter in module.parameters()] == [False]
