from collections.abc import Iterator

import pytest
from corpus_harness import FreshTorch


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshTorch]:
    """One process of stock PyTorch for all artifacts."""
    process = FreshTorch()
    yield process
    process.close()
