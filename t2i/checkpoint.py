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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.atomic import write_bytes
from t2i.config import Recipe, from_json
from t2i.engine import Engine

MARKER = "checkpoint.json"
RECIPE = "recipe.json"
VOCABULARY = "spiece.model"


@dataclass(frozen=True)
class Inputs:
    """SHA-256 of what a run was given besides its recipe: encoded set, image tokenizer, frozen text encoder if any."""

    data: str
    tokenizer: str
    text_encoder: str | None


@dataclass(frozen=True)
class CheckpointInfo:
    """What a whole checkpoint says of itself; `averaged` is whether it holds a moving average of the weights."""

    step: int
    ranks: int
    stage: int
    global_batch: int
    averaged: bool
    inputs: Inputs


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    info: CheckpointInfo
    folder: Path

    def recipe(self) -> Recipe:
        """The recipe that the run had when it was saved."""
        return from_json(Recipe, (self.folder / RECIPE).read_bytes(), self.folder / RECIPE)

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


def save(
    engine: Engine,
    run_dir: Path,
    step: int,
    inputs: Inputs,
    files: Mapping[str, bytes],
    *,
    keep_last: int,
    averaged: bool,
) -> Path:
    """Write a checkpoint on all ranks, with `files` beside the shards, then remove all but the last `keep_last` whole ones."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    if engine.runtime.is_first:
        for other in (run_dir / "checkpoints").glob("step-*"):
            if not (other / MARKER).exists():
                shutil.rmtree(other)  # left by a save that was cut off; a tag is never written into twice
    engine.barrier()
    # The empty entry lets stages 1 and 2 be converted for another number of ranks later.
    state = {"step": step, "universal_checkpoint_info": {}}
    engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, client_state=state, save_latest=False)
    engine.barrier()
    if engine.runtime.is_first:
        for name, data in files.items():
            write_bytes(folder / name, data)
        info = CheckpointInfo(step, engine.runtime.ranks, engine.stage, engine.global_batch, averaged, inputs)
        write_bytes(folder / MARKER, json.dumps(asdict(info)).encode())
        for old in checkpoints(run_dir)[:-keep_last]:
            # Unmarked first: a removal that is cut off must not leave half a checkpoint that looks whole.
            (old.folder / MARKER).unlink()
            shutil.rmtree(old.folder)
    engine.barrier()
    return folder


def resume(engine: Engine, run_dir: Path) -> int:
    """Load the newest whole checkpoint, if there is one; returns the number of steps done.

    Raises ValueError where it was written by another number of ranks, another ZeRO stage or with another batch.
    """
    found = newest(run_dir)
    if found is None:
        return 0
    for what, wrote, here in (
        ("ranks", found.info.ranks, engine.runtime.ranks),
        ("ZeRO stage", found.info.stage, engine.stage),
        ("global batch", found.info.global_batch, engine.global_batch),
    ):
        if wrote != here:
            raise ValueError(
                f"{found.folder} was written with {what} {wrote} and this run has {here}; start it with {wrote}, or choose "
                "another --run-dir"
            )
    loaded, state = engine.deepspeed.load_checkpoint(str(found.folder.parent), tag=found.folder.name)
    assert loaded is not None, f"{found.folder} is marked whole and does not load"
    return int(state["step"])
