"""How many threads one of several processes on a host should use, and work whose results do not depend on that."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores_per_rank() -> int:
    """The cores of this host that this process may run on, divided among the launcher's processes here; at least 1.

    Processes with more threads than cores between them wait for each other at every product.
    """
    # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; a single host may say WORLD_SIZE alone.
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    ranks = next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def one_thread_each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results of a function in order, each computed by one thread, as many of them at a time as torch has threads.

    Sums that several threads share are rounded otherwise than those of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which threads take over when they begin
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
