"""Captions to condition states: a T5 encoder with its vocabulary.

Two sources, one interface. A published T5 (flan-t5-xl: 2048 numbers a token, at most 120 tokens) is read with
`TextEncoder.from_pretrained` from a local folder or the Hugging Face hub and stays frozen; a small T5 for a
closed set of captions starts with `train_sentencepiece` and `TextEncoder.from_config` and is trained together
with the image model. Both are saved in the hub's own layout (config.json, model.safetensors, spiece.model),
so either reads back through `from_pretrained`, without a network.

Captions are padded on the left, so the last position is always a real token (the end-of-sentence token). T5
knows positions only as distances between tokens, hence the states of a caption do not depend on its padding.

Shape suffixes: B captions, L tokens of the longest caption in the batch, C state width.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from data_pipeline.atomic import write_bytes
from t2i.captions import (
    CLEANING_VERSION,
    SentencePieceVocabulary,
    Vocabulary,
    clean_caption,
    read_vocabulary,
    train_sentencepiece,
)
from t2i.text_encoder_config import DEFAULT_MAX_LENGTH, TextEncoderConfig

__all__ = [
    "TextEncoder",
    "TextEncoderConfig",
    "clean_caption",
    "resolve_folder",
    "text_encoder_sha256",
    "train_sentencepiece",
]

_VOCABULARY_FILES = ("spiece.model", "tokenizer.json")
_SMALL_FILES = ("config.json", *_VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json")
# Written by whoever saved the config last; none of them changes a state.
_BOOKKEEPING_KEYS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


class TextEncoder(nn.Module):
    """T5 encoder with its vocabulary: captions in, states out.

    Attributes:
        dim: width C of the states.
        max_length: most tokens of a caption, the end-of-sentence token included.
        lower_case: whether captions are lower-cased (see `clean_caption`).
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: T5Config,
        vocabulary: Vocabulary,
        max_length: int,
        lower_case: bool = False,
    ) -> None:
        """Use `from_pretrained` or `from_config`.

        `encoder` is a T5Stack: T5EncoderModel without its second name for the embedding, so that each
        parameter has one name, in `named_parameters` and in `state_dict`.
        """
        super().__init__()
        if max_length < 1:
            raise ValueError(f"text encoder max_length is {max_length}, but must be at least 1")
        if vocabulary.size > config.vocab_size:
            raise ValueError(
                f"the vocabulary has {vocabulary.size} pieces, but the text encoder embeds "
                f"{config.vocab_size}: set its vocab_size to {vocabulary.size}"
            )
        if (vocabulary.pad_id, vocabulary.eos_id) != (config.pad_token_id, config.eos_token_id):
            raise ValueError(
                f"the vocabulary has padding {vocabulary.pad_id} and end of sentence {vocabulary.eos_id}, "
                f"but the text encoder expects {config.pad_token_id} and {config.eos_token_id}: "
                "take config and vocabulary from the same model"
            )
        self.encoder = encoder
        self.config = config
        self.vocabulary = vocabulary
        self.dim = int(config.d_model)
        self.max_length = max_length
        self.lower_case = lower_case

    @classmethod
    def from_config(cls, config: TextEncoderConfig, sentencepiece_model: bytes | str | Path) -> Self:
        """A new encoder, in training mode, with T5's initialisation from torch's global generator.

        Raises:
            ValueError: no sentencepiece model there, or one with more pieces than `config.vocab_size`.
        """
        t5_config = T5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.dim // config.n_head,
            d_ff=config.ffn_dim,
            num_layers=config.n_layer,
            num_decoder_layers=0,
            num_heads=config.n_head,
            dropout_rate=config.dropout,
            feed_forward_proj="relu",
            is_encoder_decoder=False,
            use_cache=False,
        )
        # Transformers' own initialisation draws other numbers under ZeRO-3, where weights are partitioned by then; what
        # is drawn after it must not depend on that.
        with torch.random.fork_rng():
            encoder = T5EncoderModel(t5_config).encoder
        _initialise(encoder, t5_config)
        vocabulary = SentencePieceVocabulary(sentencepiece_model)
        return cls(encoder, t5_config, vocabulary, config.max_length, config.lower_case)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        max_length: int | None = None,
        lower_case: bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Read an encoder, in evaluation mode, from a folder or, if `source` is no folder, from the hub.

        `max_length` and `lower_case` default to what `save_pretrained` recorded, else to 120 and False.

        Raises:
            ValueError: a folder or file is missing, unreadable, or not a whole T5 encoder; the message
                says which.
        """
        folder = resolve_folder(source)
        config = _read_config(folder)
        encoder = _read_encoder(folder, config, dtype)
        vocabulary = read_vocabulary(folder)
        if max_length is None:
            max_length = int(getattr(config, "caption_max_length", DEFAULT_MAX_LENGTH))
        if lower_case is None:
            lower_case = bool(getattr(config, "caption_lower_case", False))
        return cls(encoder, config, vocabulary, max_length, lower_case).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and the vocabulary, as the hub lays out a T5 encoder."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.encoder.state_dict().items():
            if parameter.numel() == 0:
                raise ValueError(f"text encoder weight {name} is partitioned over ranks (ZeRO-3): gather it first")
            full_name = "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}"
            weights[full_name] = parameter.detach().cpu().contiguous()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = T5Config.from_dict(self.config.to_dict())
        config.architectures = ["T5EncoderModel"]
        config.caption_max_length = self.max_length
        config.caption_lower_case = self.lower_case
        config.save_pretrained(folder)
        # save_file's file would be for the owner's eyes only
        write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
        self.vocabulary.save(folder)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions, cleaned here, to ids [B, L] int64 and mask [B, L] bool (True = real token), on the CPU.

        Padded on the left to the longest. A caption of more than `max_length` tokens loses its end but keeps
        the end-of-sentence token; an empty caption is that token alone.
        """
        if isinstance(captions, str) or not captions:
            raise ValueError(f"tokenize needs a list of at least one caption, not {captions!r}")
        rows = []
        for caption in captions:
            ids = self.vocabulary.encode(clean_caption(caption, lower_case=self.lower_case))
            rows.append([*ids[: self.max_length - 1], self.vocabulary.eos_id])
        longest = max(len(row) for row in rows)
        ids_BL = torch.tensor([[self.vocabulary.pad_id] * (longest - len(row)) + row for row in rows])
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        mask_BL = torch.arange(longest) >= longest - lengths_B1
        return ids_BL, mask_BL

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """States [B, L, C] of tokens from `tokenize`, in the parameters' type; zeros at padded positions."""
        states_BLC: Tensor = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLC * mask_BL[:, :, None]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, C] and mask [B, L] of captions, without dropout or gradients."""
        device = next(self.parameters()).device
        ids_BL, mask_BL = (tensor.to(device) for tensor in self.tokenize(captions))
        training = self.training
        self.eval()
        try:
            return self(ids_BL, mask_BL), mask_BL
        finally:
            self.train(training)


def pad_left(states: Sequence[Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """Join text states [length, C] to [B, L, C] and a bool mask [B, L], padded on the left to the longest.

    Of more than `max_length` states the first are kept, and the end-of-sentence token's, as `TextEncoder.tokenize` does.
    """
    longest = min(max_length, max(len(state) for state in states))
    kept = [state if len(state) <= longest else torch.cat([state[: longest - 1], state[-1:]]) for state in states]
    padded_BLC = torch.stack([F.pad(state, (0, 0, longest - len(state), 0)) for state in kept])
    lengths_B1 = torch.tensor([[len(state)] for state in kept], device=padded_BLC.device)
    return padded_BLC, torch.arange(longest, device=padded_BLC.device) >= longest - lengths_B1


NEIGHBOURS = (-1, 1, -2, 2)
"""Where the first heads of a new encoder look at the start, in words from where they are; the others look anywhere."""
NEIGHBOUR_BIAS = 4.0
"""Their attention score for that place before any training: five sixths of the attention among a dozen words."""


def _initialise(encoder: nn.Module, config: T5Config) -> None:
    """Draw T5's initial weights (arXiv 1910.10683, Mesh TensorFlow's scales) layer by layer.

    The same distributions as transformers', with two changes. The maps out of attention and feed-forward start at zero: the
    states are then the words' own embeddings at first, and an image model behind them learns the words sooner. And the
    first heads start by looking at one neighbour each, so that "red" and the "circle" after it soon belong together.

    Drawn through `Module.apply`: DeepSpeed's `zero.Init` partitions a layer as soon as it is built and gathers it again
    only in there, so under ZeRO-3 whatever an outer module initialises is lost, transformers' own initialisation included.
    """
    deviations: dict[nn.Module, float] = {encoder.embed_tokens: 1.0}  # type: ignore[dict-item]
    for block in encoder.block:  # type: ignore[union-attr]
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        deviations[attention.q] = (config.d_model * config.d_kv) ** -0.5  # T5 does not scale its dot products
        deviations[attention.k] = deviations[attention.v] = config.d_model**-0.5
        deviations[attention.o] = deviations[feed_forward.wo] = 0.0
        if attention.has_relative_attention_bias:
            neighbours = attention.relative_attention_bias
        deviations[feed_forward.wi] = config.d_model**-0.5

    def draw(module: nn.Module) -> None:
        if module is neighbours:
            nn.init.zeros_(module.weight)
            for head, offset in zip(range(config.num_heads), NEIGHBOURS, strict=False):
                # T5's buckets: distances to the left come first, those to the right in the second half.
                bucket = abs(offset) + (config.relative_attention_num_buckets // 2 if offset > 0 else 0)
                with torch.no_grad():
                    module.weight[bucket, head] = NEIGHBOUR_BIAS
        elif module in deviations:
            nn.init.normal_(module.weight, std=deviations[module])  # type: ignore[arg-type]

    encoder.apply(draw)


def resolve_folder(source: str | Path) -> Path:
    """The local folder that `source` names: itself, or the hub repository's files, downloaded unless cached.

    What looks like a path (absolute, `./`, `~`, more than one slash, a `Path`) is never asked for on the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)?", name):
        raise ValueError(f"text encoder folder {name} does not exist")
    try:
        path = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "*.safetensors*"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, "pytorch_model*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text encoder {name} is not a folder here, and the Hugging Face hub did not give it: {error}"
        ) from error
    return path


