"""Pictures for a set of prompts, in GenEval's published folder layout.

    generate(TextToImagePipeline.from_pretrained(EXPORT), read_prompts(FOLDER), Path("images"))

leaves `00000/metadata.jsonl` (the prompt's entry), `00000/samples/0000.png` and so on, and `00000/grid.png` for each
prompt. Every picture's seed follows from its prompt's index and its own number alone, so the pictures depend neither
on the batch size nor on how many ranks share the work. Pictures that exist already are not made again.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from data_pipeline.atomic import remove_leftovers, write_bytes
from eval.files import write_text
from eval.ranks import Ranks
from t2i.pipeline import picture_grid

__all__ = ["Pipeline", "generate", "picture_seed", "prompt_folder", "sample_path"]

SETTINGS_FILE = "generation.json"


class Pipeline(Protocol):
    """What makes the pictures; `t2i.pipeline.TextToImagePipeline` is one."""

    def __call__(self, prompts: list[str], *, seeds: list[int], **sampling: Any) -> list[Image.Image]:
        """One picture per prompt, each depending only on its own prompt and seed."""
        ...


@dataclass(frozen=True)
class _Picture:
    """One picture to make: which number of which prompt."""

    prompt_index: int
    number: int


def picture_seed(prompt_index: int, number: int, seed: int = 0) -> int:
    """The seed of picture `number` of prompt `prompt_index`, 0 <= seed < 2**63, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompt_folder(out: Path, prompt_index: int) -> Path:
    """The folder of one prompt."""
    return out / f"{prompt_index:05d}"


def sample_path(out: Path, prompt_index: int, number: int) -> Path:
    """The file of one picture."""
    return prompt_folder(out, prompt_index) / "samples" / f"{number:04d}.png"


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _claim(file: Path, content: dict[str, Any], what: str) -> None:
    """Write `content` unless the file is there already, which must then say the same."""
    if not file.exists():
        write_text(file, json.dumps(content) + "\n")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        found = None
    if found != content:
        raise ValueError(f"{file} is of {what}; choose another output folder or delete {file.parent}")


def _write_grid(out: Path, prompt_index: int, images_per_prompt: int) -> None:
    images = []
    for number in range(images_per_prompt):
        with Image.open(sample_path(out, prompt_index, number)) as image:
            images.append(image.convert("RGB"))
    write_bytes(prompt_folder(out, prompt_index) / "grid.png", _png(picture_grid(images, columns=4, gap=0)))


def generate(
    pipe: Pipeline,
    prompts: Sequence[Mapping[str, Any]],
    out: Path,
    images_per_prompt: int = 4,
    batch_size: int = 64,
    rank: int = 0,
    ranks: int = 1,
    *,
    seed: int = 0,
    model: str = "",
    sampling: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> int:
    """Make the pictures of `prompts` that are still missing under `out`.

    Args:
        pipe: Makes pictures from prompts and seeds.
        prompts: GenEval metadata entries; prompt number i goes to folder i.
        out: The folder to fill.
        images_per_prompt: Pictures of each prompt.
        batch_size: Pictures per call of the pipeline; a batch goes across prompts.
        rank: This process's number among `ranks` that share the work; it makes prompts rank, rank + ranks, ...
        ranks: How many processes share the work.
        seed: Another seed gives other pictures.
        model: What the pictures are of, such as a checksum of the export; pictures of another model are never
            mixed in.
        sampling: Further keyword arguments of the pipeline, such as guidance_scale.
        progress: Show a progress bar.

    Returns:
        How many pictures were made; the others existed.

    Raises:
        ValueError: no prompts, numbers out of range, or `out` holds pictures of other prompts or settings.
    """
    if not prompts:
        raise ValueError("there are no prompts to generate; write them first")
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"images per prompt is {images_per_prompt} and batch size {batch_size}; both must be at least 1"
        )
    share = Ranks(rank, ranks)
    sampling = dict(sampling or {})
    settings = {"model": model, "seed": seed, "sampling": sampling}
    _claim(out / SETTINGS_FILE, settings, "another model, seed or sampling setting")

    remove_leftovers(out)
    mine = [index for index in range(len(prompts)) if share.owns(index)]
    for index in mine:
        _claim(prompt_folder(out, index) / "metadata.jsonl", dict(prompts[index]), "another prompt")
    pictures = [_Picture(index, number) for index in mine for number in range(images_per_prompt)]
    missing = [p for p in pictures if not sample_path(out, p.prompt_index, p.number).exists()]
    with tqdm(
        total=len(pictures), initial=len(pictures) - len(missing), unit="picture", desc="generate",
        disable=not progress or rank != 0,
    ) as bar:  # fmt: skip
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            images = pipe(
                [prompts[p.prompt_index]["prompt"] for p in batch],
                seeds=[picture_seed(p.prompt_index, p.number, seed) for p in batch],
                **sampling,
            )
            for picture, image in zip(batch, images, strict=True):
                write_bytes(sample_path(out, picture.prompt_index, picture.number), _png(image.convert("RGB")))
            bar.update(len(batch))
    # A grid is made again when any of its pictures is new, also when more pictures per prompt are asked for later.
    changed = {picture.prompt_index for picture in missing}
    for index in mine:
        if index in changed or not (prompt_folder(out, index) / "grid.png").exists():
            _write_grid(out, index, images_per_prompt)
    return len(missing)
