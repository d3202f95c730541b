"""What anybody does with an artifact, in a process that knows PyTorch alone: one request and one answer per line."""

import io
import json
import math
import sys
from typing import Any

import torch
from torch import Tensor


def flatten(raw: Any) -> list[Tensor]:
    if isinstance(raw, Tensor):
        return [raw]
    values = raw.values() if isinstance(raw, dict) else raw
    return [tensor for value in values for tensor in flatten(value)]


def answer(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [y.float() for y in flatten(module.eval()(*inputs))]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, relative to the largest output; infinite where shapes differ."""
    if [y.shape for y in found] != [w.shape for w in wanted]:
        return math.inf
    off = [
        float((y - w.float()).abs().max()) / max(float(w.float().abs().max()), 1e-30)
        for y, w in zip(found, wanted, strict=True)
    ]
    return math.inf if any(math.isnan(one) for one in off) else max(off)


def gradients(module: Any, inputs: list[Tensor]) -> dict[str, Tensor | None]:
    """Gradient of every floating parameter after one backward pass in training mode."""
    torch.manual_seed(0)
    outputs = [y for y in flatten(module.train()(*inputs)) if y.is_floating_point() and y.requires_grad]
    floating = {name: p for name, p in module.named_parameters() if p.is_floating_point() and p.numel() > 0}
    parameters = {name: p for name, p in floating.items() if p.requires_grad}
    if outputs:
        sum((y.float() - 1).square().mean() for y in outputs).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def whole(module: Any) -> dict[str, Tensor]:
    """Codes and indices: buffers of whole numbers, but for counters."""
    return {n: b.clone() for n, b in module.named_buffers() if not b.is_floating_point() and b.dim() > 0}


def check(artifact: str, expected: str, reference: str) -> dict[str, Any]:
    told = torch.load(expected, weights_only=True)
    inputs, wanted = told["inputs"], told["outputs"]
    module = torch.jit.load(artifact)
    first = answer(module, inputs)
    found: dict[str, Any] = {
        "difference": difference(first, wanted),
        "repeated": difference(answer(module, inputs), first),
        "frozen": [n for n, p in module.named_parameters() if p.numel() > 0 and not p.requires_grad],
    }
    module = torch.jit.load(artifact)
    codes = whole(module)
    got = gradients(module, inputs)
    unused = {name for name, grad in gradients(torch.jit.load(reference), inputs).items() if grad is None}
    found["parameters"] = len(got)
    found["without_gradient"] = [name for name, grad in got.items() if grad is None and name not in unused]
    found["not_finite"] = [name for name, grad in got.items() if grad is not None and not bool(grad.isfinite().all())]
    found["without_effect"] = [name for name, grad in got.items() if grad is not None and not bool(grad.any())]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in got.values() if grad is not None))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if got.get(name) is not None:
                parameter.sub_((0.3 / max(norm, 1e-30) * got[name].double()).to(parameter.dtype))
    after = answer(module, inputs)
    found["moved"] = difference(after, first)
    found["codes_changed"] = [name for name, code in whole(module).items() if not torch.equal(code, codes[name])]
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    found["saved_again"] = difference(answer(torch.jit.load(buffer), inputs), after)
    found["modules"] = [name for name in sys.modules if name.split(".")[0] in {"worker", "service", "rankpress"}]
    return found


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            reply = check(**json.loads(line))
        except Exception as error:  # noqa: BLE001  the test shows it
            reply = {"error": f"{type(error).__name__}: {str(error)[-3000:]}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
