"""What a recipe costs, on paper: parameters, checkpoints, the FLOPs of a sample and of a step, with the GPUs that do them.

Pure arithmetic on the numbers of a recipe, importable without torch. FLOPs are those of matrix products alone, a
multiplication and an addition being two. Attention counts as what is computed with a dense mask, the whole square of
prefix and grid, in raster order too, where GPUs have kernels that leave half of it out.

Symbols: P prefix positions, N grid tokens, L = P + N - 1 sequence, C width, A axes, V vocabulary.
"""

import math
import re
from dataclasses import dataclass

from t2i.config import ModelConfig, Recipe
from t2i.text_encoder_config import TextEncoderConfig

T5_BUCKETS = 32
"""Distances that a T5 encoder tells apart, each with a bias for each head."""


@dataclass(frozen=True)
class GPU:
    """Of a vendor's data sheet: peak FLOP/s of dense bf16 products with fp32 sums (fp16 where there is no bf16), memory in
    bytes, the gigabyte being 10**9. The driver reports some percent more, about what CUDA and NCCL take for themselves."""

    flops: float
    memory: int
    words: tuple[str, ...]
    """What its name has in it, as `torch.cuda.get_device_name` tells it."""
    half: str = "bf16"
    """The 16-bit numbers that it computes with, as DeepSpeed's JSON has them."""


GPUS: dict[str, GPU] = {
    "v100-16": GPU(125e12, 16 * 10**9, ("V100", "16GB"), "fp16"),
    "v100": GPU(125e12, 32 * 10**9, ("V100",), "fp16"),
    "t4": GPU(65e12, 16 * 10**9, ("T4",), "fp16"),
    "a10": GPU(125e12, 24 * 10**9, ("A10",)),
    "a30": GPU(165e12, 24 * 10**9, ("A30",)),
    "a40": GPU(149.7e12, 48 * 10**9, ("A40",)),
    "a100-40": GPU(312e12, 40 * 10**9, ("A100",)),
    "a100-80": GPU(312e12, 80 * 10**9, ("A100", "80GB")),
    "l4": GPU(121e12, 24 * 10**9, ("L4",)),
    "l40": GPU(181e12, 48 * 10**9, ("L40",)),
    "l40s": GPU(362e12, 48 * 10**9, ("L40S",)),
    "rtx3090": GPU(71e12, 24 * 10**9, ("RTX", "3090")),
    "rtx4090": GPU(165.2e12, 24 * 10**9, ("RTX", "4090")),
    "rtx5090": GPU(209.5e12, 32 * 10**9, ("RTX", "5090")),
    "h20": GPU(148e12, 96 * 10**9, ("H20",)),
    "h100-pcie": GPU(756e12, 80 * 10**9, ("H100", "PCIE")),
    "h100-nvl": GPU(835e12, 94 * 10**9, ("H100", "NVL")),
    "h100": GPU(989.4e12, 80 * 10**9, ("H100",)),
    "h200-nvl": GPU(835e12, 141 * 10**9, ("H200", "NVL")),
    "h200": GPU(989.4e12, 141 * 10**9, ("H200",)),
    "b200": GPU(2250e12, 180 * 10**9, ("B200",)),
    "gb200": GPU(2500e12, 186 * 10**9, ("GB200",)),
    "mi300x": GPU(1307.4e12, 192 * 10**9, ("MI300X",)),
}
_OTHERS = {"MIG", "LAPTOP", "MAX", "D", "SUPER", "TI"}
"""Words of other GPUs, or of parts of one."""


