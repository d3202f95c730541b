from typing import Any

import pytest

from service.contract.term_words import size_in_words


@pytest.mark.parametrize(
    ("type_name", "units", "details", "words"),
    [
        ("low_rank", 5, {}, "rank 5"),
        ("low_rank", 5, {"scheme": "codebook", "values": [16, 8]}, "rank 5, factors of 16 and 8 values"),
        ("tucker2", 8, {"rank_out": 8, "rank_in": 4}, "ranks 8×4"),
        ("quantize", 4, {"scheme": "codebook", "values": 4}, "4 values"),
        ("prune", 2, {"kept": 2, "kept_fraction": 0.01}, "kept 1.0 %"),
        ("prune", 3, {"kept": 3, "kept_fraction": 0.15, "group": "filter"}, "kept 3 filters"),
        ("prune", 3, {}, "kept 3 weights"),
        ("fourier", 7, {}, "fourier 7"),
    ],
)
def test_sizes(type_name: str, units: int, details: dict[str, Any], words: str) -> None:
    assert size_in_words(type_name, units, details) == words
