"""Methods by the type of their spec, found through the entry points ``rankpress.methods``."""

from functools import cache
from importlib.metadata import entry_points

from worker.engine.methods.context import Method

GROUP = "rankpress.methods"


@cache
def method_names() -> tuple[str, ...]:
    """Names of every installed method."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def method_for(name: str) -> Method:
    """Make the method of a name.

    Raises
    ------
    KeyError
        No installed package registers the name.
    """
    for point in entry_points(group=GROUP):
        if point.name == name:
            made: Method = point.load()()
            return made
    raise KeyError(name)
