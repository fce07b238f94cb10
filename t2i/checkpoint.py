"""Checkpoints: one folder each, whole or never resumed.

    RUN/checkpoints/step-00001000/
        bf16_zero_pp_rank_..., mp_rank_...   model and optimizer shards, the averaged weights among them: DeepSpeed's
        recipe.json, spiece.model             the run's recipe, and the vocabulary of a trained text encoder
        checkpoint.json                       step, ranks, ZeRO stage, checksums; written last, after every rank is done

No state of a random generator is in there: all random numbers of a step are functions of the seed and the step.

A folder without `checkpoint.json` is what an interrupted save left behind; the next save removes it. DeepSpeed's own
`latest` file is not used: the first rank writes it before the others have finished.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_pipeline.atomic import write_bytes
from t2i.checkpoint_writer import CheckpointWriter, check_space
from t2i.config import Recipe, from_json
from t2i.engine import Engine, Runtime, broadcast_bytes
from t2i.zero_shards import SavedStates

MARKER = "checkpoint.json"
RECIPE = "recipe.json"
VOCABULARY = "spiece.model"
SEEN_SECONDS = 60.0
"""How long a rank waits to see a checkpoint that the first one sees: a network's file system may show it late."""


@dataclass(frozen=True)
class Inputs:
    """SHA-256 of what a run was given besides its recipe: encoded set, image tokenizer, frozen text encoder if any."""

    data: str
    tokenizer: str
    text_encoder: str | None


@dataclass(frozen=True)
class CheckpointInfo:
    """What a whole checkpoint says of itself.

    Attributes:
        layout: Digest of what of the DeepSpeed JSON decides how states lie in the files, see `t2i.engine.Engine.layout`.
        averaged: Whether it holds a moving average of the weights.
        inspected: Whether validation, sample grid and scores that were due at its step have been made: a signal comes first.
        unreadable: Samples in whose place the run has trained on others.
    """

    step: int
    ranks: int
    stage: int
    global_batch: int
    layout: str
    averaged: bool
    inspected: bool
    unreadable: int
    inputs: Inputs


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    info: CheckpointInfo
    folder: Path

    def recipe(self) -> Recipe:
        """The recipe that the run had when it was saved."""
        return from_json(Recipe, (self.folder / RECIPE).read_bytes(), self.folder / RECIPE)

    def states(self) -> SavedStates:
        """Weights and optimizer state."""
        return SavedStates(self.folder, self.info.ranks)

    def vocabulary(self) -> bytes | None:
        """The sentencepiece model of the text encoder, None where none is trained. Raises ValueError where it is gone."""
        if self.recipe().text_encoder is None:
            return None
        path = self.folder / VOCABULARY
        if not path.is_file():
            raise ValueError(f"{self.folder} has lost its {VOCABULARY}; copy it from another checkpoint of the run")
        return path.read_bytes()


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first. Raises ValueError for one that another version wrote."""
    found = []
    for marker in sorted((run_dir / "checkpoints").glob(f"step-*/{MARKER}")):
        try:
            values = json.loads(marker.read_text())
            info = CheckpointInfo(**{**values, "inputs": Inputs(**values["inputs"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{marker} is not of this version ({error}); go on with the version that wrote it, or choose another run folder"
            ) from error
        found.append(Checkpoint(info, marker.parent))
    return sorted(found, key=lambda one: one.info.step)


def newest(run_dir: Path) -> Checkpoint | None:
    """The whole checkpoint that a run goes on from."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def newest_for_all(runtime: Runtime, run_dir: Path) -> Checkpoint | None:
    """What `newest` is on the first rank, on every rank: each for itself might see another, while one is being written or
    removed. Raises ValueError on a rank that does not come to see it."""
    name = broadcast_bytes(runtime, lambda: (found.folder.name if (found := newest(run_dir)) else "").encode()).decode()
    begun = time.monotonic()
    while name:
        for found in checkpoints(run_dir):
            if found.folder.name == name:
                return found
        if time.monotonic() - begun > SEEN_SECONDS:
            raise ValueError(
                f"rank {runtime.rank} does not see {run_dir / 'checkpoints' / name}, which the first rank goes on from; put "
                "--run-dir on a file system that all hosts share"
            )
        time.sleep(0.5)
    return None


