"""Files of published weights to an export that `TextToImagePipeline.from_pretrained` opens.

    t2i convert t2i_stage2.pt --out exports/nar-xl-512 --grid 32 32 --vq vq_ds16_t2i.pt --text-encoder google/flan-t5-xl
    t2i convert c2i_L_384.pt --out exports/llamagen-l --kind raster --grid 24 24 --vq vq_ds16_c2i.pt

Reads safetensors, and what torch.save wrote as far as it holds tensors and plain values: no code of a file is ever run.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from t2i.config import SampleConfig
from t2i.convert import load_official_llamagen, load_official_nar
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder
from t2i.vq import VQModel, load_official_vq, load_vq
from t2i.wavefronts import Grid

Kind = Literal["nar", "raster", "warm-start"]
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
"""Attention heads of the published models by width: NAR-B to XXL and LlamaGen-B to 7B."""
HEAD_DIM = 64  # of most of them, for widths of none
IMAGE_GRID, VIDEO_GRID = (16, 16), (4, 16, 16)
GUIDANCE = {"text": 7.5, "class": 2.0, "video": 1.25}
"""Published guidance scales of text, ImageNet classes and UCF-101 (arXiv 2503.10696)."""
TEXT_ENCODER = "google/flan-t5-xl"
STRIDE = 16  # of the published image tokenizer, where none is given

# Where the state dict of a checkpoint is: LlamaGen's and NAR's own, DeepSpeed's, Lightning's, and within the published video
# trainer's `model`.
_ENTRIES = ("model", "module", "state_dict", "sd")
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file under their published names, and the training step where it says so."""

    weights: dict[str, Tensor]
    step: int


