"""How many parameters a recipe's model has, without making it."""

import torch

from t2i.config import Recipe
from t2i.model import NAR
from t2i.text_encoder import TextEncoderConfig

_DISTANCES = 32
"""Rows of T5's table of relative positions."""


def count_parameters(recipe: Recipe) -> int:
    """Of what is trained: the NAR model, and the text encoder where it is trained with it."""
    with torch.device("meta"):
        nar = NAR(recipe.model)
    total = sum(parameter.numel() for parameter in nar.parameters())
    return total + (text_encoder_parameters(recipe.text_encoder) if recipe.text_encoder is not None else 0)


def text_encoder_parameters(c: TextEncoderConfig) -> int:
    """Of a T5 encoder (Raffel et al. 2020, arXiv 1910.10683), which cannot be made without its vocabulary: embedding,
    relative positions, and in each block four maps of attention, two of the feed-forward and two norms; a last norm."""
    inner = c.dim // c.n_head * c.n_head
    block = 4 * c.dim * inner + 2 * c.dim * c.ffn_dim + 2 * c.dim
    return c.vocab_size * c.dim + _DISTANCES * c.n_head + c.n_layer * block + c.dim
