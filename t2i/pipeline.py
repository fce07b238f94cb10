"""Pictures or clips from a finished model: one folder in, PIL images out.

    pipe = TextToImagePipeline.from_pretrained("exports/shapes-tiny")
    images = pipe(["a photo of a red circle", "a photo of two stars"], seed=0)

    pipe = TextToImagePipeline.from_pretrained("exports/shapes-clips")
    clips = pipe.clips([3, 17], seed=0)  # a list of frames for each class

Reads what `t2i export` and `t2i convert` write; needs torch, transformers and safetensors, and neither DeepSpeed nor the
training code.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from data_pipeline.atomic import remove_leftovers, write_bytes
from t2i.config import ModelConfig, SampleConfig, from_json, to_json
from t2i.devices import find_device
from t2i.files import load_weights, read_json
from t2i.model import NAR
from t2i.sampling import Callback, generate
from t2i.text_encoder import TextEncoder, pad_left
from t2i.threads import one_thread_each
from t2i.vq import VQModel, images_to_tensor, tensor_to_images
from t2i.wavefronts import wavefront_sizes
from t2i.zipar import generate_zipar, passes_needed

FORMAT = 2
BATCH = 64  # samples drawn at once, where a call does not say
UNDRAWN = 128  # grey of what is not drawn yet
Prompts = str | int | Sequence[str] | Sequence[int]


class DrawOptions(TypedDict, total=False):
    """Options of drawing; see `TextToImagePipeline.tokens`."""

    seeds: Sequence[int] | None
    guidance_scale: float | None
    guidance_share: float
    temperature: float | None
    top_k: int | None
    top_p: float | None
    zipar_window: int | None
    zipar_adaptive: bool
    batch_size: int
    progress: bool
    watch: Callback | None


@dataclass(frozen=True)
class Provenance:
    """Where an export comes from."""

    recipe: str
    step: int


@dataclass(frozen=True)
class ExportDescription:
    """What the `config.json` of an export says; `image_size` in pixels a side."""

    provenance: Provenance
    image_size: int
    sample: SampleConfig
    model: ModelConfig
    tokenizer: bool = True
    """Whether it has an image tokenizer; without one it gives tokens and no pictures."""


def read_description(folder: Path) -> ExportDescription:
    """What an export says of itself. Raises ValueError where the folder holds none, or one of another format."""
    path = folder / "config.json"
    if not path.is_file():
        raise _no_export(folder, "it has no config.json")
    fields = read_json(path)
    if "format" not in fields:
        raise _no_export(folder, "its config.json describes something else")
    if fields["format"] != FORMAT:
        raise ValueError(
            f"{folder} has export format {fields['format']!r} and this version reads {FORMAT}; export it again"
        )
    return from_json(ExportDescription, path.read_bytes(), path)


def _no_export(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is no export: {reason}; make one with `t2i export RUN --out {folder}`")


class TextToImagePipeline:
    """Text encoder (for text models), NAR model and image tokenizer, ready to draw.

    Without a tokenizer, `vq` None, it gives token grids (`tokens`), and no pictures.
    """

    def __init__(
        self,
        model: NAR,
        vq: VQModel | None,
        text_encoder: TextEncoder | None,
        sample: SampleConfig,
        image_size: int,
        provenance: Provenance,
    ) -> None:
        assert (text_encoder is None) == (model.config.condition == "class")
        self.model, self.vq, self.text_encoder = model.eval(), vq, text_encoder
        for module in (vq, text_encoder):
            if module is not None:
                module.eval()
        self.sample, self.image_size, self.provenance = sample, image_size, provenance

    @property
    def device(self) -> torch.device:
        return self.model.tokens.weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move all models to a device."""
        for module in (self.model, self.vq, self.text_encoder):
            if module is not None:
                module.to(device)
        return self

    @property
    def draws_clips(self) -> bool:
        """Whether this is a video model, which draws with `clips`; one that draws pictures is called."""
        return len(self.model.config.grid) == 3

    def __call__(self, prompts: Prompts, seed: int | None = None, **options: Unpack[DrawOptions]) -> list[Image.Image]:
        """Draw one picture per prompt. Arguments and errors as of `tokens`, and a ValueError for a model that draws clips
        or has no tokenizer."""
        if self.draws_clips:
            raise ValueError("this model draws clips, not pictures; call its method `clips`")
        return [Image.fromarray(pixels) for pixels in self._draw(prompts, seed, **options)]

    def clips(
        self, prompts: Prompts, seed: int | None = None, **options: Unpack[DrawOptions]
    ) -> list[list[Image.Image]]:
        """Draw one clip per prompt, a list of frames. Arguments and errors as of a call, with clips for pictures."""
        if not self.draws_clips:
            raise ValueError("this model draws pictures, not clips; call it instead of its method `clips`")
        return [[Image.fromarray(frame) for frame in frames] for frames in self._draw(prompts, seed, **options)]

    def _draw(self, prompts: Prompts, seed: int | None, **options: Unpack[DrawOptions]) -> list[np.ndarray]:
        """Pictures uint8 [H, W, 3] or clips [t, H, W, 3], one per prompt."""
        self.tokenizer()  # before anything is drawn in vain
        tokens = self.tokens(prompts, seed, **options)
        return [one for part in tokens.split(options.get("batch_size", BATCH)) for one in self.decode(part)]

    def tokens(
        self,
        prompts: Prompts,
        seed: int | None = None,
        *,
        seeds: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_share: float = 1.0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        zipar_window: int | None = None,
        zipar_adaptive: bool = False,
        batch_size: int = BATCH,
        progress: bool = False,
        watch: Callback | None = None,
    ) -> Tensor:
        """Draw one token grid per prompt, int64 [B, *grid]; needs no tokenizer.

        Args:
            prompts: A caption or several; for a class-conditional model, class numbers.
            seed: The n-th sample is drawn with seed + n; the same seed and prompt give the same pixels.
            seeds: One for each prompt instead.
            guidance_scale, temperature, top_k, top_p: What the export was made with, unless given.
            guidance_share: Share of the passes that are guided; see `t2i.sampling.generate`.
            zipar_window: Decode a raster model with ZipAR (`t2i.zipar`): tokens of a row after which the next one starts.
            zipar_adaptive: Take that window as the least.
            batch_size: Samples drawn at once, at most.
            progress: Show a bar over passes.
            watch: Called after each pass with its number and the batch's tokens so far, -1 where there is none yet;
                `unfinished` makes pictures of them.

        Raises ValueError for prompts of the wrong kind, class numbers that do not exist, and options out of range.
        """
        items: list[str | int] = [prompts] if isinstance(prompts, str | int) else list(prompts)
        if not items:
            raise ValueError("no prompts; give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; draw at least 1 picture at once")
        if seed is not None:
            if seeds is not None:
                raise ValueError("both seed and seeds are given; give one of them")
            seeds = [seed + n for n in range(len(items))]
        if seeds is not None and len(seeds) != len(items):
            raise ValueError(f"{len(seeds)} seeds for {len(items)} prompts; give one for each")
        if zipar_adaptive and zipar_window is None:
            raise ValueError("zipar_adaptive needs zipar_window, the least window; give 1 or more")
        if zipar_window is not None and guidance_share != 1:
            raise ValueError("guidance_share is not for ZipAR; leave one of them out")
        options: dict[str, Any] = {
            "guidance_scale": self.sample.guidance_scale if guidance_scale is None else guidance_scale,
            "temperature": self.sample.temperature if temperature is None else temperature,
            "top_k": self.sample.top_k if top_k is None else top_k,
            "top_p": self.sample.top_p if top_p is None else top_p,
        }
        draw: Callable[..., Tensor] = partial(generate, guidance_share=guidance_share)
        if zipar_window is not None:
            draw = partial(generate_zipar, window=zipar_window, adaptive=zipar_adaptive)
        self.model.pack()
        drawn: list[Tensor] = []
        with tqdm(total=self._passes(len(items), batch_size, zipar_window, zipar_adaptive), desc="decode", unit="pass",
                  disable=not progress) as bar:  # fmt: skip

            def after_pass(number: int, tokens: Tensor) -> None:
                bar.update()
                if watch is not None:
                    watch(number, tokens)

            for start in range(0, len(items), batch_size):
                part = slice(start, start + batch_size)
                condition, mask = self._condition(items[part])
                drawn.append(
                    draw(
                        self.model, condition, mask, seeds=None if seeds is None else seeds[part],
                        callback=after_pass if progress or watch is not None else None, **options,
                    )
                )  # fmt: skip
        return torch.cat(drawn)

    def _passes(self, samples: int, batch_size: int, window: int | None, adaptive: bool) -> int | None:
        """Passes of a call, or None where they are not known beforehand."""
        batches = -(-samples // batch_size)
        if window is None:
            return batches * len(wavefront_sizes(self.model.config.schedule))
        rows, columns = self.model.config.grid[-2:]
        return None if adaptive else batches * passes_needed(rows, columns, window)

    def tokenizer(self) -> VQModel:
        """The image tokenizer. Raises ValueError where there is none."""
        if self.vq is None:
            raise ValueError(
                f"this export of {self.provenance.recipe} has no image tokenizer: it gives tokens (the pipeline's `tokens`) "
                "and no pictures; make it again with `t2i convert ... --vq TOKENIZER`"
            )
        return self.vq

    def _condition(self, items: list[str | int]) -> tuple[Tensor, Tensor | None]:
        if self.text_encoder is None:
            classes = self.model.config.num_classes
            wrong = [item for item in items if not isinstance(item, int) or not 0 <= item < classes]
            if wrong:
                raise ValueError(f"{wrong[0]!r} is no class of this model; give whole numbers from 0 to {classes - 1}")
            return torch.tensor(items, device=self.device), None
        wrong = [item for item in items if not isinstance(item, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no caption; this model draws from text")
        with torch.inference_mode():
            ids, mask = self.text_encoder.tokenize([str(item) for item in items])
            mask = mask.to(self.device)
            states = self.text_encoder(ids.to(self.device), mask)
            # A published encoder takes longer captions than some models; trimmed as in training.
            real = [row[kept] for row, kept in zip(states, mask, strict=True)]
            states, mask = pad_left(real, self.model.config.max_condition)
        return states.to(self.model.tokens.weight.dtype), mask

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures of token grids, int64 [B, h, w] -> uint8 [B, H, W, 3]; of clips, [B, t, h, w] -> [B, t, H, W, 3]."""
        vq = self.tokenizer()

        @torch.inference_mode()
        def picture(tokens_hw: Tensor) -> np.ndarray:
            return tensor_to_images(vq.decode(tokens_hw[None]))[0]

        # One by one: other batch sizes and numbers of threads round otherwise, and a picture's pixels must not depend on
        # what it was drawn with, nor on how many ranks share a host. Costs little beside the passes that drew the tokens.
        frames = tokens.reshape(-1, *tokens.shape[-2:]).unbind()
        pictures = one_thread_each(picture, frames) if tokens.device.type == "cpu" else [*map(picture, frames)]
        return np.stack(pictures).reshape(*tokens.shape[:-2], *pictures[0].shape)

    def unfinished(self, tokens: Tensor) -> np.ndarray:
        """As `decode`, of tokens some of which are not drawn yet (-1); their places are grey."""
        pixels = self.decode(tokens.clamp_min(0))
        missing = (tokens < 0).cpu().numpy()
        side = pixels.shape[-2] // missing.shape[-1]
        pixels[missing.repeat(side, -2).repeat(side, -1)] = UNDRAWN
        return pixels

    @torch.inference_mode()
    def encode_decode(self, images: np.ndarray) -> np.ndarray:
        """What the tokenizer makes of pictures: uint8 [B, H, W, 3] -> the same."""
        return self.decode(self.tokenizer().encode(images_to_tensor(images).to(self.device)))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything to one folder: JSON, safetensors and the vocabulary; `config.json` last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        # An export that is written over is none until it is whole again.
        (folder / "config.json").unlink(missing_ok=True)
        if self.vq is not None:
            self.vq.save(folder / "tokenizer")
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / "text_encoder")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_bytes(folder / "model.safetensors", save(weights))  # save_file's would be for the owner's eyes only
        description = {
            "format": FORMAT,
            "provenance": asdict(self.provenance),
            "image_size": self.image_size,
            "sample": json.loads(to_json(self.sample)),
            "model": json.loads(to_json(self.model.config)),
            "tokenizer": self.vq is not None,
        }
        write_bytes(folder / "config.json", json.dumps(description, indent=2).encode())

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        """The pipeline of an exported folder. Raises ValueError that names what is missing or does not fit, or
        where this machine has no such device."""
        folder, device = Path(folder), find_device(device)
        described = read_description(folder)
        if not (folder / "model.safetensors").is_file():
            raise _no_export(folder, "it has no model.safetensors")
        model = NAR(described.model)
        load_weights(model, folder / "model.safetensors", "config.json")
        pipe = cls(
            model,
            VQModel.from_folder(folder / "tokenizer") if described.tokenizer else None,
            TextEncoder.from_pretrained(folder / "text_encoder") if described.model.condition == "text" else None,
            described.sample,
            described.image_size,
            described.provenance,
        )
        return pipe.to(device)


def picture_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures of one size side by side in rows of at most `columns` (a square where not given), `gap` pixels apart."""
    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    rows = -(-len(images) // columns)
    width, height = (side + gap for side in images[0].size)
    grid = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for n, image in enumerate(images):
        grid.paste(image, ((n % columns) * width, (n // columns) * height))
    return grid
