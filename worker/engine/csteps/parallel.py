"""Layers side by side: their C steps do not depend on each other (methods L.1).

Each layer is computed by one thread alone, so that the bits are the same whatever the number of workers is.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from typing import TypeVar

import torch

from worker.engine.csteps.batching import Batch, taking_part

Item = TypeVar("Item")
Made = TypeVar("Made")


def map_layers(
    function: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    workers: int | None = None,
    sizes: Sequence[int] | None = None,
    together: bool = False,
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
    together : bool
        All layers at once, whatever `workers` says, equal decompositions of theirs in one call: for a GPU.
    after : callable, optional
        Told in the calling thread how many layers are done, of how many, after each of them.
    """
    total = len(items)
    threads = min(workers if workers is not None else torch.get_num_threads(), total)
    order = sorted(range(total), key=lambda index: -sizes[index]) if sizes is not None else list(range(total))
    made: dict[int, Made] = {}
    batch = Batch(total) if together and total > 1 else None

    def one(index: int) -> Made:
        with torch.no_grad(), taking_part(batch, index) if batch is not None else nullcontext():
            return function(items[index])  # the gradient mode belongs to the thread

    def tell() -> None:
        if after is not None:
            after(len(made), total)

    with _one_thread_each():
        if batch is None and threads <= 1:
            for index in order:
                made[index] = one(index)
                tell()
        elif total > 0:
            with closing(_side_by_side(one, order, total if batch is not None else threads, batch)) as results:
                for index, result in results:
                    made[index] = result
                    tell()
    return [made[index] for index in range(total)]


def _side_by_side(
    one: Callable[[int], Made], order: Sequence[int], threads: int, batch: Batch | None
) -> Generator[tuple[int, Made], None, None]:
    """Give each result as it comes; whoever stops listening ends the rest."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="layer", initializer=torch.set_num_threads, initargs=(1,))
    begun: dict[Future[Made], int] = {}
    try:
        begun = {pool.submit(one, index): index for index in order}
        for future in as_completed(begun):
            yield begun[future], future.result()
    finally:
        for future in begun:
            if future.cancel() and batch is not None:
                batch.leave()  # in place of the call that will not be made
        pool.shutdown(wait=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
