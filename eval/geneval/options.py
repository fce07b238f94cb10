"""Options of the `t2i geneval` commands, as plain data: importable without any model library."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DETECTOR", "NEURAL", "JudgeOptions", "SamplingOptions"]

DETECTOR = "facebook/mask2former-swin-small-coco-instance"

NEURAL = ("detector", "detector_size", "clip", "clip_pretrained", "clip_quick_gelu")
"""Options of a judge that are of its models and not of the rules."""


@dataclass(frozen=True)
class JudgeOptions:
    """The judge's models and thresholds; a threshold that is None is the judge's own."""

    detector: str = DETECTOR
    """Mask2Former of COCO's instances: a folder in the layout of transformers, or a hub name."""
    detector_size: tuple[int, int] = (800, 1333)
    """What pictures are scaled to for it, in pixels: the shorter side, unless the longer one would exceed the second number."""
    clip: str = "ViT-L-14"
    """open_clip's architecture of the model that tells colours, or local-dir:FOLDER."""
    clip_pretrained: str = "openai"
    """Its weights: a tag of open_clip's, or a file."""
    clip_quick_gelu: bool | None = None
    """Whether those weights were trained with QuickGELU, as OpenAI's were. Known of a tag; a file is taken for OpenAI's where
    there are such of that architecture."""
    threshold: float | None = None
    """Detections count above this score; 0.3 for Mask2Former."""
    counting_threshold: float | None = None
    """The same for counting prompts; 0.9 for Mask2Former."""
    max_objects: int | None = None
    """Detections of a class that are kept, the best first; 16."""
    max_overlap: float | None = None
    """A detection is dropped where a better one of its class overlaps it by at least this IoU; 1, which is off."""
    position_margin: float | None = None
    """Share of the summed box sizes by which an offset must be exceeded on an axis; 0.1."""
    position_share: float | None = None
    """Share of an offset's length that a component must exceed to be a relation; 0.5."""

    @property
    def rules(self) -> dict[str, Any]:
        """The thresholds that are given, by name."""
        return {name: value for name, value in asdict(self).items() if name not in NEURAL and value is not None}


@dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn; what the export says where an option is None."""

    guidance_scale: float | None = None
    """Strength of classifier-free guidance; what the export says when not given, as for the next three."""
    temperature: float | None = None
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this probability mass."""
    guidance_share: float = 1.0
    """Share of the passes, from the first on, that are guided."""
    zipar_window: int | None = None
    """Decode a raster model with ZipAR: tokens of a row after which the next one starts."""
    zipar_adaptive: bool = False
    """Take that window as the least."""

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, by name: arguments of a pipeline, and what pictures depend on."""
        return {name: value for name, value in asdict(self).items() if value != getattr(SamplingOptions(), name)}
