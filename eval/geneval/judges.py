"""The judges by name, each with its models, thresholds and what its verdicts depend on.

    judge = load_judge("mask2former", JudgeOptions(threshold=0.4), needs_colors=True)

A judge's files are looked for at once, so that what is missing is said before hours of work; its models are loaded when
the first picture is to be judged, which may be never.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from data_pipeline import shapes
from eval.files import files_sha256, json_sha256
from eval.geneval.detectors import ColorClassifier, Detector
from eval.geneval.options import NEURAL, JudgeOptions
from eval.geneval.prompts import COCO_CLASSES
from eval.geneval.scoring import ScoringOptions
from eval.versions import releases
from t2i.devices import choose_device

__all__ = ["Judge", "JudgeName", "load_judge"]

JudgeName = Literal["mask2former", "shapes"]

CODE = ("judging", "detections", "scoring", "prompts")
"""Modules that every judge's verdicts go through, from the file of a picture to its line."""
LIBRARIES = ("numpy", "pillow")
CLIP_LIBRARIES = ("open-clip-torch", "torchvision")
"""CLIP's network, and how crops are scaled for it."""


@dataclass(frozen=True)
class Judge:
    """Who looks at pictures.

    Attributes:
        name: Its name.
        classes: What it can find; prompts about anything else are not for it.
        image_size: The only size of pictures, in pixels a side, that it knows; None for any.
        batch_size: Pictures at once, where nothing else is asked for.
        made_from: What verdicts depend on beside pictures and prompts, for JSON; the same wherever its files lie.
        files: What its models are called, and where they lie here, for JSON; verdicts do not depend on it.
        make_detector: Loads its detector.
        make_colors: Loads what tells colours; None where the detector does.
    """

    name: str
    classes: frozenset[str]
    image_size: int | None
    batch_size: int
    made_from: Mapping[str, Any]
    make_detector: Callable[[], Detector]
    make_colors: Callable[[], ColorClassifier] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def detector(self) -> Detector:
        return self.make_detector()

    @cached_property
    def colors(self) -> ColorClassifier | None:
        return None if self.make_colors is None else self.make_colors()

    def check_prompts(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for a prompt about something that this judge cannot find: no picture could ever be right."""
        for entry in prompts:
            clauses = [*entry["include"], *entry.get("exclude", [])]
            if unknown := [clause["class"] for clause in clauses if clause["class"] not in self.classes]:
                raise ValueError(
                    f"the prompt {entry['prompt']!r} asks for {unknown[0]!r}, which the judge {self.name!r} does not know; "
                    "choose the other judge"
                )


def load_judge(name: str, options: JudgeOptions, needs_colors: bool = True, device: str | None = None) -> Judge:
    """The judge of that name.

    Args:
        name: "mask2former": Mask2Former and CLIP, which GenEval is published with. "shapes": the exact judge of the embedded
            data set.
        options: Models and thresholds.
        needs_colors: Whether any prompt asks for a colour; without, CLIP's weights are not needed.
        device: Where its models run; the GPU of this rank or the processor when None.

    Raises ValueError for no such judge, options that are not for it or out of range, and models that are not here.
    """
    judges = {"mask2former": _mask2former, "shapes": _shapes}
    if name not in judges:
        raise ValueError(f"unknown judge {name!r}; choose one of {', '.join(judges)}")
    return judges[name](options, needs_colors, device)


def _shapes(options: JudgeOptions, needs_colors: bool, device: str | None) -> Judge:
    from eval.geneval.shapes_judge import ShapesJudge

    defaults = {one.name: one.default for one in fields(JudgeOptions)}
    if foreign := [name for name in NEURAL if getattr(options, name) != defaults[name]]:
        raise ValueError(
            f"--{foreign[0].replace('_', '-')} is not for the judge 'shapes', which has no models; leave it out"
        )
    scoring = replace(ShapesJudge.scoring, **options.rules)
    made_from = {
        "judge": "shapes",
        "scoring": asdict(scoring),
        "code": _code("shapes_judge"),
        "libraries": releases([*LIBRARIES, "scipy"]),
    }
    return Judge("shapes", frozenset(shapes.SHAPES), shapes.IMAGE_SIZE, 64, made_from, lambda: ShapesJudge(scoring))


def _mask2former(options: JudgeOptions, needs_colors: bool, device: str | None) -> Judge:
    from eval.geneval.clip_colors import ClipColors, find_clip
    from eval.geneval.mask2former import Mask2FormerDetector, detector_files, find_detector

    scoring = replace(ScoringOptions(), **options.rules)
    folder, clip, missing = None, None, []  # both are looked for, so that what is missing is fetched in one go
    try:
        folder = find_detector(options.detector)
    except ValueError as error:
        missing.append(str(error))
    try:
        clip = find_clip(options.clip, options.clip_pretrained, options.clip_quick_gelu) if needs_colors else None
    except ValueError as error:
        missing.append(str(error))
    if folder is None or missing:
        raise ValueError("; and ".join(missing))
    made_from = {
        "judge": "mask2former",
        "detector": {"size": list(options.detector_size), "sha256": files_sha256(folder, detector_files(folder))},
        "clip": None if clip is None else clip.identity(),
        "scoring": asdict(scoring),
        "code": _code("mask2former", *([] if clip is None else ["clip_colors"])),
        "libraries": releases([*LIBRARIES, "torch", "transformers", *([] if clip is None else CLIP_LIBRARIES)]),
    }
    files = {
        "detector": options.detector,
        "detector_folder": str(folder),
        "clip": None if clip is None else clip.arch,
        "clip_pretrained": None if clip is None else clip.pretrained,
    }
    return Judge(
        "mask2former",
        frozenset(COCO_CLASSES),
        None,
        8,
        made_from,
        lambda: Mask2FormerDetector(folder, scoring, options.detector_size, choose_device(device)),
        None if clip is None else lambda: ClipColors(clip, choose_device(device)),
        files,
    )


def _code(*modules: str) -> str:
    """SHA-256 of the code that verdicts depend on: those of an older judge must not stand beside a newer one's."""
    names = [f"eval.geneval.{name}" for name in (*modules, *CODE)] + ["data_pipeline.images", "data_pipeline.shapes"]
    return json_sha256([inspect.getsource(importlib.import_module(name)) for name in names])
