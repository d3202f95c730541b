"""What a finished job's report looks like in a terminal."""

from collections.abc import Sequence

from service.cli.tables import count, percent, table
from service.contract.plan import Form, LayerPlan, RankRow, TermPlan
from service.contract.report import LATENCY_SLOWER_RATIO, Measured, PairedDifference, Report, Verdict

_SHARES = frozenset({"accuracy", "top5", "agreement"})
_VERDICTS: dict[Verdict, str] = {"better": "better", "worse": "worse", "unclear": "no clear difference"}
_STAY_NOTE = "\n(stay): the dense operator uses a weight that is composed from its parts, so its multiply-adds stay"


def report_text(report: Report) -> str:
    """The reference against the compressed network, the layer plan, and the warnings."""
    parts = [comparison(report), layer_table(report.layers)]
    if report.budget is not None:
        budget = report.budget
        parts.insert(
            1,
            f"budget: at most {count(budget.limit)} {budget.metric} ({percent(budget.fraction_limit)}); "
            f"reached {count(budget.reached)} ({percent(budget.fraction_reached)})",
        )
    warnings = [f"warning: {item.code}: {item.message}" for item in report.warnings]
    parts.extend(["\n".join(warnings)] if warnings else [])
    return "\n\n".join(part for part in parts if part)


def comparison(report: Report) -> str:
    """The table of sizes, scores and times."""
    reference, compressed = report.reference, report.compressed
    rows = [
        ("params", count(reference.params), count(compressed.params), percent(report.params_fraction)),
        ("MACs", count(reference.macs), count(compressed.macs), percent(report.macs_fraction)),
        ("file bytes", count(reference.file_bytes), count(compressed.file_bytes), percent(report.file_bytes_fraction)),
        *_scores(report),
        *_latencies(reference, compressed),
    ]
    return table(("", "reference", "compressed", "compressed / reference"), rows, right=frozenset({1, 2}))


def _scores(report: Report) -> list[tuple[str, str, str, str]]:
    differences = {item.name: item for item in report.differences}
    scores = [(report.metric_name, report.reference.metric, report.compressed.metric)]
    if report.metric_name != "loss" and report.compressed.loss != report.compressed.metric:  # else it is the loss
        scores.append(("loss", report.reference.loss, report.compressed.loss))
    if "agreement" in differences:
        scores.append(("agreement", 1.0, 1.0 + differences["agreement"].difference))
    return [
        (name, _score(name, before), _score(name, after), _interval(differences[name]) if name in differences else "")
        for name, before, after in scores
        if name is not None and after is not None
    ]


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if name in _SHARES else f"{value:.5g}"


def _interval(item: PairedDifference) -> str:
    scale, unit, digits = (100.0, " points", ".2f") if item.name in _SHARES else (1.0, "", ".4g")
    difference, low, high = (f"{scale * value:+{digits}}" for value in (item.difference, item.low, item.high))
    units = f" in groups of {item.unit_samples}" if item.unit_samples > 1 else ""
    verdict = "" if item.verdict is None else f": {_VERDICTS[item.verdict]}"
    return f"{difference}{unit}  [{low}, {high}] at {100 * item.confidence:.0f} %, n = {item.samples}{units}{verdict}"


def _latencies(reference: Measured, compressed: Measured) -> list[tuple[str, str, str, str]]:
    after = {item.batch_size: item.median_ms for item in compressed.latencies}
    rows = []
    for item in reference.latencies:
        if item.batch_size in after:
            now = after[item.batch_size]
            slower = "  slower than the reference" if now > LATENCY_SLOWER_RATIO * item.median_ms else ""
            ratio = percent(now / item.median_ms) if item.median_ms > 0 else "–"
            rows.append(
                (f"latency, batch {item.batch_size}", f"{item.median_ms:.3f} ms", f"{now:.3f} ms", ratio + slower)
            )
    return rows


def layer_table(layers: Sequence[LayerPlan]) -> str:
    """One line per layer: what it became, of which size, cost and error, or why it stayed dense."""
    rows = [
        (
            layer.name,
            layer.kind,
            layer.form.value,
            terms_text(layer),
            count(layer.macs),
            count(layer.compressed_macs) + (" (stay)" if _stay(layer) else ""),
            "–" if layer.compressed_bits is None else count(-(-layer.compressed_bits // 8)),
            f"{layer.relative_error:.2g}" if layer.form is not Form.DENSE else "–",
            layer.reason.value if layer.reason else "",
        )
        for layer in layers
    ]
    head = ("layer", "kind", "form", "terms", "MACs before", "MACs after", "bytes", "error", "reason")
    note = _STAY_NOTE if any(_stay(layer) for layer in layers) else ""
    return table(head, rows, right=frozenset({4, 5, 6, 7})) + note if rows else ""


def terms_text(layer: LayerPlan) -> str:
    """The sizes of the terms that stand, each in its own unit, with their forms where there are several."""
    terms = _kept(layer)
    if len(terms) == 1:
        return _size(terms[0])
    return " + ".join(f"{term.form.value} {_size(term)}" for term in terms) or "–"


def _kept(layer: LayerPlan) -> list[TermPlan]:
    return [] if layer.form is Form.DENSE else [term for term in layer.terms if term.rank]


def _stay(layer: LayerPlan) -> bool:
    return any(term.macs_stay for term in _kept(layer))


def _size(term: TermPlan) -> str:
    """Say a term's size, as the service put it or, of an older one, by its rank."""
    return term.summary or f"rank {term.rank}"


def history_table(rows: Sequence[RankRow]) -> str:
    """Every rank configuration that stood, in the order of the C steps."""
    lines = [
        (
            str(row.step),
            row.layer,
            str(row.term),
            row.type,
            row.form.value,
            "–" if row.rank is None else str(row.rank),
            count(row.params),
            count(row.macs),
            f"{row.relative_error:.2g}",
            "chosen" if row.chosen else "",
        )
        for row in rows
    ]
    head = ("step", "layer", "term", "type", "form", "rank", "params", "MACs", "error", "")
    return table(head, lines, right=frozenset({0, 5, 6, 7, 8}))