def text_encoder_sha256(source: str | Path) -> str:
    """Hash of what decides a caption's states, for data manifests: weights, vocabulary, config and cleaning.

    A folder and its copy hash alike, also when another version of transformers has saved the config again.
    """
    folder = resolve_folder(source)
    _read_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _BOOKKEEPING_KEYS}
    digest = hashlib.sha256(f"cleaning {CLEANING_VERSION}\n{json.dumps(kept, sort_keys=True)}\n".encode())
    vocabulary_file = next(folder / name for name in _VOCABULARY_FILES if (folder / name).is_file())
    for path in (*_weight_files(folder), vocabulary_file):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: safetensors if there are any, else torch's own."""
    for single, parts in (
        ("model.safetensors", "model-*.safetensors"),
        ("pytorch_model.bin", "pytorch_model-*.bin"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if found := sorted(folder.glob(parts)):
            return found
    return []


def _read_config(folder: Path) -> T5Config:
    """The folder's config, once all parts of a text encoder are known to be there."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not _weight_files(folder):
        missing.append("weights (model.safetensors)")
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        missing.append("vocabulary (spiece.model or tokenizer.json)")
    if missing:
        raise ValueError(f"text encoder folder {folder} lacks {', '.join(missing)}")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "t5":
        found = values.get("model_type") if isinstance(values, dict) else None
        raise ValueError(f"{folder / 'config.json'} has model_type {found!r}, but a text encoder must be 't5'")
    try:
        return T5Config.from_dict(values)
    except Exception as error:  # transformers' own checks of fields are no ValueErrors
        raise ValueError(f"{folder / 'config.json'} is no T5 configuration: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_encoder(folder: Path, config: T5Config, dtype: torch.dtype) -> nn.Module:
    try:
        with _quiet_transformers():
            loaded: Any = T5EncoderModel.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"text encoder weights in {folder} cannot be read: {_one_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"text encoder weights in {folder} lack {len(missing)} tensors, such as {missing[0]}")
    encoder: nn.Module = model.encoder
    return encoder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the table of decoder weights that an encoder leaves unread, and without progress bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
