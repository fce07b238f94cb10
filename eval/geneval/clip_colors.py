"""Colours of detected objects by CLIP, zero-shot over GenEval's ten, as in GenEval's published evaluation.

    colors = ClipColors("ViT-L-14", "openai")
    names = colors.classify([(image, detection), ...])

An object is what its box cuts out of its picture, after everything outside its mask has been painted grey (#999).

`open_clip` no longer sets QuickGELU, the activation that OpenAI's weights were trained with, from the tag "openai": it only
warns that "ViT-L-14" has another. The published evaluation had it, and here it is set for every tag that open_clip knows
to need it.

Legend of name suffixes: N objects, C colours, D features.

Source: GenEval, evaluation/evaluate_images.py (ImageCrops, color_classification); Radford et al. 2021, arXiv 2103.00020.
Published numbers were taken under autocast; here everything is float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import parse_model_name
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from PIL import Image as PillowImage
from torch import Tensor

from eval.files import file_sha256, files_sha256
from eval.geneval.detections import Detection, Image
from eval.geneval.prompts import COLORS
from eval.geneval.weights import not_here, snapshot

__all__ = ["TEMPLATES", "ClipColors", "ClipWeights", "find_clip", "load_clip", "object_crop"]

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 153  # 0x99
BATCH = 64  # crops at once


@dataclass(frozen=True)
class ClipWeights:
    """A CLIP model whose files are on this machine.

    Attributes:
        arch: open_clip's name of the architecture, or local-dir:FOLDER.
        pretrained: The file of the weights; None where the folder of `arch` has them.
        quick_gelu: Whether the model computes with QuickGELU; None is what its configuration says.
        files: The files that decide what it says, in one folder.
        preprocessing: How pictures are brought to it, where that is not what open_clip does by default.
    """

    arch: str
    pretrained: str | None
    quick_gelu: bool | None
    files: tuple[Path, ...]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Of the file, or of names and contents of a folder's, in hexadecimal."""
        if self.pretrained is None:
            return files_sha256(self.files[0].parent, self.files)
        return file_sha256(Path(self.pretrained))  # whatever it is called: caches and people do not agree

    def identity(self) -> dict[str, Any]:
        """What colours depend on, for JSON: the same wherever the files lie."""
        return {
            # A folder's architecture is in its files.
            "arch": None if self.pretrained is None else self.arch,
            "quick_gelu": self.quick_gelu,
            "preprocessing": dict(self.preprocessing),
            "sha256": self.sha256(),
        }


