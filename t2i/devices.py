"""Which device a command runs on."""

import os

import torch


def find_device(device: torch.device | str) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1". Raises ValueError where this machine has none that computes."""
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()  # naming a device does not ask for it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); give cpu or one that can"
        ) from error
    return found


def choose_device(name: str | None = None) -> torch.device:
    """The device of a name; without one, the GPU of this process, or the processor. Raises ValueError as `find_device`."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return find_device(name)
