"""An export as the source of pictures: what it says of itself, its checksum, and its models once they are needed."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from eval.files import files_sha256
from t2i.devices import choose_device
from t2i.pipeline import ExportDescription, TextToImagePipeline, read_description

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """An export's folder; its models are loaded when the first picture is wanted, which may be never.

    `device` is where they run: the GPU of this rank or the processor when None.
    """

    folder: Path
    device: str | None = None

    @cached_property
    def description(self) -> ExportDescription:
        return read_description(self.folder)

    @cached_property
    def pipe(self) -> TextToImagePipeline:
        return TextToImagePipeline.from_pretrained(self.folder, choose_device(self.device))

    def __call__(self, prompts: list[str], *, seeds: list[int], **sampling: Any) -> list[Image.Image]:
        # Drawn all at once: who calls has chosen the size of a batch. Tokens are the same in any batch, but what the
        # tokenizer makes of them may be rounded to another grey level, in one of 10,000 pixels, so that is done one by one.
        tokens = self.pipe.tokens(prompts, seeds=seeds, batch_size=len(prompts), **sampling)
        return [Image.fromarray(self.pipe.decode(one)[0]) for one in tokens.split(1)]

    def checksum(self, *patterns: str) -> str:
        """SHA-256 over names and contents of the files that match, in hexadecimal."""
        return files_sha256(
            self.folder, (path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file())
        )

    @cached_property
    def sha256(self) -> str:
        """Of everything that a picture depends on; the output folder may lie inside the export, so not of all."""
        return self.checksum("config.json", "model.safetensors", "text_encoder/*", "tokenizer/*")

    def check_draws_captions(self) -> None:
        """Raise ValueError where the export does not draw pictures of captions."""
        if self.description.model.condition != "text":
            raise ValueError(f"{self.folder} draws classes, not captions; a text-to-image export is needed")
        if len(self.description.model.grid) != 2:
            raise ValueError(f"{self.folder} draws clips, not pictures; a text-to-image export is needed")
        if not self.description.tokenizer:
            raise ValueError(f"{self.folder} has no image tokenizer and draws no pictures; make it again with one")
