"""Timing several ways to do one thing: alternately in one process, with their memory, under a header that says where."""

import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def environment(device: torch.device) -> dict[str, Any]:
    """What a timing depends on beside the code: hardware, threads, versions, date."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


class PeakMemory:
    """The most memory that the process, or a GPU, has held inside, and held on entering: bytes, or None where the system
    does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak: int | None = None
        self.before: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
        else:
            try:
                ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so as not to count as held
                _CLEAR.write_text("5")  # the peak starts anew, from what is held now
                self.before = _resident("VmRSS")
            except (OSError, AttributeError):  # another system, or one that does not let us
                self.before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        elif self.before is not None:
            self.peak = _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition, the peak of memory in the first, and what was held before; bytes."""

    seconds: tuple[float, ...]
    peak: int | None
    before: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def extra(self) -> int | None:
        """Memory beyond what was held before."""
        return None if self.peak is None or self.before is None else self.peak - self.before


def alternate(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    label: str,
    reset: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Run all variants `repeats` times in turn, the caller having run each once to warm up, and `reset` before each.

    In turn, so that a machine that slows down for a while slows all of them.
    """
    memory = {name: PeakMemory(device) for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}

    def timed(name: str) -> None:
        synchronize(device)
        begun = time.perf_counter()
        variants[name]()
        synchronize(device)
        seconds[name].append(time.perf_counter() - begun)

    with tqdm(total=repeats * len(variants), desc=label, unit="run", leave=False) as bar:
        for repeat in range(repeats):
            for name in variants:
                reset()
                if repeat == 0:
                    with memory[name]:
                        timed(name)
                else:
                    timed(name)
                bar.update()
    return {name: Timing(tuple(seconds[name]), memory[name].peak, memory[name].before) for name in variants}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mebibytes(size: int | None) -> str:
    """Bytes for a table."""
    return "-" if size is None else f"{size / 2**20:,.0f}"


def report(
    title: str, header: Mapping[str, Any], rows: Sequence[Any], columns: Mapping[str, Callable[[Any], str]]
) -> None:
    """Print a header and one table: a line for each row, a column for each entry of `columns`."""
    console = Console()
    console.width = max(console.width, 180)  # a table in a log file is not folded
    console.print(f"{title}: " + ", ".join(f"{name} {value}" for name, value in header.items()), highlight=False)
    table = Table()
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)


def as_json(header: Mapping[str, Any], rows: Sequence[Any], **tables: Sequence[Any]) -> str:
    """The same for machines, with further tables if there are any: seconds, bytes and counts as they are."""
    every = {"rows": rows, **tables}
    return json.dumps(
        {"header": dict(header)} | {name: [asdict(row) for row in every[name]] for name in every}, indent=2
    )
