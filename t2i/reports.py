"""What a run says of itself every `log_every` steps: losses, rates, waiting, memory, time left."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from t2i.costs import peak_of


class Window:
    """Steps since the last report: their losses, what they computed, and how their time went."""

    def __init__(self, waited: Callable[[], float]) -> None:
        """`waited`: seconds that have been spent waiting for data since the run began."""
        self._total_waited = waited
        self._begun, self._waited = time.perf_counter(), waited()
        self.losses: list[float] = []
        self.steps = 0
        self.flops = 0

    def add(self, loss: float | None, flops: int) -> None:
        """Count a step, of this loss, None where it was left out, and of so many of the model's FLOPs on this rank."""
        self.steps += 1
        self.flops += flops
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


def device_peak(device: torch.device, dtype: torch.dtype, given: float | None = None) -> float:
    """Peak FLOP/s of products in a dtype: that `given` in TFLOP/s; or that of a GPU's data sheet, for bf16 and fp16, if it is
    known; else the most that large products reach here. Ranks that share a processor have to measure at the same time."""
    if given is not None:
        return given * 1e12
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        peak = peak_of(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few products of squares in a dtype, a tenth of a second's work or so."""
    side = 8192 if device.type == "cuda" else 1024
    left, right, out = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    seconds = []
    for _ in range(4):  # the first warms up
        _wait(device)
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
