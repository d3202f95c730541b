"""The reference's own outputs, which the network learns to match."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from worker.engine.data import Batch, Dataset, PartName
from worker.engine.forward import call, out_of_memory

CACHE_BYTES_MAX = 1 << 30  # outputs of a part up to this size are computed once
_BATCH_SIZE = 512


class Teacher:
    """The reference network in evaluation mode; its outputs are kept where they fit.

    Parameters
    ----------
    module : ScriptModule
        A copy of the reference that nothing trains.
    dataset : Dataset
        Where the parts come from.
    device : torch.device
        Where the network stands.
    """

    def __init__(self, module: torch.jit.ScriptModule, dataset: Dataset, device: torch.device) -> None:
        self.module = module.eval()
        self.dataset = dataset
        self.device = device
        self._cache: dict[PartName, tuple[Tensor, ...] | None] = {}

    def outputs(self, part: PartName, positions: np.ndarray, batch: Batch) -> tuple[Tensor, ...]:
        """Outputs for a batch that stands at `positions` of `part`."""
        if part not in self._cache:
            self._cache[part] = self._compute(part, batch)
        cached = self._cache[part]
        if cached is None:
            return self.answers(batch.inputs)
        index = torch.from_numpy(np.ascontiguousarray(positions)).to(self.device)
        return tuple(output.index_select(0, index) for output in cached)

    def answers(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs for inputs that are of no part, such as augmented ones; nothing is kept."""
        with torch.no_grad():
            return call(self.module, inputs)

    def _compute(self, part: PartName, batch: Batch) -> tuple[Tensor, ...] | None:
        with torch.no_grad():
            sample = call(self.module, batch.inputs)
            bytes_of_part = sum(o.numel() * o.element_size() for o in sample) / len(batch) * self.dataset.size(part)
            if bytes_of_part > CACHE_BYTES_MAX or any(o.dim() == 0 or o.shape[0] != len(batch) for o in sample):
                return None
            size = max(_BATCH_SIZE, len(batch))
            while True:  # a batch that does not fit is halved; the one at hand has fitted
                try:
                    made = [call(self.module, b.inputs) for b in self.dataset.batches(part, size, self.device)]
                    break
                except (RuntimeError, MemoryError) as error:
                    if size <= len(batch) or not out_of_memory(error):
                        raise
                size = max(size // 2, len(batch))
        return tuple(torch.cat(outputs) for outputs in zip(*made, strict=True))
