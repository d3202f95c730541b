"""A job's outcome as JUnit XML, for continuous integration."""

from pathlib import Path
from xml.etree import ElementTree as ET

from service.cli.exits import ExitCode
from service.cli.outcome import Outcome
from service.contract.report import Report

_SUITE = "rankpress"


def write_junit(path: Path, outcome: Outcome) -> None:
    """Write the suite; its cases fail exactly where the command's exit code is not 0."""
    cases = _cases(outcome)
    suite = ET.Element("testsuite", name=_SUITE, tests=str(len(cases)), time=f"{outcome.seconds:.3f}")
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(case.find(kind) is not None for case in cases)))
    suite.extend(cases)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _cases(outcome: Outcome) -> list[ET.Element]:
    names = ("job succeeded", "budget met", "artifact verified", "difference measured")
    cases = {name: ET.Element("testcase", classname=f"{_SUITE}.{outcome.label}", name=name) for name in names}
    cases["job succeeded"].set("time", f"{outcome.seconds:.3f}")
    failed = _failed_case(outcome)
    for name, case in cases.items():
        if failed is not None and name == failed:
            _mark(case, outcome)
        elif failed is not None and (outcome.report is None or names.index(name) > names.index(failed)):
            ET.SubElement(case, "skipped", message="the job did not come this far")
        elif outcome.report is not None:
            ET.SubElement(case, "system-out").text = _measured(name, outcome, outcome.report)
    return list(cases.values())


def _failed_case(outcome: Outcome) -> str | None:
    if outcome.exit_code is ExitCode.DONE:
        return None
    if outcome.exit_code is ExitCode.BUDGET_MISSED:
        return "budget met"
    return "job succeeded" if outcome.report is None else "artifact verified"


def _mark(case: ET.Element, outcome: Outcome) -> None:
    away = outcome.exit_code in {ExitCode.SERVICE_AWAY, ExitCode.USAGE}
    code, detail = (
        (outcome.problem.code.value, outcome.problem.detail)
        if outcome.problem
        else ("CANCELED", "the job was canceled before it was done")
    )
    ET.SubElement(case, "error" if away else "failure", type=code, message=detail).text = f"{code}: {detail}"


def _measured(name: str, outcome: Outcome, report: Report) -> str:
    if name == "budget met":
        budget = report.budget
        return "no budget" if budget is None else f"{budget.reached} of at most {budget.limit} {budget.metric}"
    if name == "artifact verified":
        largest = report.fidelity.max_abs_difference_to_trained
        return f"SHA-256 {outcome.sha256}; largest output difference to the trained network {largest:.3g}"
    if name == "difference measured":
        lines = [
            f"{item.name}: {item.difference:+.6g} in [{item.low:+.6g}, {item.high:+.6g}], n = {item.samples}"
            for item in report.differences
        ]
        return "\n".join(lines) or "no scores: the job had no data"
    return f"params {report.params_fraction:.4f}, MACs {report.macs_fraction:.4f} of the reference"
