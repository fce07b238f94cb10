"""What a run says of itself every `log_every` steps: losses, rates, waiting, memory, time left."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch


class Window:
    """Steps since the last report: their losses, and how their time went."""

    def __init__(self, waited: Callable[[], float]) -> None:
        """`waited`: seconds that have been spent waiting for data since the run began."""
        self._total_waited = waited
        self._begun, self._waited = time.perf_counter(), waited()
        self.losses: list[float] = []
        self.steps = 0

    def add(self, loss: float | None) -> None:
        """Count a step, of this loss; None where it was left out."""
        self.steps += 1
        if loss is not None:
            self.losses.append(loss)

    def mean_loss(self) -> float | None:
        """Mean loss of the steps that were taken, None where none was."""
        return statistics.fmean(self.losses) if self.losses else None

    def seconds(self) -> float:
        """Seconds since the last report, without those of `paused`."""
        return time.perf_counter() - self._begun

    def waited(self) -> float:
        """Seconds of them that were spent waiting for data."""
        return self._total_waited() - self._waited

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the window's rates."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun


def peak_memory(device: torch.device) -> float:
    """GiB that this process, or its GPU, has held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Kilobytes, but on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
