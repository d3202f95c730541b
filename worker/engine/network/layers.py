"""The layers of a model: which sites are one layer, what it is, why it can or cannot be replaced, what it counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from service.contract.plan import ReasonCode
from worker.engine.network.graphs import Node
from worker.engine.network.layer import COMPRESSIBLE_KINDS, Layer
from worker.engine.network.operator_sites import MULTIPLYING, Site, key_of
from worker.engine.network.parameters import Parameters
from worker.engine.network.sites import MethodSites, read_plain, scan_methods
from worker.engine.network.strides import Strides, strides_of

__all__ = ["COMPRESSIBLE_KINDS", "Inventory", "Layer", "find_layers", "take_inventory"]

_AXES = {"linear": 2, "matmul": 2, "embedding": 2} | {
    f"{kind}{axes}d": axes + 2 for kind in ("conv", "conv_transpose") for axes in (1, 2, 3)
}


@dataclass
class Inventory:
    """The layers of a model, and whose work each site does.

    Attributes
    ----------
    layers : list of Layer
        In the order in which `forward` holds them.
    parameters : list of Layer
        Every floating parameter of at least two axes, as a layer of kind "parameter".
    shared : dict
        For the sites of parameters: what `shares` gives, which is nothing for a bias.
    """

    layers: list[Layer] = field(default_factory=list)
    parameters: list[Layer] = field(default_factory=list)
    shared: dict[tuple[str, str], list[tuple[str, int]]] = field(default_factory=dict)

    def shares(self, site: Site) -> list[tuple[str, int]]:
        """Name the layers whose work a site does, each with its part of it in numbers of its weight."""
        return self.shared.get(_key(site), [(site.layer, 1)])


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
        nothing uses. Each parameter is counted in exactly one layer.
    """
    return take_inventory(module, scan_methods(module, read_plain(module))).layers


def take_inventory(module: torch.jit.ScriptModule, methods: Mapping[str, MethodSites]) -> Inventory:
    """Make the layers of sites that were already found; see `find_layers`."""
    return _Stocktaking(module, methods).taken()


