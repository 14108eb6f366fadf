"""Work in chunks on a pool of threads, each running torch with one thread.

torch's own threading changes sums and products with the number of threads. Chunks whose size does not depend on
that number, results taken in chunk order and one torch thread a chunk give the same bits on 1 thread and on 8.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TypeVar

import torch

# Of glibc's malloc.h.
_ARENA_MAX = -8
T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Runs torch with one thread inside, and restores the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def few_heaps() -> None:
    """Makes glibc's allocator share two heaps among all threads that it has not given one yet.

    By default every thread gets a heap of its own, up to eight for each processor, and each keeps what its threads have
    freed: hundreds of megabytes where dozens of threads take turns. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


class Pool:
    """A pool of `threads` workers whose results come back in the order of the work."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._executor = ThreadPoolExecutor(self.threads, "quantize", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields `function(item)` in order, at most `threads + 1` items ahead of the consumer."""
        waiting: list[Future[R]] = []
        iterator = iter(items)
        try:
            waiting += [self._executor.submit(function, item) for item in islice(iterator, self.threads + 1)]
            while waiting:
                done = waiting.pop(0).result()
                waiting += [self._executor.submit(function, item) for item in islice(iterator, 1)]
                yield done
        finally:
            for future in waiting:
                future.cancel()

    def spans(self, total: int, size: int) -> list[tuple[int, int]]:
        """Returns the chunks of about `size` in which work on `total` rows that share nothing suits this pool."""
        return spans(total, size)


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """Returns `(start, stop)` of the chunks of `size` that cover `0 .. total`."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]
