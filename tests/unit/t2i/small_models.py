"""Small NAR models with random weights and conditions for them."""

from typing import Any

import torch
from torch import Tensor

from t2i.config import ModelConfig
from t2i.model import NAR


def small_config(grid: tuple[int, ...], **changes: Any) -> ModelConfig:
    """A model of two trunk blocks, 16 wide, for any grid."""
    fields: dict[str, Any] = {
        "grid": grid, "vocab_size": 11, "n_layer": 2, "n_head": 2, "width": 16, "condition_dim": 6, "max_condition": 5,
        "num_classes": 4, "positions": "rotary" if len(grid) == 2 else "learned", "dropout": 0.0,
    }  # fmt: skip
    return ModelConfig(**fields | changes)


def small_model(config: ModelConfig, seed: int = 0) -> NAR:
    """A model whose every weight is random and large enough that all paths matter, in evaluation mode."""
    model = NAR(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            offset = 1.0 if "norm" in name else 0.0
            tensor.copy_(offset + 0.35 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def captions(config: ModelConfig, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random caption states [B, P, X] of the given lengths, left-padded to the longest, and their mask.

    The states of caption b do not depend on the other lengths. Padding holds large numbers, to show up if it is read.
    """
    longest = max(lengths)
    states = torch.full((len(lengths), longest, config.condition_dim), 50.0)
    for b, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + b)
        states[b, longest - length :] = torch.randn(length, config.condition_dim, generator=generator)
    return states, torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
