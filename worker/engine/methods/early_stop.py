"""When the LC loop may end before its last step: its ranks are settled and W is as good as Θ."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.contract.training_spec import EarlyStop


@dataclass
class Stability:
    """How long the ranks have not changed.

    Further steps train W where a growing μ pins it to Θ: slowly, while the factored network's own training, which
    follows, moves the same factors freely.

    Parameters
    ----------
    ranks : sequence of int or None
        Rank of every term after the last step; None before the first.
    steps : int
        Steps since then that left them as they were.
    """

    ranks: Sequence[int] | None = None
    steps: int = 0

    def count(self, ranks: Sequence[int]) -> None:
        """Count a step that ended with these ranks."""
        self.steps = self.steps + 1 if self.ranks is not None and list(ranks) == list(self.ranks) else 0
        self.ranks = list(ranks)

    def reached(self, spec: EarlyStop | None, distance: float, norm: float) -> bool:
        """Whether the loop may end.

        Parameters
        ----------
        spec : EarlyStop or None
            How settled is settled; None never ends.
        distance, norm : float
            Σ‖W − Θ‖² and Σ‖W‖² over the compressed layers.
        """
        return spec is not None and self.steps >= spec.steps and distance <= spec.distance * norm
