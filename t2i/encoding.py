"""Raw tars to encoded shards with this package's models: what `t2i encode` runs.

t2i encode data/shapes --out data/shapes-encoded --tokenizer shapes --image-size 64
deepspeed --module t2i.cli encode ...        # the same on every GPU of a cluster, shards shared out by rank
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.encode import encode_set
from data_pipeline.images import CROP_POLICY
from data_pipeline.manifest import Manifest
from t2i.devices import choose_device
from t2i.text_encoder import TextEncoder, text_encoder_sha256
from t2i.threads import cores_per_rank
from t2i.vq import images_to_tensor, load_vq, vq_sha256


def encode(
    raw: Path,
    out: Path,
    *,
    tokenizer: str,
    image_size: int,
    text_encoder: str | None = None,
    frames: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> Manifest | None:
    """Encode an indexed raw set; returns the manifest once every rank's shards are there, else None.

    With `frames`, the first so many frames of animated pictures, each by itself: codes [t, h, w].
    The rank comes from RANK and WORLD_SIZE, which any launcher sets. Raises ValueError where the pictures do not divide
    into tokens, the device is not there, or as `encode_set` does.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = choose_device(device)
    if where.type == "cpu":
        torch.set_num_threads(cores_per_rank())
    vq = load_vq(tokenizer).to(where)
    stride = vq.config.stride
    if image_size < 1 or image_size % stride:
        raise ValueError(
            f"pictures of {image_size} pixels do not divide into tokens of {stride}; use a multiple of {stride}"
        )
    texts = TextEncoder.from_pretrained(text_encoder).to(where) if text_encoder else None

    @torch.inference_mode()
    def encode_images(images: np.ndarray) -> np.ndarray:
        if images.ndim == 5:  # one frame of all clips after the other, so that clips need no more memory than pictures
            return np.stack([encode_images(images[:, t]) for t in range(images.shape[1])], axis=1)
        return vq.encode(images_to_tensor(images).to(where)).cpu().numpy()

    @torch.inference_mode()
    def encode_text(captions: list[str]) -> list[Tensor]:
        assert texts is not None
        ids, mask = texts.tokenize(captions)
        states = texts(ids.to(where), mask.to(where)).to(torch.bfloat16).cpu()
        return [row[real] for row, real in zip(states, mask, strict=True)]

    side = image_size // stride
    return encode_set(
        raw,
        out,
        encode_images=encode_images,
        encode_text=encode_text if texts is not None else None,
        image_size=image_size,
        frames=frames,
        encoding={
            "tokenizer_sha256": vq_sha256(tokenizer),
            "text_encoder_sha256": text_encoder_sha256(text_encoder) if text_encoder else None,
            "crop": CROP_POLICY,
            "image_size": image_size,
            "grid": [side, side] if frames is None else [frames, side, side],
            "codebook_size": vq.config.codebook_size,
        }
        | ({} if frames is None else {"frames": frames}),
        batch_size=batch_size,
        rank=rank,
        ranks=ranks,
        progress=rank == 0,
    )
