"""Work done in threads before its results are asked for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 4
"""Threads."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def done_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """What a function makes of each item, in order, at most `ahead` of them before they are asked for. Raises as it does."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # who stops early does not wait for the rest
            for future in waiting:
                future.cancel()
