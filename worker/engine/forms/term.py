"""A term of the sum that a layer's weight becomes: what every compression must know to take part.

The Learning-Compression papers write a compression as a mapping Δ: the low-dimensional parameters Θ decompress to the
weight Δ(Θ). A term has a set of such Θ, the C step that finds the best of them, its true counts, and what it is emitted
as. An additive combination W = Σ Δₜ(Θₜ) takes terms of any kind (methods L.1, L.4).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from service.contract.plan import Form, ReasonCode
from service.contract.term_specs import TermSpec
from worker.engine.forms.geometry import Geometry

Facts = dict[str, Any]  # JSON

# Measured on emitted files; bounds, so that a budget in bytes of the file is kept.
FACTORED_OVERHEAD_BYTES = 2048
COMPOSED_OVERHEAD_BYTES = 5120


@dataclass(frozen=True)
class Counts:
    """What something costs.

    Parameters
    ----------
    params : int
        Stored numbers: factors, kept weights, one code for each quantized weight and its values.
    macs : int
        Multiply-adds of one sample, without the dense operator that a composed weight is used by.
    bits : int
        Of everything that is stored: numbers, codes, indices.
    """

    params: int = 0
    macs: int = 0
    bits: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.params + other.params, self.macs + other.macs, self.bits + other.bits)


class Theta(Protocol):
    """Low-dimensional parameters of one term: the result of its C step."""

    @property
    def units(self) -> int:
        """How many units the term holds: ranks, kept weights, values; 0 where Δ(Θ) = 0 and the term falls away."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything numeric, by name; what checkpoints hold."""

    def facts(self) -> Facts:
        """JSON that makes the same Θ again with the tensors, or an untrained one of the same shapes without them."""


@dataclass(frozen=True)
class Price:
    """The cost C of counts, linear in them; every weight for one unit, the rule's factor applied.

    Parameters
    ----------
    macs, params, bytes : float
        Price of one multiply-add, of one stored number, of eight stored bits.
    """

    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0

    def __call__(self, counts: Counts) -> float:
        """C."""
        return self.macs * counts.macs + self.params * counts.params + self.bytes * counts.bits / 8


class Accuracy(StrEnum):
    """How exactly a C step is made; a term that has only one way takes no notice."""

    EXACT = "exact"  # in float64: what decides the ranks and factors that are emitted
    SINGLE = "single"  # exact in float32
    WARM = "warm"  # from the Θ before, in float32: the same units, at little more than the least objective


@dataclass(frozen=True)
class Ask:
    """What a C step asks of one term: the Θ of least pressure·C(Θ) + ‖residual − Δ(Θ)‖².

    Parameters
    ----------
    pressure : float
        2λ/μ.
    low, high : int
        Bounds of the units; equal where they are fixed.
    mu : float
        μ, for penalties that are the term's own (α/μ). Infinite where no step is under way.
    price : Price
        C of counts.
    accuracy : Accuracy
        How exactly.
    """

    pressure: float
    low: int
    high: int
    mu: float = float("inf")
    price: Price = Price()
    accuracy: Accuracy = Accuracy.EXACT


class NotApplicableError(Exception):
    """The term takes no part in this layer's sum, for the reason given."""

    def __init__(self, reason: ReasonCode, form: Form = Form.COMPOSED) -> None:
        super().__init__(reason)
        self.reason = reason
        self.form = form


