"""Modules that are no objective, and what each is told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_objectives import CASES, Batch, CrossEntropy, DetectorLoss, NotOfOutputs, TaggerLoss, save_case
from tiny_jobs import archive, quick
from torch import Tensor, nn
from torch.nn import functional as F

from service.contract.errors import ErrorCode, ProblemError
from service.contract.ids import MODEL, new_id
from service.contract.spec import parse_spec
from worker.engine.learn import Sources, learn, open_dataset
from worker.engine.network.load import load_model
from worker.engine.objective_module import load_objective
from worker.engine.objectives import make_objective
from worker.engine.observer import Recorder

CPU = torch.device("cpu")
OWN = {"module": new_id(MODEL)}


class NoLoss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class OneArgument(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor) -> Tensor:
        return outputs.mean()


class NoDict(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch).mean()


class GivesFloat(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> float:
        return float(outputs.mean())


class GivesOneMetric(CrossEntropy):
    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.mean()


class WrongDirection(CrossEntropy):
    higher_is_better: int

    def __init__(self) -> None:
        super().__init__()
        self.higher_is_better = 1


class NotScalar(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch["targets"], reduction="none")


class NotFinite(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs * 0).log().mean()


class InfiniteGradient(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - outputs.detach()).sqrt().mean()


class NoGradient(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs > 0).float().mean()


class Raises(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.mse_loss(outputs, batch["masks"])


class MetricRaises(TaggerLoss):
    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        if outputs.size(0) > 0:
            raise ValueError("no such metric")
        return outputs.sum(), 1


class NegativeCount(TaggerLoss):
    @torch.jit.export
    def metric(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        return outputs.sum(), -1


class Complex(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return torch.complex(outputs, outputs).sum()


class ChangesTargets(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(outputs, batch["targets"])
        batch["targets"].zero_()
        return loss


class Saves(nn.Module):
    @torch.jit.export
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        torch.save(outputs, "stolen")
        return outputs.mean()


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        (NoLoss, ErrorCode.OBJECTIVE_INVALID, "no method loss; found forward"),
        (OneArgument, ErrorCode.OBJECTIVE_INVALID, "expected loss(outputs, batch: Dict[str, Tensor])"),
        (NoDict, ErrorCode.OBJECTIVE_INVALID, "found loss(outputs: Tensor, batch: Tensor)"),
        (GivesFloat, ErrorCode.OBJECTIVE_INVALID, "expected loss to return Tensor; found float"),
        (GivesOneMetric, ErrorCode.OBJECTIVE_INVALID, "expected metric to return Tuple"),
        (WrongDirection, ErrorCode.OBJECTIVE_INVALID, "higher_is_better is not a bool"),
        (DetectorLoss, ErrorCode.OBJECTIVE_INVALID, "takes outputs of the type List[Tensor], and forward gives Tensor"),
        (NotScalar, ErrorCode.OBJECTIVE_INVALID, "shape (8, 6); expected a scalar"),
        (NotFinite, ErrorCode.OBJECTIVE_INVALID, "loss is -inf"),
        (InfiniteGradient, ErrorCode.OBJECTIVE_INVALID, "gradient of loss on the reference's outputs is not finite"),
        (NoGradient, ErrorCode.OBJECTIVE_INVALID, "without a gradient"),
        (NotOfOutputs, ErrorCode.OBJECTIVE_INVALID, "without a gradient"),
        (NegativeCount, ErrorCode.OBJECTIVE_INVALID, "not negative"),
        (Complex, ErrorCode.OBJECTIVE_INVALID, "complex64; expected a real one"),
        (ChangesTargets, ErrorCode.OBJECTIVE_INVALID, "changes batch['targets'] in place"),
        (Raises, ErrorCode.OBJECTIVE_RAISED, "'targets' (8, 6): "),
        (MetricRaises, ErrorCode.OBJECTIVE_RAISED, "no such metric"),
        (Saves, ErrorCode.MODEL_REJECTED_UNSAFE, "aten::save"),
    ],
)
def test_what_is_no_objective(module: Callable[[], nn.Module], code: ErrorCode, said: str, tmp_path: Path) -> None:
    model, data, objective = save_case(CASES["tagger"], tmp_path, count=40)
    if module is Saves and not hasattr(torch.ops.aten, "save"):
        pytest.skip("this torch scripts no save")
    objective.write_bytes(archive(module()))
    spec = parse_spec(quick(budget={"max_params_fraction": 0.5}, objective={"loss": OWN}))
    sources = Sources(model, data, "npz", tmp_path, objective)
    reference = load_model(model)
    with pytest.raises(ProblemError) as caught:
        make_objective(spec, sources.objective, open_dataset(sources, spec, reference), reference, CPU)
    assert caught.value.code == code, caught.value.detail
    assert said in caught.value.detail


def test_a_module_is_tried_while_the_first_calls_are_timed(tmp_path: Path) -> None:
    model, data, objective = save_case(CASES["tagger"], tmp_path, count=40)
    objective.write_bytes(archive(Raises()))
    recorder = Recorder()
    spec = parse_spec(quick(budget={"max_params_fraction": 0.5}, objective={"loss": {"module": "objective"}}))
    with pytest.raises(ProblemError):
        learn(Sources(model, data, "npz", tmp_path, objective), spec, recorder)
    assert recorder.phases[-1] == "inspecting"
    assert not recorder.facts  # what ends the time that is allowed


def test_a_file_that_is_no_archive_is_damaged(tmp_path: Path) -> None:
    (path := tmp_path / "loss.pt").write_bytes(b"PK nothing")
    with pytest.raises(ProblemError) as caught:
        load_objective(path, CPU)
    assert caught.value.code == ErrorCode.MODEL_CORRUPT
