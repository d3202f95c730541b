"""The layers of a model: every operator with parameters, and why it can or cannot be replaced."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from service.contract.plan import ReasonCode
from worker.engine.network.graphs import constant, method_names, read_graph
from worker.engine.network.sites import MethodSites, Site, all_parameters, scan_methods

COMPRESSIBLE_KINDS = frozenset({"linear", "conv2d"})

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer of the user's model.

    Attributes
    ----------
    name : str
        The user's own module name ("layer1.0.conv1"); the parameter's name where a function is used with a bare one.
    kind : str
        "linear" and "conv2d" can be compressible; others are named by operator ("conv1d", "conv_transpose2d",
        "embedding", "matmul", "norm", "lstm", …), "other" where several operators share a module's parameters.
    weight, bias : str or None
        Qualified names; the weight is None where it is computed or a constant.
    weight_shape : tuple of int
        Empty where the weight is not a parameter.
    stride, padding, dilation : tuple of int
        For `conv2d`: (height, width), padding in zeros on each side; empty for other kinds.
    groups : int
        1 but for grouped convolutions.
    params : int
        numel of weight and bias. What an earlier layer has counted is not counted again, so that the sum over
        all layers is the model's total.
    call_shapes : tuple of (tuple of int, tuple of int)
        (input shape, output shape) of each call in one forward of the sample, batch dimension kept; empty
        before a census.
    calls : int
        How often one forward runs the layer.
    macs : int or None
        Multiply-adds of one sample, summed over the calls, bias not counted; None before a census or if unknown.
    reason : ReasonCode or None
        Why the layer stays dense; None if it can be replaced.
    """

    name: str
    kind: str
    weight: str | None
    bias: str | None
    weight_shape: Shape
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    params: int = 0
    call_shapes: tuple[tuple[Shape, Shape], ...] = ()
    calls: int = 0
    macs: int | None = None
    reason: ReasonCode | None = None

    @property
    def input_shape(self) -> Shape | None:
        """The input's shape in the first call."""
        return self.call_shapes[0][0] if self.call_shapes else None

    @property
    def output_shape(self) -> Shape | None:
        """The output's shape in the first call."""
        return self.call_shapes[0][1] if self.call_shapes else None

    @property
    def input_hw(self) -> tuple[Pair, ...]:
        """(height, width) of the input of each call; for `conv2d`."""
        return tuple((shape[-2], shape[-1]) for shape, _ in self.call_shapes)

    @property
    def output_hw(self) -> tuple[Pair, ...]:
        """(height, width) of the output of each call; for `conv2d`."""
        return tuple((shape[-2], shape[-1]) for _, shape in self.call_shapes)

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of vectors that each call maps; for `linear`."""
        return tuple(torch.Size(shape[:-1]).numel() for shape, _ in self.call_shapes)


def find_layers(module: torch.jit.ScriptModule) -> list[Layer]:
    """List every layer of a model from its graphs, without running it.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        A loaded model, scripted or traced; it stays as it is.

    Returns
    -------
    list of Layer
        In the order in which `forward` holds them, then what only other exported methods use, then parameters that
        nothing uses. Each parameter appears in at least one layer.
    """
    methods = scan_methods(module, {name: read_graph(module, name) for name in method_names(module)})
    return layers_of(module, methods)


def layers_of(module: torch.jit.ScriptModule, methods: dict[str, MethodSites]) -> list[Layer]:
    """Make the layers of sites that were already found; see `find_layers`."""
    grouped: dict[str, list[Site]] = {}
    for method in methods.values():
        for site in method.sites:
            grouped.setdefault(site.layer, []).append(site)
    parameters = all_parameters(module)
    shared = _shared_parameters(methods, parameters)
    layers: list[Layer] = []
    counted: set[tuple[int, Shape, Shape]] = set()
    for name, sites in grouped.items():
        own = {_identity(parameters[parameter]): parameter for site in sites for parameter in site.parameters}
        params = sum(parameters[parameter].numel() for key, parameter in own.items() if key not in counted)
        counted |= own.keys()
        layers.append(replace(_layer(module, name, sites, methods, parameters, shared), params=params))
    return layers + list(_left_over(methods, parameters, counted, set(grouped)))


def _layer(
    module: torch.jit.ScriptModule,
    name: str,
    sites: list[Site],
    methods: dict[str, MethodSites],
    parameters: dict[str, torch.Tensor],
    shared: set[str],
) -> Layer:
    site = sites[0]
    weight = parameters.get(site.weight or "")
    layer = Layer(
        name=name,
        kind=site.kind if len({one.kind for one in sites}) == 1 else "other",
        weight=site.weight,
        bias=site.bias,
        weight_shape=tuple(weight.shape) if weight is not None else (),
    )
    if layer.kind not in COMPRESSIBLE_KINDS:
        return replace(layer, reason=ReasonCode.UNSUPPORTED_KIND)
    reason = _weight_reason(sites, methods, parameters, shared)
    if layer.kind == "linear":
        return replace(layer, reason=reason)
    geometries = [_geometry(module, one, methods[one.method], layer.weight_shape) for one in sites]
    if None in geometries or len(set(geometries)) != 1 or geometries[0] is None:
        return replace(layer, reason=reason or ReasonCode.PADDING_MODE)
    stride, padding, dilation, groups = geometries[0]
    grouped = ReasonCode.GROUPED_CONVOLUTION if groups != 1 else None
    return replace(layer, stride=stride, padding=padding, dilation=dilation, groups=groups, reason=reason or grouped)


def _weight_reason(
    sites: list[Site], methods: dict[str, MethodSites], parameters: dict[str, torch.Tensor], shared: set[str]
) -> ReasonCode | None:
    site = sites[0]
    weight = parameters.get(site.weight or "")
    if weight is None or any(site.weight in methods[one.method].assigned for one in sites):
        return ReasonCode.WEIGHT_NOT_PARAMETER
    if not all(one.bias_known for one in sites):
        return ReasonCode.WEIGHT_NOT_PARAMETER
    if weight.dtype not in {torch.float32, torch.float64}:
        return ReasonCode.NOT_FLOATING
    if weight.dim() != (2 if site.kind == "linear" else 4):
        return ReasonCode.UNSUPPORTED_KIND
    names = {one.weight for one in sites} | {one.bias for one in sites}
    if len(names) > 2 or names & shared:
        return ReasonCode.SHARED_WEIGHT
    return None


def _shared_parameters(methods: dict[str, MethodSites], parameters: dict[str, torch.Tensor]) -> set[str]:
    """Name the parameters that several operators of one method use, or that have a second name."""
    names: dict[int, list[str]] = {}
    for name, tensor in parameters.items():
        names.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {
        name
        for name, tensor in parameters.items()
        if len(names[tensor.untyped_storage().data_ptr()]) > 1
        or any(len(method.consumers.get(name, [])) > 1 or method.hides(name) for method in methods.values())
    }


def _geometry(
    module: torch.jit.ScriptModule, site: Site, method: MethodSites, weight_shape: Shape
) -> tuple[Shape, Shape, Shape, int] | None:
    """Read (stride, padding, dilation, groups); None where they are computed or not the same zeros on both sides."""
    groups_at = 8 if site.node.kind() in {"aten::_convolution", "aten::convolution"} else 6
    try:
        stride, padding, dilation, groups = (
            constant(module, site.node.inputsAt(at), method.root) for at in (3, 4, 5, groups_at)
        )
    except LookupError:
        return None
    stride, dilation = _pair(stride), _pair(dilation)
    if isinstance(padding, str):
        padding = _padding_of_mode(padding, weight_shape[2:], dilation)
    return None if padding is None else (stride, _pair(padding), dilation, int(groups))


def _pair(value: int | Iterable[int]) -> Shape:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values * 2)[:2] if len(values) == 1 else values


def _padding_of_mode(mode: str, kernel: Shape, dilation: Shape) -> Shape | None:
    """Zeros on each side for "same" and "valid"; an odd total is not symmetric and has no such number."""
    if mode == "valid":
        return (0, 0)
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    return tuple(total // 2 for total in totals) if all(total % 2 == 0 for total in totals) else None


def _left_over(
    methods: dict[str, MethodSites],
    parameters: dict[str, torch.Tensor],
    counted: set[tuple[int, Shape, Shape]],
    names: set[str],
) -> Iterable[Layer]:
    """Name what no operator in sight uses: it costs parameters and is part of the plan all the same."""
    groups: dict[str, list[str]] = {}
    for name, tensor in parameters.items():
        if _identity(tensor) not in counted:
            groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
            counted.add(_identity(tensor))
    for owner, members in groups.items():
        hidden = any(method.hides(name) for method in methods.values() for name in members)
        yield Layer(
            name=owner if owner not in names else members[0],
            kind="other",
            weight=members[0],
            bias=None,
            weight_shape=tuple(parameters[members[0]].shape),
            params=sum(parameters[name].numel() for name in members),
            reason=ReasonCode.UNSUPPORTED_KIND if hidden else ReasonCode.NOT_EXECUTED,
        )


def count_distinct(tensors: Iterable[torch.Tensor]) -> int:
    """Sum numel over tensors, counting those that are the same memory once."""
    return sum({_identity(tensor): tensor.numel() for tensor in tensors}.values())


def _identity(tensor: torch.Tensor) -> tuple[int, Shape, Shape]:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())
