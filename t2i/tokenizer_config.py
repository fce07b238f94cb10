"""Sizes of the image tokenizer and how it is trained: plain numbers, importable without torch."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a `VQModel`; the defaults are VQ-16 (stride 16, 72M parameters). Checked at construction."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a misspelt field in JSON is an error, not a default)

    base_channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of the base; each after the first halves it."""
    n_res_blocks: int = 2
    """Residual blocks of a resolution."""
    z_channels: int = 256
    """Channels between encoder and codebook."""
    codebook_size: int = 16384
    """Number of codes."""
    codebook_dim: int = 8
    """Channels of a code."""
    norm_groups: int = 32
    """Groups of a GroupNorm."""
    encoder: Literal["convolutional", "patches"] = "convolutional"
    """`patches` sees the pixels of its own token alone, so that a token says the same wherever it stands: fewer ways to
    say one thing, which a small model on simple pictures learns sooner. The decoder is the same."""

    def __post_init__(self) -> None:
        if self.encoder not in ("convolutional", "patches"):
            raise ValueError(f"tokenizer encoder is {self.encoder!r}; it must be convolutional or patches")
        for name in (f.name for f in fields(self) if f.name != "encoder"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < 1:
                    raise ValueError(f"tokenizer {name} is {value}; it must be at least 1")
        if self.codebook_size > 65536:
            raise ValueError(
                f"tokenizer codebook_size is {self.codebook_size}; shards hold 16-bit codes, so at most 65536"
            )
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"tokenizer has {self.base_channels * multiplier} channels at one level, not divisible by "
                    f"norm_groups {self.norm_groups}; change one of them"
                )

    @property
    def stride(self) -> int:
        """Pixels a side that one token stands for."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class TokenizerTraining:
    """How to train a tokenizer; the defaults are those of the one that the package ships for shapes."""

    data: Path
    """Folder of indexed image-text tars."""
    out: Path
    """Folder for weights, training state, metrics and previews."""
    image_size: int = 64
    """Pixels a side; pictures are cropped to a square and resized."""
    model: VQConfig = field(
        default_factory=lambda: VQConfig(
            base_channels=8, channel_multipliers=(1, 2, 4, 12), n_res_blocks=1, z_channels=96, codebook_size=512,
            codebook_dim=64, norm_groups=8, encoder="patches",
        )
    )  # fmt: skip
    steps: int = 3600
    """Optimizer steps of the whole training."""
    batch: int = 32
    """Pictures of a step."""
    lr: float = 2e-3
    """Highest learning rate, from which a cosine falls to zero."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly."""
    train_encoder: bool = False
    """Whether the encoder learns. Left as it starts, an encoder of patches is a random map of their pixels, and the
    codebook k-means over it: patches that differ stay different, which a small autoencoder in training forgets."""
    unquantized_steps: int = 0
    """Steps before the codebook starts: some hundreds where the encoder learns."""
    commitment: float = 0.25
    """Weight of the loss that keeps encoder outputs near their codes."""
    revive_every: int = 50
    """Steps after which a code that no position chose is moved onto an encoder output."""
    validation: int = 512
    """Samples at the end of the set that are kept for measuring."""
    lanes: int = 32
    """Parts of the set that are read side by side; a divisor of the batch."""
    seed: int = 0
    """Decides start weights and the order of pictures."""
    save_every: int = 250
    """Steps between savings and measurements."""
    device: str | None = None
    """Where to train; the first GPU or the processor when not given."""

    def __post_init__(self) -> None:
        for name in ("image_size", "steps", "batch", "revive_every", "validation", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer training: {name} is {getattr(self, name)}; it must be at least 1")
        if self.unquantized_steps >= self.steps:
            raise ValueError(
                f"tokenizer training: {self.unquantized_steps} unquantized steps leave none of {self.steps} for the "
                "codebook; use fewer"
            )
        if self.image_size % self.model.stride:
            raise ValueError(
                f"tokenizer training: image size {self.image_size} is not a multiple of the stride {self.model.stride}"
            )

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
