"""The options that the benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.outcome import RESULTS


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--results`."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    made.add_argument("--quick", action="store_true", help="toy size: shows that it runs, measures nothing")
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    return made
