"""Layers side by side: their C steps do not depend on each other (methods L.1).

Each layer is computed by one thread alone, so that the bits are the same whatever the number of workers is.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def map_layers(
    function: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    sizes: Sequence[int] | None = None,
    after: Callable[[int, int], None] | None = None,
) -> list[Made]:
    """Call a function for every layer and return what it made, in the layers' order.

    The calls run without gradients. An exception of a call, or of `after`, ends the rest: calls that have not begun
    are dropped, those under way are waited for.

    Parameters
    ----------
    function : callable
        Reads what it shares with other calls and writes none of it.
    items : sequence
        One for each layer.
    workers : int, optional
        Threads; as many as PyTorch may use by default.
    sizes : sequence of int, optional
        How much work each layer is, in any unit: the largest are begun first.
    after : callable, optional
        Told in the calling thread how many layers are done, of how many, after each of them.
    """
    total = len(items)
    threads = min(workers if workers is not None else torch.get_num_threads(), total)
    order = sorted(range(total), key=lambda index: -sizes[index]) if sizes is not None else list(range(total))
    made: dict[int, Made] = {}
    with _one_thread_each():
        if threads <= 1:
            for index in order:
                made[index] = _without_gradients(function, items[index])
                if after is not None:
                    after(len(made), total)
        else:
            _side_by_side(function, items, order, threads, made, after)
    return [made[index] for index in range(total)]


def _side_by_side(
    function: Callable[[Item], Made],
    items: Sequence[Item],
    order: Sequence[int],
    threads: int,
    made: dict[int, Made],
    after: Callable[[int, int], None] | None,
) -> None:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="layer", initializer=torch.set_num_threads, initargs=(1,))
    try:
        begun: dict[Future[Made], int] = {
            pool.submit(_without_gradients, function, items[index]): index for index in order
        }
        for future in as_completed(begun):
            made[begun[future]] = future.result()
            if after is not None:
                after(len(made), len(items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _without_gradients(function: Callable[[Item], Made], item: Item) -> Made:
    with torch.no_grad():  # the mode belongs to the thread
        return function(item)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
