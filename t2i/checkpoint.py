"""Checkpoints: one folder each, whole or never resumed.

    RUN/checkpoints/step-00001000/
        bf16_zero_pp_rank_..., mp_rank_...   model and optimizer shards, written by DeepSpeed
        checkpoint.json                       step, ranks, ZeRO stage; written last, after every rank is done

A folder without `checkpoint.json` is what an interrupted save left behind; the next save removes it. DeepSpeed's own
`latest` file is not used: the first rank writes it before the others have finished.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.atomic import write_bytes
from t2i.engine import Engine

MARKER = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a whole checkpoint says of itself."""

    step: int
    ranks: int
    stage: int
    global_batch: int


def checkpoints(run_dir: Path) -> list[tuple[CheckpointInfo, Path]]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for marker in sorted((run_dir / "checkpoints").glob(f"step-*/{MARKER}")):
        found.append((CheckpointInfo(**json.loads(marker.read_text())), marker.parent))
    return sorted(found, key=lambda pair: pair[0].step)


def save(engine: Engine, run_dir: Path, step: int, keep_last: int) -> Path:
    """Write a checkpoint on all ranks, then remove all but the last `keep_last` whole ones."""
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
        info = CheckpointInfo(step, engine.runtime.ranks, engine.stage, engine.global_batch)
        write_bytes(folder / MARKER, json.dumps(asdict(info)).encode())
        for _, old in checkpoints(run_dir)[:-keep_last]:
            # Unmarked first: a removal that is cut off must not leave half a checkpoint that looks whole.
            (old / MARKER).unlink()
            shutil.rmtree(old)
    engine.barrier()
    return folder


def resume(engine: Engine, run_dir: Path) -> int:
    """Load the newest whole checkpoint, if there is one; returns the number of steps done.

    Raises ValueError where it was written by another number of ranks, another ZeRO stage or with another batch.
    """
    found = checkpoints(run_dir)
    if not found:
        return 0
    info, folder = found[-1]
    for what, wrote, here in (
        ("ranks", info.ranks, engine.runtime.ranks),
        ("ZeRO stage", info.stage, engine.stage),
        ("global batch", info.global_batch, engine.global_batch),
    ):
        if wrote != here:
            raise ValueError(
                f"{folder} was written with {what} {wrote} and this run has {here}; start it with {wrote}, or choose "
                "another --run-dir"
            )
    loaded, state = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    assert loaded is not None, f"{folder} is marked whole and does not load"
    return int(state["step"])
