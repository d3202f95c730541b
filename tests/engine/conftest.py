from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks are slower on several threads, and bits repeat only at a fixed number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_executor() -> Iterator[None]:
    """The executor as a child sets it: the same operators at every call."""
    torch._C._set_graph_executor_optimize(False)
    yield
    torch._C._set_graph_executor_optimize(True)