class Saver:
    """Writes the checkpoints of a run, on all ranks, while its steps go on.

    `begin` copies the state to memory and returns; the files are written by a thread on each rank. Once all ranks have
    written theirs, which they tell each other after every step (`advance`), the first one's thread adds the metadata and
    removes old checkpoints. `lost_seconds` is how long the steps stood still.
    """

    def __init__(
        self, engine: Engine, run_dir: Path, inputs: Inputs, files: Mapping[str, bytes], *,
        keep_last: int, keep_every: int, averaged: bool, background: bool, resumed_from: Path | None,
    ) -> None:  # fmt: skip
        """`files` lie beside the shards. Of the whole checkpoints the last `keep_last` stay, and those of every
        `keep_every` steps (0: none), and the one that this process has gone on from."""
        self.engine, self.run_dir, self.inputs, self.files = engine, run_dir, inputs, files
        self.keep_last, self.keep_every, self.averaged, self.resumed_from = (
            keep_last,
            keep_every,
            averaged,
            resumed_from,
        )
        self.writer = CheckpointWriter(background)
        engine.write_with(self.writer)
        self.lost_seconds = 0.0
        self.saved: int | None = None
        """Step of the newest checkpoint of this process that is known to be whole."""
        self._pending: int | None = None
        self._inspected, self._unreadable = True, 0
        self._marking = False

    def _folder(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}"

    def begin(self, step: int, inspected: bool = True, unreadable: int = 0) -> str | None:
        """Start a checkpoint, once the one before is finished; returns why it could not be written, on all ranks alike."""
        assert self._pending is None, "finish the one before first"
        begun = time.perf_counter()
        folder, problem = self._folder(step), None
        if self.engine.runtime.is_first:
            try:
                for other in folder.parent.glob("step-*"):
                    if not (other / MARKER).exists():
                        shutil.rmtree(other)  # left by a save that was cut off; a tag is never written into twice
                folder.mkdir(parents=True)
                check_space(folder, self.engine.checkpoint_bytes(self.averaged))
            except OSError as error:
                problem = str(error)
        problem = self.engine.first_of(problem)
        if problem is None:
            self.engine.deepspeed.save_checkpoint(
                str(folder.parent), tag=folder.name, client_state={"step": step}, save_latest=False
            )
            self._pending, self._inspected, self._unreadable = step, inspected, unreadable
        self.lost_seconds += time.perf_counter() - begun
        return problem if self.writer.background else problem or self.finish()

    def state(self) -> tuple[bool, bool]:
        """Whether this rank is still writing, and whether it could not."""
        return self.writer.busy, self.writer.failed

    def advance(self, busy: bool, failed: bool) -> str | None:
        """Go on with what has begun, given whether any rank is `busy` or has `failed`; returns why it could not be
        written. All ranks call it alike, as often as they like."""
        if self._pending is None or busy:
            return None
        if failed:
            return self._give_up(self._pending)
        if not self._marking:
            self._marking = True
            if self.engine.runtime.is_first:
                self.writer.submit(partial(self._mark, self._pending))
            return None
        self.saved, self._pending, self._marking = self._pending, None, False
        return None

    def finish(self) -> str | None:
        """Wait for what has begun until it is whole; returns why it could not be written, on all ranks alike."""
        begun = time.perf_counter()
        problem = None
        while self._pending is not None:
            self.writer.wait()
            problem = self.advance(False, self.engine.any_rank(self.writer.failed))
        self.lost_seconds += time.perf_counter() - begun
        return problem

    def _give_up(self, step: int) -> str:
        folder, error = self._folder(step), self.writer.take_error()
        own = None if error is None else f"rank {self.engine.runtime.rank} could not write {folder}: {error}"
        problem = self.engine.first_of(own)
        assert problem is not None, "some rank said that it had failed"
        if self.engine.runtime.is_first and not (folder / MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)  # others need its space
        self._pending, self._marking = None, False
        return problem

    def _mark(self, step: int) -> None:
        """Write the metadata, with which the checkpoint is whole, and remove what is old, where it can be."""
        folder, engine = self._folder(step), self.engine
        for name, data in self.files.items():
            write_bytes(folder / name, data)
        info = CheckpointInfo(
            step, engine.runtime.ranks, engine.stage, engine.global_batch, engine.layout, self.averaged, self._inspected,
            self._unreadable, self.inputs,
        )  # fmt: skip
        write_bytes(folder / MARKER, json.dumps(asdict(info)).encode())
        try:
            self._prune()
        except (OSError, ValueError) as error:
            print(f"\nan old checkpoint could not be removed: {error}", file=sys.stderr)

    def _prune(self) -> None:
        for old in checkpoints(self.run_dir)[: -self.keep_last]:
            if (self.keep_every and old.info.step % self.keep_every == 0) or old.folder == self.resumed_from:
                continue
            # Unmarked first: a removal that is cut off must not leave half a checkpoint that looks whole.
            (old.folder / MARKER).unlink()
            shutil.rmtree(old.folder)


def resume(engine: Engine, found: Checkpoint) -> None:
    """Load a checkpoint.

    One of another number of ranks, another ZeRO stage or another layout is put together and cut anew. Raises ValueError where
    the global batch is another, since the run would then see other samples.
    """
    info, ranks = found.info, engine.runtime.ranks
    if info.global_batch != engine.global_batch:
        raise ValueError(
            f"{found.folder} was written with global batch {info.global_batch} and this run has {engine.global_batch} "
            f"({ranks} ranks x micro-batch {engine.micro_batch} x accumulation {engine.accumulation}); set "
            f"train_micro_batch_size_per_gpu and gradient_accumulation_steps to make {info.global_batch}, or choose another "
            "--run-dir"
        )
    if (info.ranks, info.stage, info.layout) == (ranks, engine.stage, engine.layout):
        engine.load(found.folder)
    else:
        engine.restore(found.states(), info.step)
