"""Inception features of pictures, as FID and KID take them: torch-fidelity's port of the network FID was published with.

    inception = Inception.open(None, "clean", device)   # weights from the cache, or fetched

Pictures are squashed to 299x299 in one of two ways, which differ by several points of FID:

- "clean" (Parmar et al. 2022, arXiv 2104.11222, clean-fid): Pillow's bicubic with a support that grows with the reduction, in
  float, not rounded to 8 bits;
- "tensorflow" (Heusel et al. 2017, arXiv 1706.08500): bilinear between neighbouring pixels as TensorFlow 1 computes it, which
  aliases. torch-fidelity and ADM's evaluation do this.

Shape suffixes: N pictures, D features (2048).
"""

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.files import file_sha256
from eval.geneval.weights import not_here

__all__ = ["Inception", "Resize", "find_inception", "resize_picture"]

Resize = Literal["clean", "tensorflow"]

SIDE = FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
FILE = URL_INCEPTION_V3.rpartition("/")[2]
SHA256_PREFIX = FILE.rpartition("-")[2].removesuffix(".pth")
SAME_FILES = (FILE, f"pt_inception-2015-12-05-{SHA256_PREFIX}.pth")
"""Its name in the caches of torch-fidelity and of pytorch-fid."""


def find_inception(file: Path | None) -> Path:
    """The file of Inception's weights: the one given, or that in torch's cache, where it is put if there is a network.

    Raises ValueError where there is none to be had.
    """
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--inception {file} is no file; give {FILE}, from {URL_INCEPTION_V3}")
        return file
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in SAME_FILES:
        if (cache / name).is_file():
            return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cache / FILE), SHA256_PREFIX)
    except (OSError, RuntimeError) as error:
        fetch = f"curl -L --create-dirs -O --output-dir DIR {URL_INCEPTION_V3}"
        raise not_here("Inception of FID and KID", error, fetch, f"--inception DIR/{FILE}") from error
    return cache / FILE


def resize_picture(image: Image.Image, resize: Resize) -> Tensor:
    """An RGB picture squashed to Inception's size: float32 [3, 299, 299] of 0..255."""
    if resize == "tensorflow":
        pixels_1CHW = torch.from_numpy(np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32))
        return interpolate_bilinear_2d_like_tensorflow1x(pixels_1CHW, size=(SIDE, SIDE), align_corners=False)[0]
    channels = [
        np.asarray(Image.fromarray(np.asarray(band, dtype=np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for band in image.split()
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


class Inception:
    """Inception's pooled features; an `eval.embedding.Network`."""

    def __init__(
        self, layers: nn.Module, resize: Resize, device: torch.device | str = "cpu", file: Path | None = None
    ) -> None:
        """`layers` make features [N, D] of pictures [N, 3, 299, 299] within -1..1; `file` is where their weights come from."""
        self.device, self.resize, self.file = torch.device(device), resize, file
        self._layers = layers.eval().to(self.device)

    @classmethod
    def open(cls, file: Path | None, resize: Resize, device: torch.device | str = "cpu") -> Self:
        """Load the network; without a `file`, from the cache, or fetched.

        Raises ValueError where there are no weights, or they are damaged or of another network.
        """
        file = find_inception(file)
        return cls(_layers(file), resize, device, file)

    def prepare(self, image: Image.Image) -> Tensor:
        """float32 [3, 299, 299] of 0..255."""
        return resize_picture(image, self.resize)

    def embed(self, batch: Tensor) -> Tensor:
        """float32 [N, D]."""
        return self._layers((batch.to(self.device) - 128) / 128)

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What features depend on, apart from the pictures."""
        return {"resize": self.resize, "inception_sha256": None if self.file is None else file_sha256(self.file)}


def _layers(file: Path) -> nn.Module:
    """What comes after resizing: pictures [N, 3, 299, 299] within -1..1 -> features [N, D]."""
    try:
        weights = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        # The constructor unpickles whatever file it is given; it gets one that holds the tensors read above, and no more.
        with io.BytesIO() as stream:
            torch.save(weights, stream)
            stream.seek(0)
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=stream
            )
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} holds no weights of FID's Inception ({reason}); give {FILE}, from {URL_INCEPTION_V3}"
        ) from error
    # Its own call takes 8-bit pixels only and resizes them. What follows is one layer after another, the classifier last.
    *features, _classifier = network.children()
    return nn.Sequential(*features, nn.Flatten())
