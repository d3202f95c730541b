"""Additive sums and other rules on networks of the corpus."""

from dataclasses import dataclass
from typing import Any

from corpus_cases import Way

Terms = list[dict[str, Any]]


@dataclass(frozen=True)
class Sum:
    """Rules for a network, and the forms that the plan must show.

    Parameters
    ----------
    network : str
        Of the corpus.
    layers : list of dict
        The spec's rules.
    budget : dict or None
        Where the rules leave a size open.
    forms : set of str
        Forms of terms that some layer must have.
    file_fraction : float
        What is left of the file at most.
    way : "scripted", "traced" or "frozen"
    quick : bool
        Whether every run of the tests takes it.
    """

    network: str
    layers: Terms
    budget: dict[str, float] | None = None
    forms: frozenset[str] = frozenset()
    file_fraction: float = 1.0
    way: Way = "scripted"
    quick: bool = False


def _rule(*terms: dict[str, Any], match: str = "*", **more: Any) -> dict[str, Any]:
    return {"match": match, "terms": list(terms), **more}


def low_rank(reshape: Any = "matrix", **more: Any) -> dict[str, Any]:
    return {"type": "low_rank", "reshape": reshape, **more}


def quantize(scheme: str = "codebook", **more: Any) -> dict[str, Any]:
    return {"type": "quantize", "scheme": scheme, **more}


def prune(**more: Any) -> dict[str, Any]:
    return {"type": "prune", **more}


PARAMS = {"max_params_fraction": 0.4}
MACS = {"max_macs_fraction": 0.5}
BYTES = {"max_bytes_fraction": 0.3}
QUANTIZED = frozenset({"quantized"})
PRUNED = frozenset({"pruned"})
TUCKER2 = frozenset({"tucker2"})

