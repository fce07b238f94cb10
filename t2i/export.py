"""From a training run to one servable folder.

    t2i export runs/shapes-tiny --out exports/shapes-tiny

Merges the shards of a ZeRO 1, 2 or 3 checkpoint to fp32 and writes them with everything that drawing needs: see
`t2i.pipeline`. Where the run kept a moving average of its weights, that is what is exported. One process, no GPU.
"""

from pathlib import Path
from typing import Literal

from torch import Tensor

from t2i import checkpoint
from t2i.checkpoint import Checkpoint
from t2i.objective import build_model
from t2i.optimizer import AVERAGE
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder, text_encoder_sha256
from t2i.vq import load_vq, vq_sha256

Weights = Literal["auto", "averaged", "raw"]


def export(
    run_dir: Path,
    out: Path,
    step: int | None = None,
    *,
    weights: Weights = "auto",
    tokenizer: str | None = None,
    text_encoder: str | None = None,
) -> TextToImagePipeline:
    """Write a checkpoint of a run to `out`, and return it opened.

    Args:
        run_dir: Folder of the run.
        out: Folder of the export.
        step: Which whole checkpoint; None takes the newest.
        weights: "averaged" is the moving average, "raw" the weights of the last step, "auto" the average if there is one.
        tokenizer, text_encoder: Where the run's image tokenizer and frozen text encoder are now, if they have moved.

    Raises ValueError where the run has no such checkpoint or weights, or a tokenizer or text encoder is not the run's.
    """
    found = {one.info.step: one for one in checkpoint.checkpoints(run_dir)}
    if not found:
        raise ValueError(f"{run_dir} has no whole checkpoint; give the run folder of a training that has saved one")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(found)))}")
    chosen = found[step]
    averaged = chosen.info.averaged if weights == "auto" else weights == "averaged"
    if averaged and not chosen.info.averaged:
        raise ValueError(f"{run_dir} kept no average of its weights (train.ema_decay is 0); export weights 'raw'")
    recipe = chosen.recipe()
    tokenizer = tokenizer or recipe.tokenizer
    if vq_sha256(tokenizer) != chosen.info.inputs.tokenizer:
        raise ValueError(
            f"{tokenizer} is not the image tokenizer that {run_dir} was trained with; give that with --tokenizer"
        )
    frozen = None
    if recipe.frozen_text_encoder is not None:
        name = text_encoder or recipe.frozen_text_encoder
        if text_encoder_sha256(name) != chosen.info.inputs.text_encoder:
            raise ValueError(
                f"{name} is not the text encoder that {run_dir} was trained with; give that with --text-encoder"
            )
        frozen = TextEncoder.from_pretrained(name)
    model = build_model(recipe, chosen.vocabulary())
    model.load_state_dict(merged_weights(chosen, averaged))
    pipe = TextToImagePipeline(
        model.nar,
        load_vq(tokenizer),
        model.text_encoder or frozen,
        recipe.sample,
        recipe.image_size,
        Provenance(recipe.name, step),
    )
    pipe.save_pretrained(out)
    return pipe


def merged_weights(chosen: Checkpoint, averaged: bool = False) -> dict[str, Tensor]:
    """fp32 weights of a checkpoint, or their moving average, ZeRO shards joined."""
    return chosen.states().state_dict(AVERAGE if averaged else None)
