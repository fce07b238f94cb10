"""Sizes of a text encoder that is trained with the model: plain numbers, importable without torch."""

from dataclasses import dataclass

DEFAULT_MAX_LENGTH = 120


@dataclass(frozen=True)
class TextEncoderConfig:
    """A small T5 encoder to train from scratch.

    `vocab_size` must be at least the sentencepiece model's. Dropout is off by default: T5 1.1 pre-trains
    without it, and it takes a quarter of a CPU step of this size.
    """

    vocab_size: int
    """Pieces of the vocabulary."""
    dim: int = 128
    """Channels of a token."""
    n_layer: int = 2
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads of a block."""
    ffn_dim: int = 256
    """Hidden channels of the feed-forward."""
    dropout: float = 0.0
    """Share of activations dropped while training."""
    max_length: int = DEFAULT_MAX_LENGTH
    """Longest caption in tokens, the end-of-sentence token included."""
    lower_case: bool = False
    """Lower-case the captions, those that are drawn from later as well."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layer", "n_head", "ffn_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"text encoder {name} is {getattr(self, name)}, but must be at least 1")
        if self.dim % self.n_head:
            raise ValueError(f"text encoder dim {self.dim} is not divisible by n_head {self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"text encoder dropout is {self.dropout}, but must be in [0, 1)")
