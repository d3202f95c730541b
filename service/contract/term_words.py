"""What a layer plan says of a term's size, in the term's own unit."""

from collections.abc import Mapping
from typing import Any


def size_in_words(type_name: str, units: int, details: Mapping[str, Any]) -> str:
    """A term's size for a reader: "rank 5", "ranks 8×4", "4 values", "kept 1.0 %", "kept 3 filters"."""
    if type_name == "low_rank":
        return f"rank {units}{_factors(details)}"
    if type_name == "tucker2":
        return f"ranks {details.get('rank_out', units)}×{details.get('rank_in', units)}"
    if type_name == "quantize":
        return f"{details.get('values', units)} values"
    if type_name == "prune":
        return _kept(units, details)
    return f"{type_name} {units}"  # of a package that adds terms


def _factors(details: Mapping[str, Any]) -> str:
    values = details.get("values")
    return f", factors of {' and '.join(str(each) for each in values)} values" if isinstance(values, list) else ""


def _kept(units: int, details: Mapping[str, Any]) -> str:
    share, group = details.get("kept_fraction"), details.get("group", "weight")
    return f"kept {units} {group}s" if share is None or group != "weight" else f"kept {100 * share:.1f} %"