class _Stocktaking:
    def __init__(self, module: torch.jit.ScriptModule, methods: Mapping[str, MethodSites]) -> None:
        self.module = module
        self.methods = methods
        self.parameters = Parameters(module)
        self.overlapping = self.parameters.overlapping()
        self.sites = [site for method in methods.values() for site in method.sites]
        self.by_weight: dict[str, list[Site]] = {}
        self.by_layer: dict[str, list[Site]] = {}
        for site in self.sites:
            self.by_layer.setdefault(site.layer, []).append(site)
            if site.weight is not None and site.kind in COMPRESSIBLE_KINDS:
                self.by_weight.setdefault(site.weight, []).append(site)
        self.found = Inventory()
        self.place: dict[str, int] = {}  # of each layer: the first site that it serves
        self.counted: dict[str, str] = {}  # parameter -> layer
        self.rests: set[str] = set()  # layers of what others do not count
        self.whole = {name: layer for name in self.parameters if (layer := self._parameter(name)) is not None}

    def taken(self) -> Inventory:
        """Make the layers: operators and whole parameters first, then what these do not count."""
        for at, site in enumerate(self.sites):
            parts = [name for name in site.parameters if name in self.whole]
            if site.weight in self.by_weight and site.weight not in self.whole:
                self._operator(at, self.by_weight[site.weight])
            elif parts:
                for name in parts:
                    self._add(at, self.whole[name], [name])
                self.found.shared[_key(site)] = []
        for at, site in enumerate(self.sites):
            self._rest(at, site)
        for site in self.sites:
            if _key(site) in self.found.shared:
                self.found.shared[_key(site)] = list(self._shares(site).items())
        self._unused()
        self.found.layers.sort(key=lambda layer: self.place[layer.name])
        self.found.parameters = [layer for name in self.parameters if (layer := self._named(name)) is not None]
        return self.found

    def _add(self, at: int, layer: Layer, members: list[str]) -> None:
        """Take a layer in, with the parameters that none has counted before."""
        if layer.name in self.place:
            return
        self.place[layer.name] = at
        new = [name for name in dict.fromkeys(members) if name not in self.counted]
        self.counted.update(dict.fromkeys(new, layer.name))
        params = sum(self.parameters[name].numel() for name in new)
        self.found.layers.append(replace(layer, params=params))

    def _operator(self, at: int, sites: list[Site]) -> None:
        """Take in the layer of all sites of a weight."""
        site = sites[0]
        weight = str(site.weight)
        reason = self._weight_reason(weight) or self._kind_reason(site)
        if reason is None and not self._alike(sites):
            reason = ReasonCode.UNSUPPORTED_KIND
        bias = self._common_bias(sites) if reason is None else site.bias
        layer = replace(self._described(site, weight), bias=bias, reason=reason)
        strides = self._strides(site, weight)
        if strides is not None and strides.stride:
            layer = replace(layer, **vars(strides))
        self._add(at, layer, [weight] if bias is None else [weight, bias])

    def _rest(self, at: int, site: Site) -> None:
        """Take in what no layer counts yet of a module's parameters, and operators whose weight is computed."""
        group = self.by_layer[site.layer]
        members = [
            name for each in group for name in each.parameters if name not in self.counted and name not in self.whole
        ]
        free = site.layer not in self.place
        computed = site.weight is None and site.kind in COMPRESSIBLE_KINDS and free
        if not members and not computed:
            return
        kinds = {each.kind for each in group}
        weight = None if computed else members[0]
        layer = Layer(
            name=site.layer if free else members[0],
            kind=kinds.pop() if free and len(kinds) == 1 else "other",
            weight=weight,
            bias=None,
            weight_shape=() if weight is None else tuple(self.parameters[weight].shape),
            reason=ReasonCode.WEIGHT_NOT_PARAMETER if computed else ReasonCode.UNSUPPORTED_KIND,
        )
        self._add(at, layer, members)
        self.rests.add(layer.name)

    def _shares(self, site: Site) -> dict[str, int]:
        """Divide a site's work among the layers of its parameters; a bias has no part in it, but its layer ran."""
        shares: dict[str, int] = {}
        for name in site.parameters:
            layer, tensor = self.counted[name], self.parameters[name]
            if name in self.whole or layer in self.rests:
                shares[layer] = shares.get(layer, 0) + (tensor.numel() if tensor.dim() > 1 else 0)
        return shares

    def _unused(self) -> None:
        """Take in what no operator in sight uses: it costs parameters and is part of the plan all the same."""
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            if name not in self.counted:
                groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
        for owner, members in groups.items():
            hidden = any(method.hides(name) for method in self.methods.values() for name in members)
            layer = Layer(
                name=owner if owner not in self.place else members[0],
                kind="other",
                weight=members[0],
                bias=None,
                weight_shape=tuple(self.parameters[members[0]].shape),
                reason=ReasonCode.UNSUPPORTED_KIND if hidden else ReasonCode.UNUSED,
            )
            self._add(len(self.sites), layer, members)

    def _parameter(self, name: str) -> Layer | None:
        """Describe a weight that its operators cannot be replaced by factors for, but that can be composed."""
        if self.parameters[name].dim() < 2 or self._weight_reason(name) is not None:
            return None
        sites = self.by_weight.get(name, [])
        readers = [node for method in self.methods.values() for node in method.consumers.get(name, [])]
        if any(self._kind_reason(site) is not None for site in sites):
            return None
        if not sites and not any(node.kind() in MULTIPLYING for node in readers):
            return None
        if sites and self._alike(sites) and self._alone(name, sites, readers):
            return None
        return self._described(None, name)

    def _alike(self, sites: list[Site]) -> bool:
        """Tell whether one branch can stand at every site of a weight."""
        weight = str(sites[0].weight)
        strides = [self._strides(site, weight) for site in sites]
        return (
            all(site.input_at is not None and not site.derived and self._factors_one(site) for site in sites)
            and len({site.kind for site in sites}) == 1
            and self.parameters[weight].dim() == _AXES[sites[0].kind]
            and None not in strides
            and len(set(strides)) == 1
        )

    def _factors_one(self, site: Site) -> bool:
        if site.node.kind() != "aten::addmm":
            return True
        return all(site.node.inputsAt(at).toIValue() == 1 for at in (3, 4))

    def _alone(self, name: str, sites: list[Site], readers: list[Node]) -> bool:
        """Tell whether nothing but these sites reads a weight."""
        nodes = {_key(site) for site in sites}
        read = [
            (method_name, key_of(node))
            for method_name, method in self.methods.items()
            for node in method.consumers.get(name, [])
        ]
        return set(read) <= nodes and len(read) == len(readers) == len(sites)

    def _weight_reason(self, name: str) -> ReasonCode | None:
        if any(name in method.assigned for method in self.methods.values()):
            return ReasonCode.WEIGHT_NOT_PARAMETER
        if not self.parameters[name].is_floating_point():
            return ReasonCode.NOT_FLOATING
        hidden = any(method.hides(each) for method in self.methods.values() for each in self.parameters.names(name))
        return ReasonCode.SHARED_WEIGHT if hidden or name in self.overlapping else None

    def _kind_reason(self, site: Site) -> ReasonCode | None:
        """Refuse embeddings whose gradient is not a plain one."""
        if site.node.kind() != "aten::embedding":
            return None
        plain = all(site.node.inputsAt(at).toIValue() is False for at in (3, 4))
        return None if plain else ReasonCode.UNSUPPORTED_KIND

    def _strides(self, site: Site, weight: str) -> Strides | None:
        if not site.kind.startswith("conv"):
            return Strides()
        root = self.methods[site.method].root
        return strides_of(self.module, site.node, root, tuple(self.parameters[weight].shape[2:]))

    def _common_bias(self, sites: list[Site]) -> str | None:
        """Name the bias that a branch can hold: the same at all sites, and read by nothing else."""
        names = {site.bias for site in sites}
        bias = next(iter(names))
        if len(names) != 1 or bias is None or bias in self.counted or bias in self.overlapping:
            return None
        if any(bias in method.assigned or method.hides(bias) for method in self.methods.values()):
            return None
        readers = sum(len(method.consumers.get(bias, [])) for method in self.methods.values())
        return bias if readers == len(sites) else None

    def _described(self, site: Site | None, weight: str) -> Layer:
        tensor = self.parameters[weight]
        return Layer(
            name=weight if site is None else site.layer,
            kind="parameter" if site is None else site.kind,
            weight=weight,
            bias=None,
            weight_shape=tuple(tensor.shape),
            dtype_bits=8 * tensor.element_size(),
            names=self.parameters.names(weight),
        )

    def _named(self, name: str) -> Layer | None:
        """Describe any parameter as a layer of its own."""
        tensor = self.parameters[name]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            return None
        unread = not any(method.consumers.get(name) for method in self.methods.values())
        return replace(
            self._described(None, name),
            params=tensor.numel(),
            owner=self.counted.get(name),
            reason=self._weight_reason(name) or (ReasonCode.UNUSED if unread else None),
        )


def _key(site: Site) -> tuple[str, str]:
    return site.method, key_of(site.node)
