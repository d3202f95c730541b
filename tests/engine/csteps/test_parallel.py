"""Layers side by side: their order, their bits, what the calling thread hears, and how it ends early."""

import threading
import time

import pytest
import torch
from torch import Tensor

from worker.engine.csteps.additive import Projection, TermChoice, project
from worker.engine.csteps.batching import eigvalsh
from worker.engine.csteps.parallel import map_layers
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.low_rank import LowRankTerm
from worker.engine.forms.reshape import named_reshape
from worker.engine.forms.term import Accuracy, Price

SHAPES = [(48, 40, 3, 3), (130, 120, 3, 3), (16, 8, 3, 3), (130, 120, 3, 3), (96, 160, 1, 1)]


def choices_of(shape: tuple[int, ...]) -> list[TermChoice]:
    terms = {}
    for name in ("channel", "spatial"):
        reshape = named_reshape(name, shape)  # type: ignore[arg-type]
        assert reshape is not None
        term = LowRankTerm(reshape, Geometry("conv2d", shape, ()))
        terms.setdefault(term.key, TermChoice(term, Price(params=1.0), 0, term.rank_max))
    return list(terms.values())


def weight_of(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(shape[0], shape[1] * shape[2] * shape[3], generator=generator)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    decay = torch.arange(1, len(values) + 1) ** -0.7
    return ((left * decay) @ right).reshape(shape)


@pytest.mark.parametrize("accuracy", list(Accuracy))
def test_bits_do_not_depend_on_the_number_of_workers_or_threads(accuracy: Accuracy) -> None:
    weights = [weight_of(shape, number) for number, shape in enumerate(SHAPES)]
    terms = [choices_of(shape) for shape in SHAPES]
    pressure = 2e-5
    warm = [project(weight, own, pressure).factors for weight, own in zip(weights, terms, strict=True)]

    def one(index: int) -> Projection:
        return project(1.01 * weights[index], terms[index], pressure, warm=warm[index], accuracy=accuracy)

    before = torch.get_num_threads()
    made = []
    try:
        for workers, threads in [(1, 1), (2, 1), (3, 2), (1, 2), (None, 2)]:
            torch.set_num_threads(threads)
            made.append(map_layers(one, range(len(SHAPES)), workers=workers, sizes=[w.numel() for w in weights]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        for first, second in zip(made[0], other, strict=True):
            assert (first.objective, first.error, first.sweeps) == (second.objective, second.error, second.sweeps)
            for a, b in zip(first.factors, second.factors, strict=True):
                assert torch.equal(a.left, b.left)
                assert torch.equal(a.right, b.right)


def projected_together(device: str, accuracy: Accuracy) -> list[Projection]:
    weights = [weight_of(shape, number).to(device) for number, shape in enumerate(SHAPES)]

    def one(index: int) -> Projection:
        return project(weights[index], choices_of(SHAPES[index]), 2e-5, accuracy=accuracy)

    return map_layers(one, range(len(SHAPES)), sizes=[weight.numel() for weight in weights], together=True)


def hold_together(device: str) -> None:
    """All layers at once: the same bits each time, and the ranks and objectives of each layer alone."""
    for accuracy in (Accuracy.EXACT, Accuracy.SINGLE):
        first, second = (projected_together(device, accuracy) for _ in range(2))
        for number, (made, again) in enumerate(zip(first, second, strict=True)):
            alone = project(weight_of(SHAPES[number], number), choices_of(SHAPES[number]), 2e-5)
            assert made.ranks == alone.ranks
            assert made.objective == pytest.approx(alone.objective, rel=2e-4)
            for a, b in zip(made.factors, again.factors, strict=True):
                assert torch.equal(a.left, b.left)
                assert torch.equal(a.right, b.right)


def test_layers_that_meet_in_batches_are_those_that_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    eigh = torch.linalg.eigh

    def counted(gram: Tensor) -> tuple[Tensor, Tensor]:
        batches.append(gram.shape[0] if gram.dim() == 3 else 0)
        made: tuple[Tensor, Tensor] = eigh(gram)
        return made

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    hold_together("cpu")
    assert 2 in batches  # two layers have the same shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_layers_meet_in_batches_on_a_cuda_device() -> None:
    hold_together("cuda")


@pytest.mark.parametrize("at", [1, 3])
def test_a_meeting_goes_on_without_those_that_fail(at: int) -> None:
    """Threads that wait for one that has failed would wait for ever."""

    def one(item: int) -> Tensor:
        gram = torch.eye(3) * item
        for _ in range(item):
            eigvalsh(gram)
        if item == at:
            raise ValueError("no such layer")
        return eigvalsh(gram)

    def stop(done: int, total: int) -> None:
        raise InterruptedError(f"{done} of {total}")

    assert [float(made[0]) for made in map_layers(one, [2, 4, 5], together=True)] == [2, 4, 5]
    with pytest.raises(ValueError, match="no such layer"):
        map_layers(one, [5, 1, 3, 2], together=True)
    with pytest.raises(InterruptedError, match="1 of 3"):
        map_layers(one, [2, 4, 5], together=True, after=stop)

    def singular(item: int) -> Tensor:
        return eigvalsh(torch.full((3, 3), float("nan")) if item == 2 else torch.eye(3))

    with pytest.raises(torch.linalg.LinAlgError):
        map_layers(singular, [1, 2, 3], together=True)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_the_order_and_the_caller_hears_of_each(workers: int) -> None:
    heard: list[tuple[int, int]] = []
    caller = threading.get_ident()

    def after(done: int, total: int) -> None:
        assert threading.get_ident() == caller
        heard.append((done, total))

    made = map_layers(lambda item: item * item, [3, 1, 2, 5], workers=workers, sizes=[1, 4, 3, 2], after=after)
    assert made == [9, 1, 4, 25]
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert map_layers(lambda item: item, [], workers=workers) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_largest_layers_begin_first_and_without_gradients(workers: int) -> None:
    begun: list[int] = []
    weight = torch.ones(3, requires_grad=True)

    def one(item: int) -> bool:
        begun.append(item)
        time.sleep(0.01)
        return (weight * item).requires_grad

    assert map_layers(one, [1, 2, 3], workers=workers, sizes=[10, 30, 20]) == [False] * 3
    assert set(begun[:workers]) == {2, 3} if workers == 2 else begun == [2, 3, 1]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_ends_the_rest(workers: int) -> None:
    begun: list[int] = []

    def one(item: int) -> int:
        begun.append(item)
        time.sleep(0.005)
        if item == 1:
            raise ValueError("no such layer")
        return item

    def stop(done: int, total: int) -> None:
        raise InterruptedError(f"{done} of {total}")

    with pytest.raises(ValueError, match="no such layer"):
        map_layers(one, range(50), workers=workers)
    assert len(begun) < 10
    begun.clear()
    with pytest.raises(InterruptedError, match="1 of 50"):
        map_layers(one, range(2, 52), workers=workers, after=stop)
    assert len(begun) < 10
