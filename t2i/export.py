"""From a training run to one servable folder.

    t2i export runs/shapes-tiny --out exports/shapes-tiny

Merges the shards of a ZeRO 1, 2 or 3 checkpoint to fp32 and writes them with everything that drawing needs: see
`t2i.pipeline`. One process, no GPU.
"""

import contextlib
import io
import logging
from pathlib import Path

from t2i import checkpoint
from t2i.config import Recipe, from_json
from t2i.objective import build_model
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder
from t2i.vq import load_vq


def export(run_dir: Path, out: Path, step: int | None = None) -> TextToImagePipeline:
    """Write the newest whole checkpoint of a run (or the one of `step`) to `out`, and return it opened.

    Raises ValueError where the run has no such checkpoint.
    """
    found = {info.step: folder for info, folder in checkpoint.checkpoints(run_dir)}
    if not (run_dir / "recipe.json").is_file() or not found:
        raise ValueError(f"{run_dir} has no whole checkpoint; give the run folder of a training that has saved one")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}")
    recipe = from_json(Recipe, (run_dir / "recipe.json").read_bytes())
    vocabulary = (run_dir / "spiece.model").read_bytes() if recipe.text_encoder is not None else None
    model = build_model(recipe, vocabulary)
    model.load_state_dict(merged_weights(found[step]))
    text_encoder = model.text_encoder
    if text_encoder is None and recipe.frozen_text_encoder is not None:
        text_encoder = TextEncoder.from_pretrained(recipe.frozen_text_encoder)
    pipe = TextToImagePipeline(
        model.nar,
        load_vq(recipe.tokenizer),
        text_encoder,
        recipe.sample,
        recipe.image_size,
        Provenance(recipe.name, step),
    )
    pipe.save_pretrained(out)
    return pipe


def merged_weights(folder: Path) -> dict:
    """fp32 weights of a checkpoint folder, ZeRO shards joined."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each shard
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
