"""Terms by the type of their spec, found through the entry points ``rankpress.terms``."""

from functools import cache
from importlib import import_module

from service.contract.term_specs import term_specs
from worker.engine.forms.term import Term


@cache
def term_class(type_name: str) -> type[Term]:
    """Load the compression of a term type.

    Raises
    ------
    KeyError
        No installed package registers the type.
    """
    module, _, name = term_specs()[type_name].engine.partition(":")
    loaded: type[Term] = getattr(import_module(module), name)
    return loaded
