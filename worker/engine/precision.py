"""Arithmetic of the training's forward and backward passes: its number format, and how images lie in memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from service.contract.training_spec import Training
from worker.engine.forward import map_tensors

Outputs = TypeVar("Outputs")  # of a network, in whatever structure

_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """Mixed precision by autocast; weights, gradients, optimiser and C steps stay as wide as the network is stored.

    ``auto`` is the network's own precision, and images as they come, on every device. With ``float16`` the loss is
    scaled, so that small gradients do not vanish, and an update whose gradients overflow is left out.

    Parameters
    ----------
    spec : Training
        `precision` and `memory_format`.
    device : torch.device
        Where the network stands.
    """

    def __init__(self, spec: Training, device: torch.device) -> None:
        self._device = device
        self._dtype = _NARROW.get(spec.precision)
        self._channels_last = spec.memory_format == "channels_last"
        self._scaler = torch.amp.GradScaler(device.type) if self._dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return torch.autocast(self._device.type, self._dtype) if self._dtype is not None else nullcontext()

    def laid_out(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs in the memory format; convolutions then work in it, whatever their weights' own."""
        if not self._channels_last:
            return inputs
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)

    def widened(self, outputs: Outputs) -> Outputs:
        """Outputs in which losses are computed: narrow numbers become float32."""
        if self._dtype is None:
            return outputs
        made: Outputs = map_tensors(outputs, lambda y: y.float() if y.dtype == self._dtype else y)
        return made

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients, scaled where losses are."""
        torch.autograd.backward([loss if self._scaler is None else self._scaler.scale(loss)])

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the scale off the gradients: what is added to them from here on is unscaled."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update, unless scaled gradients overflowed; then the scale is halved."""
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def save(self) -> dict[str, Any] | None:
        """State of the loss's scale, or None where losses are not scaled."""
        return None if self._scaler is None else dict(self._scaler.state_dict())

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved scale."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)