SUMS: dict[str, Sum] = {
    # One term alone.
    "codebook": Sum(
        "lenet300", [_rule(quantize(values=4))], forms=QUANTIZED, file_fraction=0.15, way="traced", quick=True
    ),
    "codebook_by_bits_per_channel": Sum(
        "lenet5", [_rule(quantize(bits=3, per_channel=True))], forms=QUANTIZED, file_fraction=0.3
    ),
    "codebook_joint": Sum("lenet300", [_rule(quantize(values=3, joint=True))], forms=QUANTIZED, file_fraction=0.15),
    "codebook_unpacked_at_each_call": Sum(
        "lenet5", [_rule(quantize(values=16, unpack="call"))], forms=QUANTIZED, file_fraction=0.3
    ),
    "binary": Sum("vgg16", [_rule(quantize("binary"), kind="conv2d")], forms=QUANTIZED, file_fraction=0.5),
    "scaled_binary": Sum("lenet5", [_rule(quantize("scaled_binary"))], forms=QUANTIZED, file_fraction=0.1),
    "ternary": Sum("resnet20", [_rule(quantize("ternary"))], forms=QUANTIZED, file_fraction=0.4),
    "fixed_point": Sum("conv1d", [_rule(quantize("fixed_point", bits=4))], forms=QUANTIZED, file_fraction=0.6),
    "power_of_two": Sum("lenet300", [_rule(quantize("power_of_two", bits=4))], forms=QUANTIZED, file_fraction=0.2),
    "pruned": Sum("lenet300", [_rule(prune(keep_fraction=0.05))], forms=PRUNED, file_fraction=0.2, quick=True),
    "pruned_learned": Sum("lenet300", [_rule(prune())], BYTES, forms=PRUNED, file_fraction=0.32),
    "pruned_joint": Sum("lenet5", [_rule(prune(keep_fraction=0.1, joint=True))], forms=PRUNED, file_fraction=0.3),
    "pruned_l1": Sum("lenet300", [_rule(prune(norm="l1", keep_fraction=0.2))], forms=PRUNED),
    "pruned_penalty": Sum(
        "lenet300", [_rule(prune(norm="l1", form="penalty", alpha=0.1))], forms=PRUNED, file_fraction=0.5
    ),
    "pruned_filters": Sum("lenet5", [_rule(prune(group="filter"))], MACS, forms=PRUNED),
    "pruned_channels": Sum("resnet20", [_rule(prune(group="channel"))], MACS, forms=PRUNED, way="traced"),
    "tucker2": Sum("resnet20", [_rule({"type": "tucker2"}, kind="conv2d")], MACS, forms=TUCKER2),
    "tucker2_of_3d": Sum("conv3d", [_rule({"type": "tucker2", "ranks": [8, 8]}, match="conv2")], forms=TUCKER2),
    "kronecker": Sum("vit", [_rule(low_rank("kronecker"))], PARAMS, forms=frozenset({"kronecker"})),
    "best_reshape": Sum("lenet5", [_rule(low_rank("best"))], MACS),
    "half_precision_factors": Sum(
        "lenet5",
        [_rule(low_rank("channel", store_dtype="float16"), low_rank(store_dtype="float16"))],
        PARAMS,
        forms=frozenset({"matrix"}),
        file_fraction=0.3,
    ),
    "quantized_factors": Sum("lenet300", [_rule(low_rank(rank=20, then=quantize(values=16)))], file_fraction=0.1),
    "chunked": Sum(
        "lenet300",
        [
            _rule(low_rank("chunked")),
        ],
        PARAMS,
    ),
    "general_reshape": Sum(
        "lenet5",
        [
            _rule(
                low_rank({"view": [50, 20, 5, 5], "permute": [0, 2, 1, 3], "matrix": [250, 100]}, rank=4),
                match="conv2",
            )
        ],
    ),
    # Sums.
    "low_rank_and_sparse": Sum(
        "lenet300",
        [_rule(low_rank(rank=10), prune(keep_fraction=0.02))],
        forms=frozenset({"matrix", "pruned"}),
        file_fraction=0.25,
        quick=True,
    ),
    "quantized_and_a_few_corrections": Sum(
        "lenet300",
        [_rule(quantize(values=2), prune(keep_fraction=0.01))],
        forms=QUANTIZED | PRUNED,
        file_fraction=0.12,
    ),
    "quantized_and_low_rank": Sum(
        "lenet5",
        [_rule(quantize("ternary"), low_rank("channel", rank=2), low_rank(rank=2))],
        forms=QUANTIZED | {"matrix"},
        file_fraction=0.2,
        way="frozen",
    ),
    "three_terms": Sum(
        "lenet5",
        [_rule(quantize("scaled_binary"), low_rank("channel", rank=2), low_rank(rank=2), prune(keep_fraction=0.01))],
        forms=QUANTIZED | PRUNED | {"matrix"},
        file_fraction=0.2,
    ),
    "channel_and_spatial_and_sparse": Sum(
        "resnet20",
        [_rule(low_rank("channel"), low_rank("spatial"), prune(keep_fraction=0.01), kind="conv2d")],
        {"max_params_fraction": 0.6},
    ),
    "tucker2_and_channel": Sum("vgg16", [_rule({"type": "tucker2"}, low_rank("channel"), kind="conv2d")], MACS),
    "transposed_sum": Sum(
        "autoencoder",
        [_rule(low_rank("channel", rank=6), low_rank(rank=6), prune(keep_fraction=0.03))],
        forms=PRUNED,
        file_fraction=0.4,
    ),
    "quantized_everywhere": Sum(
        "text_encoder", [_rule(quantize(values=8))], forms=QUANTIZED, file_fraction=0.5, way="traced"
    ),
    "tied_and_quantized": Sum("gpt", [_rule(quantize(bits=4))], forms=QUANTIZED, file_fraction=0.5),
    "several_rules": Sum(
        "two_towers",
        [
            _rule(quantize(values=8), match="words"),
            _rule(low_rank("channel"), match="picture.*"),
            {"match": "topic", "keep": "dense"},
            _rule(low_rank()),
        ],
        {"max_bytes_fraction": 0.6},
        forms=QUANTIZED,
    ),
    # Parameters by their names.
    "parameter_low_rank": Sum(
        "lstm_tagger",
        [_rule(low_rank(rank=6), match="parameter:rnn.weight_ih_l*"), {"match": "*", "keep": "dense"}],
        forms=frozenset({"composed"}),
    ),
    "parameter_quantized": Sum(
        "gru_tagger",
        [_rule(quantize(values=8), match="parameter:rnn.weight_*"), {"match": "*", "keep": "dense"}],
        forms=QUANTIZED,
        file_fraction=0.7,
        way="traced",
    ),
    "parameter_of_a_layer": Sum(
        "lenet300",
        [_rule(low_rank(rank=8), match="parameter:fc1.weight"), {"match": "*", "keep": "dense"}],
        forms=frozenset({"composed"}),
        file_fraction=0.3,
    ),
    "parameter_of_no_layer": Sum(
        "addmm",
        [_rule(low_rank(rank=8), match="parameter:w*"), {"match": "*", "keep": "dense"}],
        forms=frozenset({"composed"}),
        way="traced",
    ),
}
