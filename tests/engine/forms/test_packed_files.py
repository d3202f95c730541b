"""A packed weight through its life: scripted, exported, loaded, moved, trained, saved again."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.contract.terms import PruneTermSpec, QuantizeTermSpec
from worker.engine.forms.geometry import Geometry
from worker.engine.forms.pruned import PruneTerm
from worker.engine.forms.quantized import QuantizeTerm
from worker.engine.forms.term import Ask, Term
from worker.engine.network.export import export_bytes
from worker.engine.network.load import load_model, reload

OUTPUTS, INPUTS = 120, 400
GEOMETRY = Geometry("linear", (OUTPUTS, INPUTS), ())
CODE_BYTES_MAX = 14_000  # of the file beside what is stored: TorchScript's own
SPECS = [
    QuantizeTermSpec(values=2),
    QuantizeTermSpec(values=16, per_channel=True),
    QuantizeTermSpec(scheme="ternary"),
    QuantizeTermSpec(scheme="fixed_point", bits=5),
    QuantizeTermSpec(scheme="binary"),
    QuantizeTermSpec(scheme="power_of_two", bits=3),
    PruneTermSpec(keep_fraction=0.05),
    PruneTermSpec(keep_fraction=0.4),
]


def name_of(spec: Any) -> str:
    return "-".join(str(value) for value in spec.model_dump(exclude_defaults=True).values())


UNPACK = ["load", "call"]


class Host(nn.Module):
    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed
        self.bias = nn.Parameter(torch.zeros(OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.packed(), self.bias)


def emitted(spec: Any, unpack: str, seed: int = 0) -> tuple[torch.jit.ScriptModule, Tensor, int]:
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kind: Any = QuantizeTerm if isinstance(spec, QuantizeTermSpec) else PruneTerm
    term: Term = kind.from_spec(spec.model_copy(update={"unpack": unpack}), GEOMETRY)
    low, high = term.units_asked(spec) or (0, 0)
    theta = term.fit(weight, Ask(0.0, low, high))
    module = torch.jit.script(Host(term.emit_weight(theta.to(torch.float32))))
    return module, term.project(theta).float(), term.counts(theta).bits // 8


def loaded(content: bytes, tmp_path: Path) -> torch.jit.ScriptModule:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    return load_model(path, "cpu").eval()


def saved(module: torch.jit.ScriptModule) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def answer(module: torch.jit.ScriptModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module(x)
    return y


@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_file_is_small_and_the_intake_takes_it_again(spec: Any, unpack: str, tmp_path: Path) -> None:
    module, dense, stored = emitted(spec, unpack)
    content = export_bytes(module)
    assert stored <= len(content) <= stored + CODE_BYTES_MAX
    assert len(content) < dense.numel() * 4 // 2
    network, x = loaded(content, tmp_path), torch.randn(3, INPUTS)
    expected = functional.linear(x, dense)
    for _ in range(2):
        assert torch.allclose(answer(network, x), expected, atol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(network(x), expected, atol=1e-4)
        inside = torch.jit.load(io.BytesIO(content)).eval()  # its tensors have no versions
        for _ in range(2):
            assert torch.allclose(inside(x), expected, atol=1e-4)
    assert torch.allclose(network(x), expected, atol=1e-4)  # with gradients
    again = export_bytes(reload(loaded(content, tmp_path)))
    assert len(again) <= len(content) + 1000
    assert torch.allclose(answer(loaded(again, tmp_path), x), expected, atol=1e-4)
    assert torch.allclose(answer(torch.jit.freeze(loaded(content, tmp_path)), x), expected, atol=1e-4)
    assert torch.allclose(answer(loaded(saved(network), tmp_path), x), expected, atol=1e-4)  # saved after use


@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_gradients_reach_values_in_both_modes_and_steps_show(spec: Any, unpack: str, tmp_path: Path) -> None:
    network = loaded(export_bytes(emitted(spec, unpack)[0]), tmp_path)
    x = torch.randn(6, INPUTS)
    fixed = isinstance(spec, QuantizeTermSpec) and spec.scheme in {"binary", "power_of_two"}
    names = [name for name, _ in network.named_parameters()]
    assert [name.rpartition(".")[2] for name in names] == (["bias"] if fixed else ["bias", "values"])
    codes = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert all(buffer.dtype == torch.uint8 for name, buffer in codes.items() if name.endswith(("codes", "index")))
    optimizer = torch.optim.SGD(network.parameters(), lr=2e-4)  # what suits the dense weight
    for training in (True, False):
        before = answer(network, x)
        network.train(training)
        optimizer.zero_grad()
        network(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        assert all(float(parameter.grad.abs().sum()) > 0 for parameter in network.parameters())
        optimizer.step()
        network.eval()
        after = answer(network, x)
        assert float(after.square().sum()) < float(before.square().sum())
        assert torch.allclose(after, network(x), atol=1e-4)  # what was kept is not stale
    assert all(torch.equal(codes[name], buffer) for name, buffer in network.named_buffers())
    trained = loaded(export_bytes(network), tmp_path)
    assert torch.allclose(answer(trained, x), answer(network, x), atol=1e-5)


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3], SPECS[4], SPECS[6]], ids=name_of)
def test_what_was_unpacked_is_dropped_when_anything_changes(spec: Any, tmp_path: Path) -> None:
    content = export_bytes(emitted(spec, "load")[0])
    network, x = loaded(content, tmp_path), torch.randn(2, INPUTS)
    first = answer(network, x)
    kept = network.packed.cache
    assert kept.numel() == OUTPUTS * INPUTS
    answer(network, x)
    assert network.packed.cache.data_ptr() == kept.data_ptr()
    values = next(tensor for name, tensor in network.state_dict().items() if name.endswith("values"))
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert not any(name.endswith(("cache", "seen")) for name in state)
    bias = answer(network, torch.zeros(1, INPUTS))
    with torch.no_grad():
        values.mul_(2.0)
    assert torch.allclose(answer(network, x) - bias, 2 * (first - bias), atol=1e-4)
    network.load_state_dict(state)
    assert torch.allclose(answer(network, x), first, atol=1e-5)
    values.data.mul_(3.0)  # no version tells of this
    assert torch.allclose(answer(network, x) - bias, 3 * (first - bias), atol=1e-3)
    network.load_state_dict(state)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        network.to(dtype)
        moved = answer(network, x.to(dtype))
        assert moved.dtype == dtype
        assert torch.allclose(moved.float(), first, atol=0.5 if dtype.itemsize == 2 else 1e-3)
    network.to(torch.float32).load_state_dict(state)
    network.train()
    answer(network, x)
    assert network.packed.cache.numel() == 0


def test_a_file_saved_after_use_is_not_believed_blindly(tmp_path: Path) -> None:
    network, x = loaded(export_bytes(emitted(SPECS[0], "load")[0]), tmp_path), torch.randn(2, INPUTS)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    answer(network, x)
    used = loaded(saved(network), tmp_path)
    used.load_state_dict({name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()})
    assert torch.allclose(answer(used, x), 2 * answer(network, x), atol=1e-4)


def test_the_state_of_a_used_network_fits_a_fresh_one(tmp_path: Path) -> None:
    for spec in SPECS:
        content = export_bytes(emitted(spec, "load")[0])
        used, fresh, x = loaded(content, tmp_path), loaded(content, tmp_path), torch.randn(2, INPUTS)
        expected = answer(used, x)
        with torch.no_grad():
            own = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
            for name, tensor in {**dict(used.named_parameters()), **dict(used.named_buffers())}.items():
                own[name].copy_(tensor)
        assert torch.equal(answer(fresh, x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_layers_of_other_dtypes(spec: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    kind: Any = QuantizeTerm if isinstance(spec, QuantizeTermSpec) else PruneTerm
    term: Term = kind.from_spec(spec, GEOMETRY)
    low, high = term.units_asked(spec) or (0, 0)
    theta = term.fit(weight, Ask(0.0, low, high)).to(dtype)
    module = torch.jit.script(term.emit_weight(theta))
    made = module()
    assert made.dtype == dtype
    assert torch.allclose(made.double(), term.project(theta).double(), atol=1e-6)
    if made.requires_grad:
        made.float().square().sum().backward()
        values = next(iter(module.parameters()))
        assert values.grad.dtype == dtype
        assert bool(values.grad.isfinite().all())


def test_a_step_on_values_is_the_dense_step_projected() -> None:
    torch.manual_seed(0)
    weight, slope = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64), torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    for spec in SPECS[:4]:
        term = QuantizeTerm.from_spec(spec, GEOMETRY)
        theta = term.fit(weight, Ask(0.0, term.size, term.size))
        module = torch.jit.script(term.emit_weight(theta.to(torch.float64)).train())
        made = module()
        (made * slope).sum().backward()
        values = next(iter(module.parameters()))
        with torch.no_grad():
            values -= 0.1 * values.grad
        moved = module().detach()
        target = made.detach() - 0.1 * slope
        codes = theta.codes.long()
        if term.scheme == "codebook":
            flat = target.reshape(term.groups, -1)
            sums = torch.zeros_like(theta.values).scatter_add(1, codes, flat)
            best = sums / torch.zeros_like(theta.values).scatter_add(1, codes, torch.ones_like(flat)).clamp(min=1)
            nearest = best.gather(1, codes).reshape(target.shape)
        else:
            levels = made.detach() / theta.values
            nearest = levels * (levels * target).sum() / levels.square().sum()
        assert torch.allclose(moved, nearest, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_on_a_gpu_and_back(spec: Any, tmp_path: Path) -> None:
    network, x = loaded(export_bytes(emitted(spec, "load")[0]), tmp_path), torch.randn(2, INPUTS)
    expected = answer(network, x)
    network.to("cuda")
    for _ in range(2):
        assert torch.allclose(answer(network, x.cuda()).cpu(), expected, atol=1e-3)
    network.to("cpu")
    assert torch.allclose(answer(network, x), expected, atol=1e-5)
