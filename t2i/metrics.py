"""Where the numbers of a run go: `metrics.jsonl` in its folder, and wandb."""

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from data_pipeline.atomic import write_bytes
from t2i.config import Recipe, to_json


def open_rows(path: Path, step: int) -> TextIO:
    """A file of JSON rows, each with a "step", opened to go on from `step`; later rows are removed first.

    Such rows, and a last line that is cut off, are left by a run that was killed; without this, steps would be there
    twice.
    """
    kept = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_bytes(path, "".join(kept).encode())
    return open(path, "a")


class MetricsLog:
    """Writes rows of one run, from the step that it resumes at; use as a context manager.

    Rows after that step, left by a run that was cut off, are removed first, so that no step is there twice.
    """

    def __init__(self, recipe: Recipe, step: int, enabled: bool) -> None:
        self.recipe, self.step, self.enabled = recipe, step, enabled
        self._wandb: Any = None

    @property
    def path(self) -> Path:
        return self.recipe.run_dir / "metrics.jsonl"

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        self._file = open_rows(self.path, self.step)
        mode = self.recipe.train.wandb
        if mode != "disabled":
            self._start_wandb("online" if mode == "auto" and os.environ.get("WANDB_API_KEY") else mode)
        return self

    def _start_wandb(self, mode: str) -> None:
        import wandb  # slow to import, and only one rank needs it

        id_path = self.recipe.run_dir / "wandb_id"
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

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it has a "step"."""
        if not self.enabled:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._to_wandb(lambda run: self._log(run, {k: v for k, v in row.items() if k != "step"}, row["step"]))

    def image(self, step: int, path: Path | None) -> None:
        """Log the sample grid at `path`."""
        if self._wandb is not None and path is not None:
            import wandb

            self._to_wandb(lambda run: self._log(run, {"samples": wandb.Image(str(path))}, step))

    @staticmethod
    def _log(run: Any, values: dict[str, Any], step: int) -> None:
        """Log values, unless wandb has them: a run that was killed makes its last steps again, with the same results, and
        wandb's steps only go forward."""
        if step >= run.step:
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
            print(
                f"wandb has failed ({error}) and gets no more of this run; all of it is in {self.path}", file=sys.stderr
            )
            self._wandb = None
            import wandb

            with contextlib.suppress(Exception):  # or it would complain again, in length, when the process ends
                wandb.teardown(exit_code=1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._file.close()
            self._to_wandb(lambda run: run.finish(exit_code=0 if kind is None else 1))
