"""Where the numbers of a run go: `metrics.jsonl` in its folder, and wandb."""

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_pipeline.atomic import write_bytes
from t2i.config import Recipe, to_json


class Rows:
    """A file of JSON rows, each with a "step", that goes on from a step; later rows are removed first.

    Such rows, and a last line that is cut off, are left by a run that was killed; without this, steps would be there twice.
    A row that cannot be written, for want of space for example, is kept and written with the next one that can.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept, self.last_step = [], 0
        """`last_step`: the last one that was there, of the removed rows too."""
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), start=1):
            row = _row(line)
            if row is None:
                if line.endswith(b"\n"):
                    print(f"{path}, line {number} is damaged and left out", file=sys.stderr)
                continue
            self.last_step = max(self.last_step, row["step"])
            if row["step"] <= step:
                kept.append(line)
        self.kept = [row for line in kept if (row := _row(line)) is not None]
        """The rows that were there and stay."""
        write_bytes(path, b"".join(kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._size = self._file.tell()
        self._waiting: list[bytes] = []
        self._warned = False

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, and those that are waiting."""
        self._waiting.append(json.dumps(row).encode() + b"\n")
        data = b"".join(self._waiting)
        try:
            while written := self._file.write(data):
                data = data[written:]
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)  # no half lines
            if not self._warned:
                print(f"\n{self.path} cannot be written ({error}); its rows wait for the next time", file=sys.stderr)
            self._warned = True
            return
        self._size += sum(map(len, self._waiting))
        self._waiting.clear()
        self._warned = False

    def close(self) -> None:
        """Rows that are still waiting are lost, which is said."""
        self._file.close()
        if self._waiting:
            print(f"{self.path}: {len(self._waiting)} rows could not be written", file=sys.stderr)


def _row(line: bytes) -> dict[str, Any] | None:
    """A row, None for what is none."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class MetricsLog:
    """Writes rows of one run, from the step that it resumes at; use as a context manager.

    Rows after that step, left by a run that was cut off, are removed first, so that no step is there twice.
    """

    def __init__(self, recipe: Recipe, step: int, enabled: bool) -> None:
        self.recipe, self.step, self.enabled = recipe, step, enabled
        self._wandb: Any = None
        self._sent = 0
        """Step up to which wandb has everything."""

    @property
    def path(self) -> Path:
        return self.recipe.run_dir / "metrics.jsonl"

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        self._rows = Rows(self.path, self.step)
        mode = self.recipe.train.wandb
        if mode != "disabled":
            self._start_wandb("online" if mode == "auto" and os.environ.get("WANDB_API_KEY") else mode)
        return self

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Rows that an earlier process of the run has written, up to the step that this one goes on from."""
        return self._rows.kept if self.enabled else []

    def _start_wandb(self, mode: str) -> None:
        # What was sent: the rows that were there, and those that a process before the last had lost and not made again.
        path = self.recipe.run_dir / "wandb_step"
        self._sent = max(self._rows.last_step, int(path.read_text()) if path.exists() else 0)
        id_path = self.recipe.run_dir / "wandb_id"
        try:
            import wandb  # slow to import, and only one rank needs it

            write_bytes(path, str(self._sent).encode())
            if not id_path.exists():
                write_bytes(id_path, uuid.uuid4().hex[:12].encode())
            self._wandb = wandb.init(
                project=self.recipe.train.wandb_project,
                name=self.recipe.run_dir.name,
                id=id_path.read_text(),
                resume="allow",
                dir=self.recipe.run_dir,
                mode="offline" if mode == "auto" else mode,  # type: ignore[arg-type]
                config=json.loads(to_json(self.recipe)),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up_wandb(error)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it has a "step"."""
        if not self.enabled:
            return
        self._rows.add(row)
        self._to_wandb(lambda run: self._log(run, {k: v for k, v in row.items() if k != "step"}, row["step"]))

    def image(self, step: int, path: Path | None) -> None:
        """Log the sample grid at `path`."""
        if self._wandb is not None and path is not None:
            import wandb

            self._to_wandb(lambda run: self._log(run, {"samples": wandb.Image(str(path))}, step))

    def _log(self, run: Any, values: dict[str, Any], step: int) -> None:
        """Log values, unless wandb has them: a run that was killed makes its last steps again, with the same results, and
        wandb's steps only go forward."""
        if step > self._sent and step >= run.step:
            run.log(values, step=step)

    def _to_wandb(self, send: Callable[[Any], None]) -> None:
        """Let wandb do something, if it is used. Whatever ails it must not end the run: it only loses what it shows.

        Its service is a process of its own, which a launcher that stops a job ends with the ranks, before these have saved.
        """
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:
            self._give_up_wandb(error)

    def _give_up_wandb(self, error: Exception) -> None:
        print(f"wandb has failed ({error}) and gets no more of this run; all of it is in {self.path}", file=sys.stderr)
        self._wandb = None
        with contextlib.suppress(Exception):  # or it would complain again, in length, when the process ends
            import wandb

            wandb.teardown(exit_code=1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._rows.close()
            self._to_wandb(lambda run: run.finish(exit_code=0 if kind is None else 1))