def read_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file, on the processor and, where they can be, mapped into memory.

    The state dict is the file's top level or its entry `model`, `module` or `state_dict`. Raises ValueError where there is no
    such file, where it is damaged or something else, and where it holds Python objects other than an argparse.Namespace.
    """
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        reason = "is a folder" if path.is_dir() else "is no file" if not path.exists() else "is no file of weights"
        raise ValueError(f"{path} {reason}; give a file of weights that ends in one of {' '.join(SUFFIXES)}")
    if path.suffix.lower() == ".safetensors":
        try:
            content: Any = load_file(path)
        except SafetensorError as error:
            raise _damaged(path, f"no safetensors file ({error})") from error
    else:
        content = _torch_load(path)
    found = content
    while isinstance(found, Mapping) and (entry := next((key for key in _ENTRIES if key in found), None)):
        found = found[entry]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds no weights, but a {_kind(found)}; give a file of a model's state dict")
    if others := [key for key, value in found.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise ValueError(
            f"{path} holds no weights under {', '.join(map(str, others[:5]))}, but a {_kind(found[others[0]])}; give a file "
            f"whose top level, or its entry {', '.join(_ENTRIES[:3])}, is a state dict"
        )
    step = content.get("steps", 0) if isinstance(content, Mapping) else 0
    weights = {_unwrapped(key): tensor for key, tensor in found.items()}
    if len(weights) != len(found):
        raise ValueError(f"{path} holds the same weights with and without {' or '.join(_WRAPPERS)} before their names")
    return Checkpoint(weights, step if isinstance(step, int) else 0)


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def _kind(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)} entries" if isinstance(value, Mapping) else type(value).__name__


def _torch_load(path: Path) -> Any:
    with open(path, "rb") as stream:
        start = stream.read(64)
    if start.lstrip().startswith((b"<", b"version https://git-lfs")):
        what = "a web page" if start.lstrip().startswith(b"<") else "a Git LFS pointer"
        raise ValueError(f"{path} is {what} in place of the weights; download the file itself")
    try:
        # Training scripts save their arguments beside the weights; a Namespace is plain values, and has no code of its own.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds a Python object, {name[1]}, which could run code when it is read; have whoever made it save "
                "the state dict alone, best as safetensors"
            ) from error
        raise _damaged(path, "no file of torch.save") from error
    except (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        reason = str(error).partition(".")[0] or type(error).__name__
        raise _damaged(path, f"no file of torch.save ({reason})") from error


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged or {' '.join(reason.split())}; download or copy it again")


def convert(
    checkpoint: Path,
    out: Path,
    *,
    kind: Kind = "nar",
    grid: Grid | None = None,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    vq: str | None = None,
    text_encoder: str | None = None,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> TextToImagePipeline:
    """Write an export of published weights to `out`, and return the pipeline.

    Args:
        checkpoint: File of NAR or LlamaGen weights; see `read_checkpoint`.
        out: Folder of the export.
        kind: "nar" and "raster" are what the weights were trained as; "warm-start" makes a NAR model to be trained further
            of raster weights.
        grid: Tokens along each axis; 16x16 for images and 4x16x16 for video when not given.
        n_head: Attention heads; those of the published model of that width when not given.
        n_kv_head: Grouped key-value heads; as many as heads when not given.
        vq: File of published VQ weights, or a tokenizer's folder or name as `load_vq` takes; without one the export gives
            tokens and no pictures.
        text_encoder: Folder or hub name of the T5 of a text model; the published flan-t5-xl when not given.
        guidance_scale, temperature, top_k, top_p: What the export draws with; the published guidance when not given.

    Raises ValueError for files that are none or do not fit each other, before anything is written.
    """
    read = read_checkpoint(checkpoint)
    video = "abs_pe" in read.weights
    if grid is None:
        grid = _video_grid(read.weights, checkpoint) if video else IMAGE_GRID
    heads = _heads(read.weights, checkpoint) if n_head is None else n_head
    load = load_official_llamagen if kind == "raster" else load_official_nar
    options = {"warm_start": True} if kind == "warm-start" else {}
    try:
        model = load(read.weights, grid=grid, n_head=heads, n_kv_head=n_kv_head, **options)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    config = model.config
    if config.condition == "class" and text_encoder is not None:
        raise ValueError(f"{checkpoint} is a class-conditional model, which takes no text encoder; leave it out")
    scale = GUIDANCE["video" if video else config.condition] if guidance_scale is None else guidance_scale
    sample = SampleConfig(guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p)
    tokenizer = None if vq is None else _read_vq(vq, model, checkpoint)
    text = config.condition == "text"
    encoder = _read_text_encoder(text_encoder or TEXT_ENCODER, model, checkpoint) if text else None
    stride = STRIDE if tokenizer is None else tokenizer.config.stride
    pipe = TextToImagePipeline(
        model, tokenizer, encoder, sample, config.grid[-1] * stride, Provenance(checkpoint.name, read.step)
    )
    pipe.save_pretrained(out)
    return pipe


def _heads(weights: Mapping[str, Tensor], checkpoint: Path) -> int:
    table = weights.get("tok_embeddings.weight")
    if table is None or table.ndim != 2:
        raise ValueError(f"{checkpoint} has no tok_embeddings.weight of two axes; it is not the weights of a NAR model")
    width = table.shape[1]
    if width not in HEADS and width % HEAD_DIM:
        raise ValueError(f"{checkpoint} is {width} wide, like no published model; give its heads with --n-head")
    return HEADS.get(width, width // HEAD_DIM)


def _video_grid(weights: Mapping[str, Tensor], checkpoint: Path) -> Grid:
    """The published grid, where the learned positions are as many as its tokens and the class before them."""
    positions = weights["abs_pe"]
    tokens = positions.shape[1] - 1 if positions.ndim == 3 else 0
    if tokens != math.prod(VIDEO_GRID):
        raise ValueError(
            f"{checkpoint} has positions for clips of {tokens} tokens, not of the published "
            f"{'x'.join(map(str, VIDEO_GRID))}; give --grid FRAMES ROWS COLUMNS"
        )
    return VIDEO_GRID


def _read_vq(source: str, model: NAR, checkpoint: Path) -> VQModel:
    if Path(source).suffix.lower() in SUFFIXES and not Path(source).is_dir():
        weights = read_checkpoint(Path(source)).weights
        try:
            tokenizer = load_official_vq(weights)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        tokenizer = load_vq(source)
    if tokenizer.config.codebook_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer {source} has {tokenizer.config.codebook_size} codes and {checkpoint} draws "
            f"{model.config.vocab_size}; give the one that it was trained with"
        )
    return tokenizer


def _read_text_encoder(source: str, model: NAR, checkpoint: Path) -> TextEncoder:
    encoder = TextEncoder.from_pretrained(source)
    if encoder.dim != model.config.condition_dim:
        raise ValueError(
            f"the text encoder {source} has states of {encoder.dim} channels and {checkpoint} takes "
            f"{model.config.condition_dim}; give the one that it was trained with"
        )
    return encoder
