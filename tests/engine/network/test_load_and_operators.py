import io
import zipfile
from pathlib import Path

import pytest
import torch
from network_corpus import CASES, build, saved
from torch import Tensor, nn

from service.contract.errors import ErrorCode, ProblemError
from worker.engine.network.allowed_operators import ALLOWED_OPERATORS
from worker.engine.network.load import load_model
from worker.engine.network.operators import reject_unsafe_operators


class Saves(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        torch.ops.aten.save(x, self.path)
        return x


class ReadsFile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("/etc/hostname", False, 4, dtype=torch.uint8)


class HiddenInLoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def never_called(self, x: Tensor) -> Tensor:
        for i in range(3):
            if i == 1:
                torch.ops.aten.save(x, "never")
        return x


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), HiddenInLoop())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def saving_function(x: Tensor) -> Tensor:
    torch.ops.aten.save(x, "never")
    return x


class Forks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.jit.wait(torch.jit.fork(saving_function, x))


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.jit.annotate(Tensor, saving_function(x))


@torch.jit.script
class Saver:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def go(self) -> Tensor:
        torch.ops.aten.save(self.x, "never")
        return self.x


class UsesClass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Saver(x).go()


def refusal(module: nn.Module) -> ProblemError:
    loaded = load_model(saved(torch.jit.script(module)))
    with pytest.raises(ProblemError) as caught:
        reject_unsafe_operators(loaded)
    assert caught.value.code is ErrorCode.MODEL_REJECTED_UNSAFE
    return caught.value


def test_saving_is_refused_before_anything_runs(tmp_path: Path) -> None:
    target = tmp_path / "written"
    problem = refusal(Saves(str(target)))
    assert "aten::save" in problem.detail
    assert "in forward (" in problem.detail
    assert "torch.ops.aten.save(x, self.path)" in problem.detail
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "operator", "place"),
    [
        (ReadsFile(), "aten::from_file", "forward"),
        (Wraps(), "aten::save", "inner.1.never_called"),
        (Forks(), "aten::save", "forward"),
        (Calls(), "aten::save", "forward"),
        (UsesClass(), "aten::save", "forward"),
    ],
)
def test_operators_are_found_wherever_they_hide(module: nn.Module, operator: str, place: str) -> None:
    detail = refusal(module).detail
    assert operator in detail
    assert f"in {place} (" in detail


@torch.jit.interface
class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pass


class HonestStep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class ThroughInterface(nn.Module):
    step: Step

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step.forward(x)


def test_interfaces_are_read_in_their_submodules() -> None:
    reject_unsafe_operators(load_model(saved(torch.jit.script(ThroughInterface(HonestStep())))))
    assert "in step.forward" in refusal(ThroughInterface(ReadsFile())).detail


def test_the_list_names_no_operator_that_reaches_outside() -> None:
    forbidden = {"aten::save", "aten::from_file", "aten::set_", "aten::resize_", "aten::set_data", "aten::to_here"}
    forbidden |= {"prim::PythonOp", "prim::IgnoredPythonOp", "prim::rpc_async", "prim::rpc_sync", "prim::rpc_remote"}
    assert not forbidden & ALLOWED_OPERATORS
    assert {name.partition("::")[0] for name in ALLOWED_OPERATORS} == {"aten", "prim"}


class TextAndContainers(nn.Module):
    def forward(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, name in enumerate(names):
            key = name.strip().lower().replace("-", "_") + str(index)
            if key.startswith("skip") or key in found:
                continue
            found[key] = x[index : index + 2].clamp(min=0.0).nan_to_num() ** 2
        pairs = list(found.values())
        found["all"] = torch.cat(pairs, dim=0) if len(pairs) > 0 else x
        print("seen", len(found))
        return found


class Mathematics(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)
        x = (x / scale).masked_fill(x > 3.0, 0.0)
        spectrum = torch.fft.rfft(x, dim=-1).abs()
        weights = torch.softmax(torch.einsum("bi,bj->ij", spectrum, spectrum), dim=-1)
        values, order = torch.sort(x, descending=True)
        x = torch.where(torch.isfinite(values), values, torch.zeros_like(values)).gather(1, order.argsort(1))
        return x.cumsum(1).roll(1, 1), weights.triu().index_select(0, torch.arange(2, device=x.device))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0])[0]


HONEST: list[nn.Module] = [
    TextAndContainers(),
    Mathematics(),
    nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    nn.TransformerDecoderLayer(8, 2, 16),
    nn.MultiheadAttention(8, 2),
    nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(2)
    ),
    nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.PReLU(), nn.MaxPool3d(2), nn.Dropout3d()),
    nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.InstanceNorm2d(3, affine=True), nn.Hardswish()),
    nn.Sequential(nn.ReflectionPad2d(1), nn.PixelShuffle(2), nn.SiLU(), nn.AvgPool2d(2), nn.LocalResponseNorm(2)),
    Recurrent(),
    nn.LSTMCell(4, 4),
    nn.EmbeddingBag(9, 3, mode="mean"),
    nn.Embedding(9, 3, max_norm=1.0),
    nn.CTCLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.RMSNorm(4),
    nn.ConvTranspose1d(2, 2, 3),
    nn.Bilinear(2, 2, 2),
    nn.SyncBatchNorm(3) if torch.cuda.is_available() else nn.BatchNorm1d(3),
]


@pytest.mark.parametrize("module", HONEST, ids=lambda module: type(module).__name__)
def test_honest_models_pass(module: nn.Module) -> None:
    if any(isinstance(part, nn.LazyLinear) for part in module.modules()):
        module(torch.randn(1, 2, 8, 8))
    reject_unsafe_operators(load_model(saved(torch.jit.script(module))))


