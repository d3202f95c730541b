"""One call of anybody's network: what it returns, and how it may fail."""

import pytest
import torch
from tiny_jobs import archive
from torch import Tensor, nn

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.forward import call, flatten, out_of_memory
from worker.engine.network.load import load_model


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            raise ValueError("the inputs must not be positive")
        return x


class Asserts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.size(0) > 100, "a larger batch is needed"
        return x


class Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return [x, x][x.size(0)]


class Misfits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 2)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Raises, "the inputs must not be positive"),
        (Asserts, "a larger batch is needed"),
        (Picks, "out of range"),
        (Misfits, "shapes cannot be multiplied"),
    ],
)
def test_a_network_that_raises_is_a_problem_with_its_own_words(net: type[nn.Module], words: str) -> None:
    with pytest.raises(ProblemError) as caught:
        call(load_model(archive(net())), [torch.ones(3, 4)])
    assert caught.value.code == ErrorCode.MODEL_RAISED
    assert words in caught.value.detail
    assert "(3, 4) float32" in caught.value.detail


def test_missing_arguments_are_a_problem() -> None:
    with pytest.raises(ProblemError, match="missing value for argument"):
        call(load_model(archive(Raises())), [])


class Nested(nn.Module):
    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor], Tensor | None]:
        return {"b": x, "a": x + 1}, [x + 2], None


def test_nested_outputs_are_flat_and_in_order() -> None:
    found = call(load_model(archive(Nested())), [torch.zeros(1)])
    assert [float(each) for each in found] == [0, 1, 2]
    with pytest.raises(ProblemError) as caught:
        flatten((torch.zeros(1), "text"))
    assert caught.value.code == ErrorCode.MODEL_UNSUPPORTED


def test_want_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shape mismatch"))


class Greedy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.empty([1 << 60], dtype=torch.uint8) + x.sum()


def test_want_of_memory_inside_a_network_is_left_to_the_caller() -> None:
    with pytest.raises(RuntimeError) as caught:
        call(load_model(archive(Greedy())), [torch.ones(1)])
    assert out_of_memory(caught.value)