def find_clip(arch: str, pretrained: str, quick_gelu: bool | None = None) -> ClipWeights:
    """The files of a CLIP model, fetched where they are not here and there is a network.

    Args:
        arch: open_clip's name of the architecture, or local-dir:FOLDER with an open_clip_config.json and weights.
        pretrained: open_clip's tag of the weights, or a file of them; left alone with a folder.
        quick_gelu: Whether the weights were trained with QuickGELU. When None: what open_clip knows of the tag; for a file
            True where OpenAI's weights of that architecture exist, as it is taken for them.

    Raises ValueError for an unknown architecture, and where there are no such weights.
    """
    schema, name = parse_model_name(arch)
    if schema == "local-dir":
        folder = Path(name)
        files = [path for path in folder.glob("*") if path.suffix in (".json", ".safetensors", ".bin", ".pth")]
        if not (folder / "open_clip_config.json").is_file() or len({path.suffix for path in files}) < 2:
            raise ValueError(f"--clip {arch}: {name} lacks open_clip_config.json or weights; give another folder")
        return ClipWeights(arch, None, quick_gelu, tuple(files))
    if schema is not None or arch not in open_clip.list_models():
        raise ValueError(
            f"--clip {arch} is no architecture of open_clip; give ViT-L-14, another of open_clip.list_models(), or "
            "local-dir:FOLDER"
        )
    if known := get_pretrained_cfg(arch, pretrained):
        file = _of_tag(arch, pretrained, known)
        preprocessing = {
            f"image_{name}": known[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in known
        }
        gelu = known.get("quick_gelu", False) if quick_gelu is None else quick_gelu
        return ClipWeights(arch, str(file), gelu, (file,), preprocessing)
    file = Path(pretrained).expanduser()
    if not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise ValueError(f"--clip-pretrained {pretrained} is no file and no tag of {arch} (it has {tags})")
    if quick_gelu is None:
        quick_gelu = get_pretrained_cfg(arch.removesuffix("-quickgelu"), "openai").get("quick_gelu")
    return ClipWeights(arch, str(file), quick_gelu, (file,))


def _of_tag(arch: str, tag: str, known: Mapping[str, Any]) -> Path:
    """The file of a tag's weights, from the cache or fetched."""
    repository, _, name = known.get("hf_hub", "").rpartition("/")
    names = [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    try:
        if not repository:
            return Path(download_pretrained(known))
        folder = snapshot(repository, [], [[name] for name in names])
        return next(folder / name for name in names if (folder / name).is_file())
    except Exception as error:  # hub, HTTP and file system errors have no common class
        fetch = f"hf download {repository} {names[0]} --local-dir DIR" if repository else f"curl -O {known['url']}"
        file = names[0] if repository else Path(known["url"]).name
        raise not_here(f"CLIP {arch} {tag}", error, fetch, f"--clip-pretrained DIR/{file}") from error


def object_crop(image: Image, detection: Detection) -> PillowImage.Image:
    """What CLIP sees of an object: its box, with everything outside its mask painted #999.

    `image` is uint8 [height, width, 3]. Edges of the box are rounded to whole pixels. An object without a mask keeps its
    surroundings, as in the published evaluation.
    """
    x0, y0, x1, y1 = (round(edge) for edge in detection.box)
    pixels = image[y0:y1, x0:x1]
    if detection.mask is not None:
        pixels = np.where(detection.mask[y0:y1, x0:x1, None], pixels, np.uint8(GREY))
    return PillowImage.fromarray(pixels)


class ClipColors:
    """GenEval's colour classifier: the likeliest of ten colours for each object."""

    def __init__(self, weights: ClipWeights, device: torch.device | str = "cpu", batch_size: int = BATCH) -> None:
        """Load the model; `batch_size` is how many crops go through it at once, at most.

        Raises ValueError where the files are damaged or are not of that architecture.
        """
        self.device, self.batch_size = torch.device(device), batch_size
        self._model, self._preprocess, self._tokenizer = load_clip(weights)
        self._model.to(self.device).eval()
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def classify(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        """The colour of each object, given the picture (uint8 [height, width, 3]) it was found in, in order."""
        colors: list[str] = []
        for start in range(0, len(objects), self.batch_size):
            batch = objects[start : start + self.batch_size]
            crops = torch.stack([self._preprocess(object_crop(image, detection)) for image, detection in batch])
            images_ND = F.normalize(self._model.encode_image(crops.to(self.device)), dim=-1)
            texts_NDC = torch.stack([self._texts_of(detection.class_name) for _, detection in batch])
            best_N = torch.einsum("nd,ndc->nc", images_ND, texts_NDC).argmax(dim=1)
            colors += [COLORS[best] for best in best_N.tolist()]
        return colors

    def _texts_of(self, class_name: str) -> Tensor:
        """Text features of the ten colours of a class, float32 [D, C]: each the normalised mean over templates."""
        if class_name not in self._texts:
            templates = [lambda color, t=template: t.format(color=color, name=class_name) for template in TEMPLATES]
            self._texts[class_name] = open_clip.build_zero_shot_classifier(
                self._model, self._tokenizer, COLORS, templates, device=self.device
            )
        return self._texts[class_name]


def load_clip(weights: ClipWeights) -> tuple[Any, Any, Any]:
    """The model, on the processor, its preprocessing of one PIL image, and its tokenizer of sentences.

    Raises ValueError where the files are damaged or are not of that architecture.
    """
    options: dict[str, Any] = dict(weights.preprocessing)
    if weights.quick_gelu is not None:
        options["force_quick_gelu"] = weights.quick_gelu
    if weights.quick_gelu is False:
        options["quick_gelu"] = False  # also where the configuration says otherwise, which "force" does not undo
    try:
        model, preprocess = open_clip.create_model_from_pretrained(weights.arch, weights.pretrained, **options)
        return model, preprocess, open_clip.get_tokenizer(weights.arch)
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"CLIP {weights.arch} cannot be loaded from {weights.pretrained or weights.arch} ({reason}); fetch its weights "
            "again as safetensors, or name the architecture that they are of with --clip"
        ) from error