class Term(ABC):
    """One compression on one layer.

    A term is *graded* when its Θ is a number of equal units, each with an energy: singular values, kept weights. Then
    the best number under a price is a threshold on the energies (methods L.2), and what a budget has left can be
    filled unit by unit. Any other term chooses its Θ in `fit` by itself.

    Parameters
    ----------
    geometry : Geometry
        The layer. A term that has settings besides takes them too, and then makes itself again in `from_facts`.
    """

    type_name: ClassVar[str]
    takes_float32: ClassVar[bool] = False  # whether `fit` takes residuals in float32 where it need not be exact
    geometry: Geometry

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: TermSpec, geometry: Geometry) -> "Term":
        """Make the term that a spec asks for on one layer.

        Raises
        ------
        NotApplicableError
            It cannot be part of this layer's sum.
        """

    @classmethod
    def from_facts(cls, facts: Facts, geometry: Geometry) -> "Term":  # noqa: ARG003  here there are none
        """Make the term again that `facts` describes."""
        return cls(geometry)

    def facts(self) -> Facts:
        """JSON from which a fresh process makes the same term."""
        return {}

    @property
    def form(self) -> Form:
        """Name of what the weight becomes."""
        return Form.COMPOSED

    @property
    def key(self) -> object:
        """Equal for two terms exactly when their sum is one term of the same set."""
        return self.type_name

    @property
    def composed(self) -> bool:
        """Whether the weight is rebuilt from its parts and used by the dense operator, whose multiply-adds stay."""
        return True

    @property
    def overhead_bytes(self) -> int:
        """Bytes of a file beside the numbers, for one emitted module: its code, and its tensors' places."""
        return COMPOSED_OVERHEAD_BYTES if self.composed else FACTORED_OVERHEAD_BYTES

    @property
    def graded(self) -> bool:
        """Whether units are chosen one by one by their energies."""
        return False

    @property
    @abstractmethod
    def units_max(self) -> int:
        """Most units that there can be."""

    def units_asked(self, spec: Any) -> tuple[int, int] | None:  # noqa: ARG002
        """Bounds of the units by the spec alone; None leaves them to the selection, 0 to `units_max`."""
        return None

    def counts_at(self, units: int) -> Counts:
        """Counts at a number of units, where the units alone decide them.

        Raises
        ------
        NotImplementedError
            Other things decide them too; `counts` of a Θ always answers.
        """
        raise NotImplementedError

    def least_counts(self, low: int) -> Counts:
        """Counts of the smallest Θ with at least `low` units."""
        return self.counts_at(low)

    def counts(self, theta: Any) -> Counts:
        """Counts of a Θ."""
        return self.counts_at(theta.units)

    def form_of(self, theta: Any) -> Form:  # noqa: ARG002  a term that chooses its form looks at it
        """Name of what a Θ makes of the weight."""
        return self.form

    def settled(self, theta: Any) -> "Term":  # noqa: ARG002
        """Return the term as a Θ has settled it, where Θ holds a choice (of the reshape)."""
        return self

    def own_penalty(self, theta: Any, ask: Ask) -> float:  # noqa: ARG002
        """Part of the C step's objective that is the term's own beside price and error: (2/μ)·α‖Θ‖ of a penalty."""
        return 0.0

    def details(self, theta: Any) -> Facts:  # noqa: ARG002
        """What the layer plan says of a Θ beside its units: number of values, bits of an index, kept channels, …."""
        return {}

    def energies(self, residual: Tensor) -> Tensor:
        """Energy of each unit on a residual, falling, float64; for graded terms.

        Raises
        ------
        NotImplementedError
            The term is not graded.
        """
        raise NotImplementedError

    @abstractmethod
    def empty(self, like: Tensor) -> Any:
        """Θ = 0, on the device of `like`."""

    @abstractmethod
    def fit(self, residual: Tensor, ask: Ask, warm: Any = None) -> Any:
        """Closed form (or the best known) of the C step on what the other terms leave.

        Parameters
        ----------
        residual : Tensor
            Of the weight's shape; float64, or float32 where the term takes it and the ask is not for an exact step.
        ask : Ask
            Price, bounds and accuracy.
        warm : Theta, optional
            Θ of the sweep or step before.
        """

    def least_objective(self, residual: Tensor, ask: Ask) -> float:  # noqa: ARG002
        """Lower bound of the C step's objective that costs less to find than its Θ; −∞ where there is none."""
        return float("-inf")

    @abstractmethod
    def project(self, theta: Any) -> Tensor:
        """Δ(Θ): the dense weight that Θ stands for, of the weight's shape, in the dtype of Θ's tensors."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], facts: Facts) -> Any:
        """Make a Θ again from its own `tensors` and `facts`; without tensors an untrained one, in the default dtype."""

    def emit(self, theta: Any, bias: Tensor | None) -> nn.Module:
        """Make the plain module that takes the layer's input and gives its output; for terms that are not composed.

        Parameters
        ----------
        theta : Theta
            Of the layer's dtype, on the CPU.
        bias : Tensor or None
            ``(m,)``, given to one term of a sum.
        """
        raise NotImplementedError

    def emit_weight(self, theta: Any) -> nn.Module:
        """Make the plain module whose `forward()` gives the weight; for composed terms."""
        raise NotImplementedError

    @classmethod
    def fit_joint(
        cls, terms: Sequence[Self], residuals: Sequence[Tensor], asks: Sequence[Ask], warm: Sequence[Any] | None
    ) -> list[Any]:
        """Make the C step of several layers at once, which share a codebook or a number of kept weights.

        Raises
        ------
        NotImplementedError
            The term has no joint form.
        """
        raise NotImplementedError
