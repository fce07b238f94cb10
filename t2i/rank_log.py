"""A rank's own log, and what a process can tell of itself: how far it is, where, and what its threads do."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO

LAST_LINES = 5
"""Kept for the report of a rank's end."""
LINE_LENGTH = 300
"""Characters of a line that are kept for it."""
EARLY_LINES = 1000
"""Kept until there is a file."""

_OURS = tuple(f"{Path(__file__).parents[1] / name}{os.sep}" for name in ("t2i", "data_pipeline", "eval"))


class RankLog:
    """Copies what Python writes to standard output and error into a file, and keeps the last lines.

    Use as a context manager. There is no file before `open`, so that a mistake found early leaves nothing behind. What
    libraries write past Python (NCCL, gloo) is not in it. Of a progress bar only its last state gets there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: tuple[str, ...] = ()
        """The last lines. Replaced as a whole, so it is read without a lock, which a stuck writer might hold."""
        self._lock = threading.RLock()
        self._early: list[str] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Tee(sys.stdout, self), Tee(sys.stderr, self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._streams

    def open(self, title: str) -> None:
        """Begin the file, or go on in the one that an earlier process left. Raises OSError where that cannot be."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._file = open(self.path, "a", buffering=1, errors="backslashreplace")  # noqa: SIM115  (stays open)
            self._file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
            self._file.writelines(f"{line}\n" for line in self._early)

    def line(self, text: str) -> None:
        """Add a line. A log that cannot be written to (a full disk) does not end the run."""
        with self._lock:
            self.last = (*self.last, text[:LINE_LENGTH])[-LAST_LINES:]
            if self._file is None:
                self._early = [*self._early, text][-EARLY_LINES:]
                return
            try:
                self._file.write(f"{text}\n")
            except OSError as error:
                self._file = None
                os.write(2, f"{self.path} cannot be written to any more ({error})\n".encode())


class Tee:
    """A text stream that passes on everything and gives whole lines to a log as well."""

    def __init__(self, stream: TextIO, log: RankLog) -> None:
        self._stream, self._log, self._partial = stream, log, ""

    def write(self, text: str) -> int:
        count = self._stream.write(text)
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if kept := _overwritten(line):
                self._log.line(kept)
        # A bar that is drawn for hours must not fill the memory.
        self._partial = self._partial[max(0, self._partial.rfind("\r")) :]
        return count

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _overwritten(line: str) -> str:
    """What a terminal shows of a line in which carriage returns went back to its start."""
    return line.rstrip("\r").rpartition("\r")[2]


class Progress:
    """Where the training loop is, as it says itself; read by the monitor's thread."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` adds a line to the rank's log."""
        self.note = note
        self.done: int | None = None
        self.doing = ""
        self.signs = 0

    def step(self, number: int) -> None:
        """Step `number` is done."""
        self.done = number
        self.signs += 1

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """What happens inside is no step, and beginning and ending it are signs of life: saving, for example."""
        self.doing = doing
        self.signs += 1
        try:
            yield
        finally:
            self.doing = ""
            self.signs += 1


def place() -> tuple[str, bool]:
    """Where the main thread is, and whether that is inside torch or DeepSpeed: then it computes, or waits for others."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "nowhere", False
    libraries = tuple(
        f"{Path(file).parent}{os.sep}" for name in ("torch", "deepspeed") if (file := _file_of(sys.modules.get(name)))
    )
    waits = bool(libraries) and frame.f_code.co_filename.startswith(libraries)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_OURS):
        ours = ours.f_back
    if ours is None or ours is frame:
        return _frame(frame), waits
    return f"{_frame(ours)}, inside {_frame(frame)}", waits


def _file_of(module: Any) -> str | None:
    return getattr(module, "__file__", None)


def _frame(frame: FrameType) -> str:
    code = frame.f_code
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} ({code.co_name})"


def write_stacks(path: Path, title: str) -> None:
    """Add the stacks of all threads of this process to a file. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
