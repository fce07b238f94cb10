"""The numbers that define a model and a run: frozen dataclasses, checked when made, written and read as JSON.

One owner for each number: micro-batch, accumulation, clipping, precision, ZeRO stage and offload live in the DeepSpeed
JSON; everything else lives here.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from t2i.grid import check_grid
from t2i.text_encoder_config import TextEncoderConfig

Config = TypeVar("Config")
_STRICT = ConfigDict(extra="forbid")


def _at_least(config: Any, bound: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) < bound:
            kind = type(config).__name__
            raise ValueError(f"{kind}: {name} is {getattr(config, name)}; it must be at least {bound}")


def _share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)}; it must be in [0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """A NAR transformer, or a raster one. The defaults are the image model's; presets are in `t2i.recipes`."""

    __pydantic_config__ = _STRICT  # a misspelt field is an error, not a default

    grid: tuple[int, ...] = (16, 16)
    """Tokens along each axis: (rows, columns) for images, (frames, rows, columns) for video."""
    order: Literal["neighbor", "raster"] = "neighbor"
    """All tokens of one Manhattan distance in a pass, with a prediction head for each axis (NAR), or row by row, one token
    a pass, with one head (LlamaGen, arXiv 2406.06525): the baseline."""
    vocab_size: int = 16384
    """Codes of the image tokenizer."""
    n_layer: int = 12
    """Trunk blocks; in neighbor order each axis after the last adds one more."""
    n_head: int = 12
    """Attention heads of a block."""
    n_kv_head: int | None = None
    """Grouped key-value heads; as many as heads when not given."""
    width: int = 768
    """Channels of a token in the transformer."""
    ffn_multiple: int = 256
    """The feed-forward has 8/3 of the width in hidden channels, rounded up to a multiple of this. The published 256 makes a
    narrow model half as large again."""
    condition: Literal["text", "class"] = "text"
    """What a picture is drawn from: a caption or a class number."""
    condition_dim: int = 2048
    """Channels of the text states."""
    max_condition: int = 120
    """Longest caption in tokens."""
    num_classes: int = 1000
    """Classes of a class-conditional model."""
    positions: Literal["rotary", "learned"] = "rotary"
    """2-D rotary embedding for images, or a learned table for any grid."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    prefix_rotary: Literal["identity", "sequence", "zero"] = "identity"
    """Rotation of prefix positions: none; as if the words stood in the first row, left of the grid, so that attention can
    tell which word is next to which; or the factor 0 that published checkpoints were trained with."""
    uncond_embedding: Literal["learned", "frozen"] = "learned"
    """Whether the prefix that stands in for a dropped caption is trained; published ones are frozen."""
    uncond_tokens: int = 1
    """Positions of the unconditional prefix of a text model. It has its own length, so a dropped caption costs no more
    than this and tells nothing of the caption that it stands in for."""
    uncond_mask: Literal["full", "caption"] = "full"
    """What the unconditional branch attends to: its whole prefix, or (published) as many of the last positions of a
    prefix of `max_condition` as the caption has, which leaks the caption's length."""
    init_std: float = 0.02
    """Standard deviation of the weights at the start. 0.02 suits widths of 768 and more; a narrow model learns sooner
    with about 1 / sqrt(width), with which a map keeps the size of what it is given."""
    residual_init: Literal["normal", "zero"] = "normal"
    """How the maps out of attention and feed-forward start; with "zero" every block at first passes on what it is given,
    and a small model learns sooner."""
    zero_init_heads: Literal["last", "all"] = "last"
    """Which prediction heads start at zero: that of the last axis, or all (video)."""
    dropout: float = 0.1
    """Residual, feed-forward and token dropout while training."""
    condition_dropout: float = 0.1
    """How often the condition is replaced by the unconditional one while training."""

    def __post_init__(self) -> None:
        check_grid(self.grid)
        _at_least(self, 1, "vocab_size", "n_layer", "n_head", "width", "ffn_multiple")
        _at_least(self, 1, "condition_dim", "max_condition", "num_classes")
        _share(self, "dropout", "condition_dropout")
        if self.init_std <= 0:
            raise ValueError(f"ModelConfig: init_std is {self.init_std}; it must be above 0 (0.02 is usual)")
        if self.width % self.n_head:
            raise ValueError(f"ModelConfig: width {self.width} is not divisible by n_head {self.n_head}; change one")
        head_dim = self.width // self.n_head
        if self.positions == "rotary" and (len(self.grid) != 2 or head_dim % 4):
            raise ValueError(
                f"ModelConfig: 2-D rotary positions need a grid of two axes and a head dimension divisible by 4; got "
                f"grid {self.grid} and {head_dim}; use positions 'learned' or change them"
            )
        if not 1 <= self.uncond_tokens <= self.max_condition:
            raise ValueError(
                f"ModelConfig: uncond_tokens is {self.uncond_tokens}; it must be in 1..max_condition ({self.max_condition})"
            )
        if self.uncond_mask == "caption" and self.uncond_tokens != self.max_condition:
            raise ValueError(
                f"ModelConfig: uncond_mask 'caption' needs uncond_tokens {self.max_condition} (max_condition), not "
                f"{self.uncond_tokens}"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(f"ModelConfig: n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")

    @property
    def schedule(self) -> tuple[int, ...]:
        """The grid as it is written: itself, or, in raster order, unrolled to one axis, along which the next token is the
        only neighbor. Its wavefronts are the passes of decoding."""
        return self.grid if self.order == "neighbor" else (math.prod(self.grid),)

    @property
    def n_axes(self) -> int:
        """Axes of the schedule, each with a prediction head."""
        return len(self.schedule)

    @property
    def residual_std(self) -> float:
        """Standard deviation at the start of the maps out of attention and feed-forward."""
        return 0.0 if self.residual_init == "zero" else self.init_std

    @property
    def prefix(self) -> int:
        """Positions before the grid at most: caption tokens, or one for a class."""
        return self.max_condition if self.condition == "text" else 1

    @property
    def hidden(self) -> int:
        """Hidden size of the SwiGLU feed-forward: int(8 d / 3) rounded up to a multiple of `ffn_multiple`."""
        return -(-int(8 * self.width / 3) // self.ffn_multiple) * self.ffn_multiple


@dataclass(frozen=True)
class DataConfig:
    """Where the encoded shards are and how they are walked."""

    __pydantic_config__ = _STRICT  # a misspelt field is an error, not a default

    path: Path = Path("data/encoded")
    """Folder of encoded shards."""
    validation: int = 512
    """Samples at the end of the set that are kept for the validation loss."""
    lanes: int = 64
    """Parts of the set that are read side by side; a multiple of the number of ranks, and a divisor of the batch."""
    workers: int = 2
    """Reader threads a rank."""
    unreadable: Literal["error", "replace"] = "error"
    """What to do about a sample that cannot be read, though the index has it: end the run, or train on the next one that
    can be read in its place, on whatever rank it is met, and count it."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "validation")
        _at_least(self, 1, "lanes", "workers")


@dataclass(frozen=True)
class TrainConfig:
    """Schedule, optimizer, logging and saving."""

    __pydantic_config__ = _STRICT  # a misspelt field is an error, not a default

    steps: int = 1000
    """Optimizer steps of the whole run."""
    lr: float = 1e-4
    """Highest learning rate, reached after the warm-up."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine over all steps, or constant until the last `decay_steps`, in which it falls linearly."""
    decay_steps: int = 0
    """Last steps of the constant schedule, in which the learning rate falls to `min_lr`; 0 keeps it to the end."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices; norms and embeddings have none."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is exported in their place; 0 keeps none."""
    head_init: Literal["normal", "codebook"] = "normal"
    """How the prediction heads start: as the model's configuration says, or from the image tokenizer's code vectors, with
    which a small model learns from far fewer pictures what words stand for."""
    seed: int = 0
    """Decides start weights, order of samples, dropout and dropped captions."""
    log_every: int = 10
    """Steps between reports of the loss."""
    validate_every: int = 500
    """Steps between measurements of the validation loss."""
    sample_every: int = 0
    """Steps between sample grids; 0 writes none."""
    sample_prompts: tuple[str, ...] = ()
    """Captions (or class numbers) of the sample grid."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0 keeps none but the newest."""
    background_save: bool = True
    """Write checkpoints while training goes on, which stands still only while they are copied to the processor's memory;
    needs room there for the copy."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Whether a checkpoint that cannot be written, for want of space for example, ends the run or is only reported."""
    max_bad_steps: int = 10
    """So many steps in a row whose loss or gradients are no finite numbers end the run; each is left out."""
    spike_deviations: float = 8.0
    """A loss so many standard deviations above the mean of the last 100 steps is reported with its samples; 0 reports none."""
    init_from: str | None = None
    """Export or run folder whose weights a new run starts from, as the 512-pixel stage does from the 256-pixel one."""
    compile: bool = False
    """Compile the model (torch.compile), which takes half a minute at the start. Checkpoints do not depend on it."""
    watchdog_seconds: float = 1800.0
    """Seconds without a finished step, or another sign of life (saving, validating and sampling count), after which the stacks
    of all ranks are written and the job ends; four times as many before the first step. 0 waits for ever."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more work."""
    peak_tflops: float | None = None
    """Peak of a rank's device in TFLOP/s, of which reports give the share that the model makes use of ("mfu"). When not given,
    that of the GPU's data sheet; where there is none, what a large product is measured to reach at the start."""
    wandb_project: str = "nar-t2i"
    """Project of the run at wandb."""
    wandb: Literal["auto", "offline", "online", "disabled"] = "auto"
    """"auto" logs online when WANDB_API_KEY is set and offline otherwise."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "log_every", "validate_every", "save_every", "keep_last", "max_bad_steps")
        _at_least(self, 0, "warmup_steps", "weight_decay", "min_lr", "sample_every", "keep_every", "decay_steps")
        _at_least(self, 0, "spike_deviations", "watchdog_seconds")
        if 0 < self.watchdog_seconds < 3:
            raise ValueError(
                f"TrainConfig: watchdog_seconds is {self.watchdog_seconds}, and ranks tell of their steps once a second; "
                "use 3 or more, or 0 to wait for ever"
            )
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"TrainConfig: peak_tflops is {self.peak_tflops}; it must be above 0, or left out")
        if self.lr_schedule == "cosine" and self.decay_steps:
            raise ValueError(
                f"TrainConfig: decay_steps is {self.decay_steps}, which is for lr_schedule 'constant'; leave it 0 with a cosine"
            )
        _share(self, "beta1", "beta2", "ema_decay")
        if self.lr <= 0 or self.min_lr > self.lr:
            raise ValueError(f"TrainConfig: lr is {self.lr} and min_lr {self.min_lr}; use 0 <= min_lr <= lr, lr > 0")


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn from the finished model unless a call says otherwise; exported with it."""

    __pydantic_config__ = _STRICT  # a misspelt field is an error, not a default

    guidance_scale: float = 7.5
    """Strength of classifier-free guidance; 1 is without."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this probability mass; 1 keeps all."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "guidance_scale", "temperature", "top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SampleConfig: top_p is {self.top_p}; it must be in (0, 1]")


@dataclass(frozen=True)
class EvalConfig:
    """GenEval in training: scores of a few pictures, on the first rank. `t2i geneval run` measures for real."""

    geneval_every: int = 0
    """Steps between scores, which the last step has as well; 0 never scores."""
    per_task: int = 10
    """Prompts of each task, at most, always the same; a picture each."""
    judge: Literal["shapes", "mask2former"] = "shapes"
    """"shapes" is the exact judge of the embedded data, with prompts of its own; "mask2former" is GenEval's, with the first
    published prompts of each task."""
    detector: str | None = None
    """Folder or hub name of the Mask2Former; that of `t2i geneval score` when not given, as for the next two."""
    clip: str | None = None
    """open_clip's architecture of the model that tells colours, or local-dir:FOLDER."""
    clip_pretrained: str | None = None
    """Its weights: a tag of open_clip's, or a file."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "geneval_every")
        _at_least(self, 1, "per_task")


@dataclass(frozen=True)
class Recipe:
    """A whole run: model, text encoder, tokenizer, data, schedule."""

    __pydantic_config__ = _STRICT  # a misspelt field is an error, not a default

    name: str
    """Name of the recipe, shown in reports."""
    model: ModelConfig
    tokenizer: str
    """Image tokenizer: a folder, or "shapes" for the one that the package ships."""
    image_size: int
    """Pixels a side."""
    text_encoder: TextEncoderConfig | None = None
    """A small T5 encoder trained together with the model; without one, text states come from the shards."""
    frozen_text_encoder: str | None = None
    """Folder or hub name of the T5 whose states are in the shards; loaded for the sample grid and the export."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run_dir: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics, sample grids."""

    def __post_init__(self) -> None:
        encoders = (self.text_encoder is not None) + (self.frozen_text_encoder is not None)
        if self.model.condition == "class" and encoders:
            raise ValueError(f"recipe {self.name}: a class-conditional model takes no text encoder")
        if self.model.condition == "class" and not all(p.isdecimal() for p in self.train.sample_prompts):
            raise ValueError(
                f"recipe {self.name}: sample prompts of a class-conditional model have to be class numbers"
            )
        if self.model.condition == "text" and encoders != 1:
            raise ValueError(
                f"recipe {self.name}: a text model needs one of text_encoder and frozen_text_encoder, and {encoders} are set"
            )
        if self.eval.geneval_every and (self.model.condition != "text" or len(self.model.grid) != 2):
            raise ValueError(
                f"recipe {self.name}: eval.geneval_every is {self.eval.geneval_every}, and GenEval is about pictures of "
                "captions; set it to 0"
            )
        if self.eval.geneval_every and self.eval.judge == "shapes" and self.image_size != 64:
            raise ValueError(
                f"recipe {self.name}: eval.judge is 'shapes', which sees pictures of 64x64 alone, and image_size is "
                f"{self.image_size}; set eval.judge to mask2former, or eval.geneval_every to 0"
            )
        if self.text_encoder is not None:
            if self.text_encoder.dim != self.model.condition_dim:
                raise ValueError(
                    f"recipe {self.name}: text encoder has {self.text_encoder.dim} channels and the model takes "
                    f"{self.model.condition_dim}; make them equal"
                )
            if self.text_encoder.max_length > self.model.max_condition:
                raise ValueError(
                    f"recipe {self.name}: captions of {self.text_encoder.max_length} tokens do not fit into "
                    f"max_condition {self.model.max_condition}"
                )


def to_json(config: Any) -> str:
    """A dataclass of this module as indented JSON text."""
    return TypeAdapter(type(config)).dump_json(config, indent=2).decode()


def from_json(kind: type[Config], text: str | bytes, source: Path | str | None = None) -> Config:
    """The inverse of `to_json`; `source` is where the text is from.

    Raises ValueError, one line that names the source and every unknown, missing or wrong field.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        problems = "; ".join(_problem(one) for one in error.errors(include_url=False))
        raise ValueError(f"{source or 'JSON'} is no {kind.__name__}: {problems}") from error


def _problem(error: ErrorDetails) -> str:
    field_name = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "missing"):
        return f"{field_name} is {'missing' if error['type'] == 'missing' else 'no field of it'}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "json_invalid"):  # these say what they are about
        return message
    return f"{field_name} is {str(error['input'])[:40]!r} ({message[:1].lower()}{message[1:]})"
