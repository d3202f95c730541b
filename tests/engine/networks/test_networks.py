"""Every network of the corpus, by every way into TorchScript: compressed, and used where only PyTorch is."""

from pathlib import Path

import pytest
from corpus_cases import CASES, Case, Way
from corpus_harness import FreshTorch, check_fresh, check_plan, prepare, run_case

pytestmark = pytest.mark.usefixtures("plain_executor")

ALL = [(name, way) for name, case in CASES.items() for way in case.ways]
QUICK = [(name, way) for name, way in ALL if way in CASES[name].quick]


def _compress_and_use(case: Case, way: Way, folder: Path, fresh: FreshTorch) -> None:
    model, data = prepare(folder, case, way)
    made = run_case(folder, model, data, case)
    check_plan(made, case)
    check_fresh(made, case, fresh)


@pytest.mark.parametrize(("name", "way"), QUICK)
def test_a_few_networks(name: str, way: Way, tmp_path: Path, fresh: FreshTorch) -> None:
    _compress_and_use(CASES[name], way, tmp_path, fresh)


@pytest.mark.networks
@pytest.mark.parametrize(("name", "way"), [one for one in ALL if one not in QUICK])
def test_the_corpus(name: str, way: Way, tmp_path: Path, fresh: FreshTorch) -> None:
    _compress_and_use(CASES[name], way, tmp_path, fresh)
