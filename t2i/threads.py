"""How many threads one of several processes on a host should use."""

import os


def cores_per_rank() -> int:
    """The cores of this host that this process may run on, divided among the launcher's processes here; at least 1.

    Processes with more threads than cores between them wait for each other at every product.
    """
    # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; a single host may say WORLD_SIZE alone.
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    ranks = next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)
    return max(1, len(os.sched_getaffinity(0)) // ranks)
