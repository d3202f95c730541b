"""What every benchmark ends with: a table, a run added to its JSON file, one last line, and an exit code."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("rankpress", "torch", "numpy", "uvicorn", "h11", "sqlalchemy", "celery")


@dataclass(frozen=True)
class Limit:
    """A measured value and the bound that it must keep: at most, unless `at_least`."""

    name: str
    measured: float
    bound: float
    unit: str = ""
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether the value keeps its bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        side = "at least" if self.at_least else "at most"
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.name} {self.measured:.3f}{unit} ({side} {self.bound:g}{unit}: {'kept' if self.kept else 'MISSED'})"
        )


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    name: str
    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        """Their median."""
        return median(self.values)


def conclude(
    name: str, samples: Sequence[Sample], limits: Sequence[Limit], *, quick: bool, facts: dict[str, Any], folder: Path
) -> int:
    """Show and record a run; returns the exit code, 1 when a limit is missed."""
    console = Console()
    console.print(_table(name, samples, quick=quick))
    run = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "figures": {
            sample.name: {"unit": sample.unit, "median": sample.median, "values": list(sample.values)}
            for sample in samples
        },
        "limits": [asdict(limit) | {"kept": limit.kept} for limit in limits],
        "facts": facts,
        "machine": machine_facts(),
    }
    path = add_run(folder, name, run)
    console.print(f"added to {path}", soft_wrap=True)
    console.print("; ".join(str(limit) for limit in limits), soft_wrap=True, highlight=False)
    return 0 if all(limit.kept for limit in limits) else 1


def add_run(folder: Path, name: str, run: dict[str, Any]) -> Path:
    """Add a run to the benchmark's file; toy runs have a file of their own, which git ignores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{'.local' if run['quick'] else ''}.json"
    content: dict[str, Any] = {"benchmark": name, "runs": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["runs"].append(run)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine_facts() -> dict[str, Any]:
    """The machine, its load, and the versions that the figures hang on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3, 1),
        "kernel": platform.release(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def say(text: str) -> None:
    """Tell what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def _table(name: str, samples: Sequence[Sample], *, quick: bool) -> Table:
    table = Table(title=f"benchmarks.{name}{' (toy size: the figures mean nothing)' if quick else ''}")
    table.add_column("what")
    for heading in ("unit", "runs", "median", "least", "most"):
        table.add_column(heading, justify="right")
    for sample in samples:
        figures = (f"{value:.4g}" for value in (sample.median, min(sample.values), max(sample.values)))
        table.add_row(sample.name, sample.unit, str(len(sample.values)), *figures)
    return table


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
