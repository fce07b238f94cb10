"""Writes a checkpoint's files while training goes on.

DeepSpeed hands every file that it saves to its "checkpoint engine". This one copies what it is given to the memory of the
processor, which is all that a step waits for, and writes the copies in a thread. A file is whole or not there; what goes
wrong is kept for whoever asks, and nothing is written after it.
"""

import copy
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.atomic import replacing
from t2i.zero_shards import load_saved


class CheckpointWriter:
    """DeepSpeed's checkpoint engine (`deepspeed.runtime.checkpoint_engine.CheckpointEngine`), by its methods.

    `background`: write in a thread, from copies; otherwise `save` returns when the file is there.
    """

    def __init__(self, background: bool) -> None:
        self.name = "background"
        self.background = background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: list[Future[None]] = []
        self._error: Exception | None = None

    # What DeepSpeed calls

    def create(self, info: Any) -> None:
        """A checkpoint begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; in here, since only one rank does, and the others would wait for it if it gave up."""
        self._attempt(partial(os.makedirs, path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, now or in the thread; errors are kept."""
        if self.background:
            self.submit(partial(_write, plain(state_dict, copied=True), Path(path)))
        else:
            self._attempt(partial(_write, plain(state_dict, copied=False), Path(path)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file back, to the processor."""
        # Not mapped: an optimizer may keep the tensors that it is given, and the file will be removed one day.
        return load_saved(Path(path), mapped=False)

    def commit(self, info: Any) -> bool:
        """All files have been handed over."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this rank writes what all have."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed is to ask when it is done; `t2i.checkpoint` asks."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether views would be written with all that they are views of; copies hold only themselves."""
        return not self.background

    def cleanup(self) -> None:
        """Nothing is kept open."""

    # What `t2i.checkpoint` asks

    def submit(self, action: Callable[[], None]) -> None:
        """Do something in the thread, behind what is being written, unless that fails."""
        self._writing.append(self._pool.submit(self._attempt, action))

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether files are still being written."""
        self._writing = [future for future in self._writing if not future.done()]
        return bool(self._writing)

    def wait(self) -> None:
        """Until all files are written, or one could not be."""
        for future in self._writing:
            future.result()
        self._writing = []

    def take_error(self) -> Exception | None:
        """What went wrong since the last call, if anything did; then files are written again."""
        error, self._error = self._error, None
        return error

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._error is not None:
            return
        try:
            action()
        except Exception as error:  # whatever it is, the run has to hear of it on all ranks
            self._error = error


def plain(value: Any, copied: bool) -> Any:
    """A state as it is to be written: members of enumerations as their values, which are read back without running code
    (Python 3.11.2 pickles them as a call of getattr).

    `copied`: tensors, each alone, in the processor's memory, and copies of whatever else may change while it is written,
    such as the scale of an fp16 loss.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) if copied else value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return type(value)((key, plain(item, copied)) for key, item in value.items())
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(plain(item, copied) for item in value)
    return copy.deepcopy(value) if copied else value


def _write(state: Any, path: Path) -> None:
    with replacing(path) as stream:
        watched = _Watched(stream)
        try:
            torch.save(state, watched)  # type: ignore[arg-type]
        except Exception:
            # torch says no more than that a record has not the length it should.
            if watched.error is not None:
                raise watched.error from None
            raise


class _Watched:
    """A stream that remembers why it could not be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._stream.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError where the file system of a folder has not so many bytes left, less than which no checkpoint fits."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:,.0f} MiB left and a checkpoint takes {needed / 2**20:,.0f} MiB; make room, or set "
            "train.keep_last lower"
        )