def peak_of(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that `torch.cuda.get_device_name` gives it; None for one that is not in `GPUS`."""
    words = set(re.split(r"[\s\-_]+", device_name.upper()))
    if words & _OTHERS:
        return None
    found = [gpu for gpu in GPUS.values() if words.issuperset(gpu.words)]
    return max(found, key=lambda gpu: len(gpu.words)).flops if found else None


# Parameters


@dataclass(frozen=True)
class Parameter:
    """One trained tensor: the part of the model that it is in, how many numbers it has, whether it decays."""

    part: str
    size: int
    decays: bool = True


def parameter_list(recipe: Recipe) -> list[Parameter]:
    """The parameters of a recipe's model in the order in which it has them."""
    model, width = recipe.model, recipe.model.width
    found = []
    if model.positions == "learned":
        found.append(Parameter("positions", (model.prefix + math.prod(model.grid)) * width, False))
    if model.condition == "class":
        found.append(Parameter("class embedding", (model.num_classes + 1) * width, False))
    else:
        if model.uncond_embedding == "learned":
            found.append(Parameter("caption map", model.uncond_tokens * model.condition_dim, False))
        found += [Parameter("caption map", inputs * width) for inputs in (model.condition_dim, width)]
    found.append(Parameter("token embedding", model.vocab_size * width, False))
    norm = Parameter("blocks", width, False)
    attention = [Parameter("blocks", outputs * width) for outputs in (fused_width(model), width)]
    found += blocks(model) * [norm, *attention, norm, *3 * [Parameter("blocks", model.hidden * width)]]
    found.append(Parameter("heads", model.vocab_size * model.n_axes * width))
    found += model.n_axes * [Parameter("heads", width, False)]
    return found + ([] if recipe.text_encoder is None else _text_encoder(recipe.text_encoder))


def _text_encoder(encoder: TextEncoderConfig) -> list[Parameter]:
    """Those of a T5 encoder."""

    def made(size: int, decays: bool = True) -> Parameter:
        return Parameter("text encoder", size, decays)

    norm = made(encoder.dim, False)
    found = [made(encoder.vocab_size * encoder.dim, False)]
    for number in range(encoder.n_layer):
        found += 4 * [made(encoder.dim**2)]
        if number == 0:
            found.append(made(T5_BUCKETS * encoder.n_head, False))
        found += [norm, *2 * [made(encoder.dim * encoder.ffn_dim)], norm]
    return [*found, norm]


def parameters(recipe: Recipe) -> dict[str, int]:
    """How many trained numbers each part of a recipe's model has."""
    counts: dict[str, int] = {}
    for parameter in parameter_list(recipe):
        counts[parameter.part] = counts.get(parameter.part, 0) + parameter.size
    return counts


def checkpoint_bytes(count: int, stage: int, item: int, averaged: bool) -> int:
    """Size of a checkpoint of `count` parameters: fp32 weights, two moments and perhaps an average, and, but for ZeRO 3,
    where they are nowhere whole, the weights as they are trained, of `item` bytes each."""
    return count * (4 * (4 if averaged else 3) + (0 if stage == 3 else item))


def blocks(model: ModelConfig) -> int:
    """Transformer blocks: the trunk's, and one for each axis after the first."""
    return model.n_layer + model.n_axes - 1


def fused_width(model: ModelConfig) -> int:
    """Outputs of the map to queries, keys and values."""
    return (model.n_head + 2 * (model.n_kv_head or model.n_head)) * (model.width // model.n_head)


def block_matrices(model: ModelConfig) -> int:
    """Entries of one block's matrices."""
    return model.width * (fused_width(model) + model.width + 3 * model.hidden)


# FLOPs


def prefix_length(model: ModelConfig, caption_tokens: int) -> int:
    """Positions before the grid in training, given the tokens of the longest caption of a batch."""
    if model.condition == "class":
        return 1
    grows = model.condition_dropout > 0 and model.uncond_mask == "full"
    return max(caption_tokens, model.uncond_tokens) if grows else caption_tokens


def forward_flops(recipe: Recipe, caption_tokens: int) -> dict[str, int]:
    """FLOPs of one sample's forward pass in training, by part; a class-conditional recipe takes no notice of the caption."""
    model, encoder = recipe.model, recipe.text_encoder
    tokens = math.prod(model.grid)
    prefix = prefix_length(model, caption_tokens)
    length = prefix + tokens - 1
    caption_map = (model.condition_dim + model.width) * model.width if model.condition == "text" else 0
    flops = {
        "caption map": 2 * prefix * caption_map,
        "blocks": 2 * length * blocks(model) * block_matrices(model),
        # Scores, and the sums of values that they weigh.
        "attention": 4 * length**2 * blocks(model) * model.width,
        "heads": 2 * tokens * model.n_axes * model.width * model.vocab_size,
        "text encoder": 0,
    }
    if encoder is not None:
        maps = 4 * encoder.dim**2 + 2 * encoder.dim * encoder.ffn_dim
        flops["text encoder"] = encoder.n_layer * (2 * caption_tokens * maps + 4 * caption_tokens**2 * encoder.dim)
    return {name: count for name, count in flops.items() if count}


def training_flops_per_sample(recipe: Recipe, caption_tokens: int) -> int:
    """FLOPs of one sample's forward and backward pass that the model asks for: what is computed a second time with
    activation checkpointing is not in it, as is usual for the share of a GPU's peak ("MFU", PaLM, arXiv 2204.02311).

    `caption_tokens`: of the longest caption of the micro-batch, to which the others are padded.
    """
    flops = forward_flops(recipe, caption_tokens)
    # Every product has two in the backward pass, but none for stored text states, which do not learn.
    model = recipe.model
    learns = recipe.text_encoder is not None or (model.uncond_embedding == "learned" and model.condition_dropout > 0)
    fixed = 0
    if model.condition == "text" and not learns:
        fixed = 2 * prefix_length(model, caption_tokens) * model.condition_dim * model.width
    return 3 * sum(flops.values()) - fixed


def computed_flops_per_sample(recipe: Recipe, caption_tokens: int) -> int:
    """FLOPs of one sample's forward and backward pass as they are computed: with activation checkpointing
    (`train.activation_checkpointing`) the blocks' forward pass twice."""
    flops = forward_flops(recipe, caption_tokens)
    again = flops["blocks"] + flops["attention"] if recipe.train.activation_checkpointing else 0
    return training_flops_per_sample(recipe, caption_tokens) + again
