"""Methods by the type of their spec, found through the entry points ``rankpress.methods``."""

from importlib import import_module

from service.contract.method_specs import method_specs
from worker.engine.methods.context import Method


def method_for(name: str) -> Method:
    """Make the method of a type.

    Raises
    ------
    KeyError
        No installed package registers the type.
    """
    module, _, found = method_specs()[name].engine.partition(":")
    made: Method = getattr(import_module(module), found)()
    return made