@pytest.mark.parametrize("content", [b"", b"not a zip", build("mlp", "scripted")[:2000]], ids=["empty", "text", "cut"])
def test_what_cannot_be_loaded_is_corrupt(content: bytes) -> None:
    with pytest.raises(ProblemError, match=r"torch 2.* cannot load") as caught:
        load_model(content)
    assert caught.value.code is ErrorCode.MODEL_CORRUPT
    assert len(caught.value.detail) < 800


def test_a_zip_of_something_else_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("hello.txt", "hello")
    with pytest.raises(ProblemError) as caught:
        load_model(path)
    assert caught.value.code is ErrorCode.MODEL_CORRUPT


def test_loads_are_fresh_from_a_path_or_from_bytes(tmp_path: Path) -> None:
    content = build("mlp", "scripted")
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    first, second = load_model(path), load_model(content)
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.abs().sum() > 0
    assert first.head.weight.device == torch.device("cpu")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN, whose constants cannot be loaded")
def test_what_torch_saved_but_cannot_load_is_said_to_be_uploaded_as_it_was_before(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.jit.save(torch.jit.optimize_for_inference(torch.jit.script(network)), str(tmp_path / "model.pt"))
    with pytest.raises(ProblemError, match=r"before torch\.jit\.optimize_for_inference") as caught:
        load_model(tmp_path / "model.pt")
    assert caught.value.code is ErrorCode.MODEL_CORRUPT


class OnCuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > 1:
            x = x + torch.ones(3, device=torch.device("cuda:0")).to("cuda")
        return self.fc(x.to(torch.device("cuda")))


class CallsCuda(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cuda()


def test_devices_in_the_code_follow_the_model() -> None:
    model = OnCuda()
    x = torch.randn(2, 3)
    loaded = load_model(saved(torch.jit.script(model)))
    torch.testing.assert_close(loaded(x), model.fc(x + 1))
    buffer = io.BytesIO(saved(loaded))
    torch.testing.assert_close(torch.jit.load(buffer)(x), model.fc(x + 1))


def test_a_device_that_cannot_be_rewritten_is_refused_with_its_line() -> None:
    with pytest.raises(ProblemError, match=r"aten::cuda in forward \(.*return x\.cuda\(\)") as caught:
        load_model(saved(torch.jit.script(CallsCuda())))
    assert caught.value.code is ErrorCode.MODEL_UNSUPPORTED


class KeepsDevice(nn.Module):
    """A device as an attribute of a submodule, in a branch, in a loop and in a second method."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.device = torch.device("cuda:1")

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if x.size(0) > 1:
                x = x + torch.zeros(3, device=self.device)
        return self.inner(x)

    @torch.jit.export
    def noise(self, n: int) -> Tensor:
        return torch.ones(n, device=torch.device("cuda"))


class ComputesDevice(nn.Module):
    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        return x.to(torch.device("cuda:" + str(index)))


def test_devices_in_attributes_and_other_methods_follow_the_model() -> None:
    model = nn.Sequential(KeepsDevice())
    x = torch.randn(2, 3)
    loaded = load_model(saved(torch.jit.script(model)))
    torch.testing.assert_close(loaded(x), model[0].inner(x))
    whole = load_model(saved(torch.jit.script(KeepsDevice())))
    assert whole.noise(2).device == torch.device("cpu")


def test_a_trace_s_constants_are_moved_like_a_model_s_that_was_saved_on_cuda() -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0] + torch.zeros(4)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    model = Makes().eval()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    module = torch.jit.load(io.BytesIO(saved(traced)))
    graph = module._c._get_method("forward").graph
    torch._C._jit_pass_inline(graph)
    for node in graph.findAllNodes("prim::Constant"):
        if isinstance(node.output().toIValue(), torch.device):
            graph.setInsertPoint(node)
            node.output().replaceAllUsesWith(graph.insertConstant(torch.device("cuda:0")))
    file = saved(module)
    with zipfile.ZipFile(io.BytesIO(file)) as opened:
        assert any(b"cuda:0" in opened.read(name) for name in opened.namelist())
    torch.testing.assert_close(load_model(file)(x), model(x))


def test_a_device_that_is_computed_is_refused_with_its_line() -> None:
    with pytest.raises(ProblemError, match=r"aten::device in forward \(.*str\(index\)") as caught:
        load_model(saved(torch.jit.script(ComputesDevice())))
    assert caught.value.code is ErrorCode.MODEL_UNSUPPORTED


def test_parameters_that_share_a_block_of_memory_get_their_own() -> None:
    lstm = nn.LSTM(3, 4)
    block = torch.cat([value.detach().reshape(-1) for value in lstm.parameters()])
    start = 0
    for value in lstm.parameters():
        value.data = block[start : start + value.numel()].view_as(value)
        start += value.numel()
    model = nn.Sequential(lstm)
    loaded = load_model(saved(torch.jit.script(model)))
    for name, value in loaded.named_parameters():
        assert value.untyped_storage().nbytes() == 4 * value.numel()
        assert torch.equal(value, model.get_parameter(name))
    loaded(torch.randn(2, 1, 3))[0].sum().backward()
    assert all(value.grad is not None for value in loaded.parameters())


def test_a_model_without_forward_is_refused() -> None:
    class OnlyEncode(nn.Module):
        @torch.jit.export
        def encode(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ProblemError, match="no forward") as caught:
        load_model(saved(torch.jit.script(OnlyEncode())))
    assert caught.value.code is ErrorCode.MODEL_UNSUPPORTED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("name", sorted(CASES))
def test_models_traced_on_the_cpu_run_on_cuda(name: str) -> None:
    case = CASES[name]
    how = "traced" if case.traceable else "scripted"
    inputs = tuple(value.cuda() for value in case.inputs(2))
    load_model(build(name, how), "cuda").eval()(*inputs)
