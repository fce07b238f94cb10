"""From a training run to one servable folder.

    t2i export runs/shapes-tiny --out exports/shapes-tiny

Merges the shards of a ZeRO 1, 2 or 3 checkpoint to fp32 and writes them with everything that drawing needs: see
`t2i.pipeline`. Where the run kept a moving average of its weights, that is what is exported. One process, no GPU.
"""

import contextlib
import importlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
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
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # it prints a line for each shard
        folder = chosen.folder
        if averaged:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / folder.name
            _average_in_place_of_weights(chosen.folder, folder)
        return {
            name: tensor.detach().clone()
            for name, tensor in get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name).items()
        }


def _average_in_place_of_weights(source: Path, target: Path) -> None:
    """A checkpoint whose master weights are the averages of `source`'s, for DeepSpeed to merge, which knows weights only."""
    target.mkdir()
    for path in source.glob("*_model_states.pt"):
        (target / path.name).symlink_to(path.resolve())
    for path in source.glob("*_optim_states.pt"):
        saved = _load(path)["optimizer_state_dict"]
        three = "fp32_flat_groups" in saved
        weights = saved["fp32_flat_groups" if three else "single_partition_of_fp32_groups"]
        states = saved["optimizer_state_dict" if three else "base_optimizer_state"]["state"]
        assert len(states) == len(weights), (path, len(states), len(weights))
        # The last rank's share is padded in the optimizer's state and not in the saved weights.
        averages = [states[n][AVERAGE][: weight.numel()] for n, weight in enumerate(weights)]
        for average, weight in zip(averages, weights, strict=True):
            assert average.shape == weight.shape, (path, average.shape, weight.shape)
        names = ("zero_stage", "partition_count", "param_alignment_paddings")
        kept = {name: saved[name] for name in names if name in saved}
        kept["fp32_flat_groups" if three else "single_partition_of_fp32_groups"] = averages
        torch.save({"optimizer_state_dict": kept}, target / path.name)


def _load(path: Path) -> Any:
    """What DeepSpeed saved, with no objects in it but tensors, plain values and DeepSpeed's own."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert all(name.startswith("deepspeed.") for name in names), f"{path} holds {', '.join(names)}"
    modules = [name.rpartition(".") for name in names]
    allowed = [getattr(importlib.import_module(module), name) for module, _, name in modules]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
