"""What goes wrong in single steps: losses that are no numbers, and losses that leap; both with the samples of the batch."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_pipeline.index import ShardSet
from t2i.metrics import Rows

WINDOW = 100
"""Steps that a loss is compared with."""
_ENOUGH = 20  # steps of which a mean and a deviation say something


class Health:
    """Judges every step, on every rank alike, and on the first writes what is odd to `RUN/odd_steps.jsonl`."""

    def __init__(
        self, run_dir: Path, step: int, shards: ShardSet, *, max_bad_steps: int, spike_deviations: float, enabled: bool
    ) -> None:
        """`step`: steps done when the run goes on; later rows of the file are removed."""
        self.path = run_dir / "odd_steps.jsonl"
        self._shards, self._max_bad, self._deviations = shards, max_bad_steps, spike_deviations
        self._rows = Rows(self.path, step) if enabled else None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_in_a_row = 0
        self.bad_steps = 0
        """Steps left out by this process."""

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is far above those before it."""
        if self._deviations == 0 or len(self._losses) < _ENOUGH:
            return False
        mean = statistics.fmean(self._losses)
        # Losses that differ in the last digits only are no measure of what is far.
        deviation = max(statistics.stdev(self._losses), 1e-3 * abs(mean))
        return loss > mean + self._deviations * deviation

    def good(self, loss: float) -> None:
        """A step was taken."""
        self._losses.append(loss)
        self.bad_in_a_row = 0

    def bad(self) -> None:
        """A step was left out."""
        self.bad_in_a_row += 1
        self.bad_steps += 1

    def report(self, step: int, kind: str, loss: float, numbers: Sequence[int]) -> dict[str, Any]:
        """Write a row on a step (`kind`: "skipped" or "spike") with key and shard of each sample; returns it."""
        row = {
            "step": step,
            "kind": kind,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no word for the others
            "samples": [{"key": self._shards.key(i), "shard": self._shards.shard_of(i)} for i in numbers],
        }
        if self._rows is not None:
            self._rows.add(row)
        return row

    def problem(self, row: dict[str, Any]) -> str | None:
        """Why the run has to end, if there were too many bad steps in a row; `row` is the last one's."""
        if self.bad_in_a_row < self._max_bad:
            return None
        samples = [f"{s['key']} in {s['shard']}" for s in row["samples"]]
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        return (
            f"the loss or its gradients were no finite numbers in {self.bad_in_a_row} steps in a row; the last, step "
            f"{row['step']}, had samples {shown}; all of them are in {self.path}. Lower train.lr, look at these samples, or go "
            "on from an earlier checkpoint"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rows is not None:
            self._rows.close()
