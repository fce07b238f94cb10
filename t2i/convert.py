"""Published NAR checkpoints as models of this package.

Shape suffix: V vocabulary, C width.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.config import ModelConfig
from t2i.model import NAR
from t2i.wavefronts import Grid

_BLOCK_NAMES = {
    "attention.wqkv": "attention.wqkv", "attention.wo": "attention.wo", "attention_norm": "attention_norm",
    "feed_forward.w1": "feed_forward.w1", "feed_forward.w2": "feed_forward.w2", "feed_forward.w3": "feed_forward.w3",
    "ffn_norm": "ffn_norm",
}  # fmt: skip
# Published names of each axis's norm and head, for two and three axes, in the order of the axes. In the published video
# model R is right, D down and B back, the next frame.
_HEADS = {
    2: (("medusa_norm", "medusa_output"), ("norm", "output")),
    3: (("norm_B", "output_B"), ("norm_D", "output_D"), ("norm_R", "output_R")),
}


def load_official_nar(
    state_dict: Mapping[str, Tensor], *, grid: Grid, n_head: int, n_kv_head: int | None = None
) -> NAR:
    """A `NAR` with published weights, in evaluation mode, with the published options.

    Everything but the grid and the number of heads is read off the shapes: text or class condition, width, layers,
    vocabulary. Raises ValueError that lists every missing, unexpected or misshapen key.
    """
    weights = dict(state_dict)
    if "output.weight" in weights and "medusa_output.weight" not in weights:
        raise ValueError(
            "these are the weights of a raster autoregressive model (LlamaGen): they have one head, `output`, and a NAR "
            "model needs one per axis"
        )
    if len(grid) not in _HEADS:
        raise ValueError(f"grid {tuple(grid)} fits no published model; give two axes for images or three for video")
    text = any(key.startswith("cls_embedding.cap_proj.") for key in weights)
    condition_key = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
    for key in ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", condition_key):
        if key not in weights:
            raise ValueError(
                f"not the weights of a NAR model: no {key}; the first keys are {', '.join(list(weights)[:5])}"
            )
    vocab_size, width = weights["tok_embeddings.weight"].shape
    n_blocks = 1 + max(int(m[1]) for key in weights if (m := re.match(r"layers\.(\d+)\.", key)))
    axes = len(grid)
    condition: dict[str, Any] = {}
    if text:
        uncond = weights[condition_key]
        condition = {
            "condition_dim": uncond.shape[1],
            "max_condition": uncond.shape[0],
            "uncond_tokens": uncond.shape[0],
        }
    else:
        condition = {"num_classes": weights[condition_key].shape[0] - 1}
    config = ModelConfig(
        grid=tuple(grid), vocab_size=vocab_size, n_layer=n_blocks - (axes - 1), n_head=n_head, n_kv_head=n_kv_head,
        width=width, condition="text" if text else "class", **condition,
        positions="learned" if axes == 3 else "rotary", prefix_rotary="zero", uncond_embedding="frozen",
        uncond_mask="caption" if text else "full",
        zero_init_heads="all" if axes == 3 else "last",
    )  # fmt: skip
    model = NAR(config)
    renamed, unexpected = _renamed(weights, axes)
    own = model.state_dict()
    problems = [f"unexpected {key}" for key in unexpected]
    outputs = [f"{output}.weight" for _, output in _HEADS[axes]]
    misshapen = [key for key in outputs if key in weights and tuple(weights[key].shape) != (vocab_size, width)]
    problems += [f"{key} is {tuple(weights[key].shape)}, expected {(vocab_size, width)}" for key in misshapen]
    if not misshapen and all(key in weights for key in outputs):
        renamed["heads.weight"] = torch.stack([weights[key] for key in outputs], dim=1)
    problems += [f"missing what becomes {key}" for key in own if key not in renamed]
    problems += [
        f"{key} is {tuple(tensor.shape)}, expected {tuple(own[key].shape)}"
        for key, tensor in renamed.items()
        if key in own and tensor.shape != own[key].shape
    ]
    if problems:
        raise ValueError("published weights do not fit: " + "; ".join(problems))
    model.load_state_dict({key: tensor.float() for key, tensor in renamed.items()})
    return model.eval()


def _renamed(weights: dict[str, Tensor], axes: int) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under this package's names, all but the heads' outputs, and the keys that have none."""
    names = {
        "tok_embeddings.weight": "tokens.weight",
        "cls_embedding.embedding_table.weight": "prefix.embedding.weight",
        "cls_embedding.cap_proj.fc1.weight": "prefix.fc1.weight",
        "cls_embedding.cap_proj.fc2.weight": "prefix.fc2.weight",
        "cls_embedding.uncond_embedding": "prefix.uncond",
    }
    heads = _HEADS[axes]
    names |= {f"{norm}.weight": f"heads.norms.{a}.weight" for a, (norm, _) in enumerate(heads)}
    outputs = [f"{output}.weight" for _, output in heads]
    renamed, unexpected = {}, []
    for key, tensor in weights.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", key)
        if key in names:
            renamed[names[key]] = tensor
        elif match and match[2] in _BLOCK_NAMES:
            renamed[f"blocks.{match[1]}.{_BLOCK_NAMES[match[2]]}.weight"] = tensor
        elif key == "abs_pe":
            renamed["positions"] = tensor[0]
        elif key not in outputs:
            unexpected.append(key)
    return renamed, unexpected
