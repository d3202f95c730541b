"""TorchScript out: the bytes of a file that holds only what the edited model still uses."""

import io
import re
import zipfile
from collections.abc import Iterator

import torch

from worker.engine.network.attributes import without_parameters
from worker.engine.network.graphs import attribute, attribute_chain, method_names, read_graph, self_value, walk
from worker.engine.network.load import reload
from worker.engine.network.parameters import all_parameters
from worker.engine.network.sites import MethodSites, scan_methods

_CLASS = re.compile(r"^class (\w+)\(Module\):$")
_ATTRIBUTE = re.compile(r'^  (?:(\w+) : |__annotations__\["([^"]+)"\] = )(.+)$')


def export_bytes(module: torch.jit.ScriptModule) -> bytes:
    """Save a model without the parameters that no method uses any more.

    Every method and every attribute of the root stays, with its name; parameters stay trainable, buffers go on being
    updated, and train and eval mode behave as before, because the module is frozen in train mode, which keeps every
    `training` flag a question asked at run time. Where torch cannot freeze a model (it picks a module by a computed
    index, or attributes overlap), or would lose what it uses (in a `fork`), its structure is kept whole and the unused
    parameters are emptied instead, so that their names stay with zero elements.

    The same input gives the same bytes in a fresh process with the same `PYTHONHASHSEED`; within one process type names
    are numbered on, so two exports can differ.

    Parameters
    ----------
    module : torch.jit.ScriptModule
        The model, on any device; it stays as it is.

    Returns
    -------
    bytes
        A TorchScript file with CPU tensors that stock torch loads.
    """
    copy = reload(module, "cpu")
    flags = {name: getattr(submodule, "training", False) for name, submodule in copy.named_modules()}
    try:
        frozen = None if _hands_on(copy) else _freeze(copy.train())
    except RuntimeError:
        frozen = None
    exported = frozen if frozen is not None else reload(module, "cpu")
    emptied = _empty_unused_parameters(exported)
    if frozen is not None:
        exported = without_parameters(frozen, emptied)
    for name, submodule in exported.named_modules():
        if submodule._c.hasattr("training"):
            submodule.training = flags[name]
    return _saved(exported)


def _hands_on(module: torch.jit.ScriptModule) -> bool:
    """Tell whether a method hands submodules on whole."""
    return any(method.opaque for method in _scanned(module).values())


def _scanned(module: torch.jit.ScriptModule) -> dict[str, MethodSites]:
    return scan_methods(module, {name: read_graph(module, name) for name in method_names(module)})


def _saved(module: torch.jit.ScriptModule) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def _freeze(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    preserved = dict.fromkeys([*method_names(module), *_values_to_keep(module)])
    # Freezing inlines calls inside called code only while the executor may optimise; see `inline_calls`.
    with torch.jit.optimized_execution(True):  # type: ignore[attr-defined]
        frozen = torch._C._freeze_module(module._c, list(preserved), True, True)
    wrapped: torch.jit.ScriptModule = torch.jit._recursive.wrap_cpp_module(frozen)  # type: ignore[no-untyped-call]
    return wrapped


def _values_to_keep(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Name the attributes that freezing would drop or fold although somebody needs them.

    Buffers stay, used or not, and the root's plain values, because users read them. Tensors in attributes of
    submodules that are neither parameters nor buffers (the weight lists of recurrent layers are such) would become
    constants: no longer trained, and left behind when the module moves to another device.
    """
    declared = _declared_attributes(_saved(module))
    used = _used_chains(module)
    parameters = all_parameters(module)
    known = {*parameters, *(name for name, _ in module.named_buffers())}
    yield from (name for name, _ in module.named_buffers())
    for prefix, submodule in module.named_modules():
        for name, kind in declared.get(submodule._c._type().qualified_name(), {}).items():
            chain = f"{prefix}.{name}" if prefix else name
            if kind.startswith("__torch__") or not submodule._c.hasattr(name):
                continue
            if not prefix:
                if name not in parameters or name in used:
                    yield name
            elif "Tensor" in kind and chain in used and chain not in known:
                yield chain
                yield from _members(attribute(module, chain), parameters)


def _members(held: object, parameters: dict[str, torch.Tensor]) -> list[str]:
    """Name the parameters that an attribute holds a second time in a list."""
    members = {item.data_ptr() for item in held if isinstance(item, torch.Tensor)} if isinstance(held, list) else set()
    return [name for name, tensor in parameters.items() if tensor.data_ptr() in members]


def _declared_attributes(archive: bytes) -> dict[str, dict[str, str]]:
    """Read, for each module class in a file that torch has written, its attributes' names and types.

    The compiled module has no way to list them. Keys are qualified class names.
    """
    classes: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        for path in opened.namelist():
            inside = path.partition("/code/")[2]
            if not inside.endswith(".py"):
                continue
            package = inside.removesuffix(".py").replace("/", ".")
            current: dict[str, str] | None = None
            for line in opened.read(path).decode().splitlines():
                if line and not line.startswith(" "):
                    match = _CLASS.match(line)
                    current = classes.setdefault(f"{package}.{match[1]}", {}) if match else None
                elif current is not None and (found := _ATTRIBUTE.match(line)):
                    current[found[1] or found[2]] = found[3]
    return classes


def _used_chains(module: torch.jit.ScriptModule) -> set[str]:
    """Name every attribute that some method of the root reaches."""
    used: set[str] = set()
    for method in method_names(module):
        graph = read_graph(module, method)
        root = self_value(graph)
        chains = (attribute_chain(node.output(), root) for node in walk(graph) if node.kind() == "prim::GetAttr")
        used.update(chain for chain in chains if chain is not None)
    return used


def _empty_unused_parameters(module: torch.jit.ScriptModule) -> list[str]:
    """Empty what no method reaches, by its own name or by another, in a list or in a submodule that is handed on."""
    emptied: list[str] = []
    parameters = all_parameters(module)
    used = _used_chains(module)
    held = [value for chain in used if isinstance(value := attribute(module, chain), list)]
    used.update(name for values in held for name in _members(values, parameters))
    methods = _scanned(module).values()
    used.update(name for name in parameters if any(method.hides(name) for method in methods))
    kept = {parameters[name].data_ptr() for name in used if name in parameters}
    for name, tensor in parameters.items():
        if name not in used and tensor.data_ptr() not in kept:
            tensor.data = tensor.data.new_empty(0)
            emptied.append(name)
    return emptied
