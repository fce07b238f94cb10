"""How often a class-conditional model of the embedded data set draws what its class says.

    t2i score-classes EXPORT --judge shapes

Every class is drawn several times and judged from pixels alone. A picture is right when the judge finds one object in it,
of the shape of its class. A clip is right when that holds of every frame, the colour stays the same, and the object moves
in the direction of its class. The command fills a folder (EXPORT/classes by default):

    summary.json                 shares of right samples with their 95% intervals, and the ceiling
    results.jsonl                one line per sample: its class, seed, and why it is wrong
    pictures.png or clips.webp   all of them, a row for each class

The ceiling is the share of right samples among correct ones after a way through the image tokenizer and back.

Shape suffixes: S samples, T frames.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline import clips, shapes
from eval.files import write_jsonl, write_text
from eval.generate import picture_seed
from eval.geneval.detections import Detection
from eval.geneval.detectors import Detector
from eval.geneval.intervals import Interval, wilson_interval
from eval.geneval.judges import load_judge
from eval.geneval.judging import batched
from eval.geneval.options import JudgeOptions
from eval.geneval.scoring import keep_detections
from t2i.animation import save_clips
from t2i.devices import choose_device
from t2i.pipeline import ExportDescription, TextToImagePipeline, picture_grid, read_description

__all__ = ["ClassScore", "reasons_against", "score_classes", "score_samples"]

JITTER = 2.0
"""Pixels by which the box of an object that stands still may seem to move: what mild blur does to its outline."""


@dataclass(frozen=True)
class ClassScore:
    """The share of right samples of some classes; `ceiling` of correct samples' reconstructions by the tokenizer."""

    name: str
    right: int
    samples: int
    share: Interval
    ceiling: float


@dataclass(frozen=True)
class _Meaning:
    """What a class stands for; pictures have no direction."""

    shape: str
    direction: str | None = None

    def __str__(self) -> str:
        return self.shape if self.direction is None else f"{self.shape} moving {self.direction}"


def reasons_against(objects_T: Sequence[Sequence[Detection]], shape: str, direction: str | None = None) -> list[str]:
    """Why a sample is not of its class; nothing when it is right.

    `objects_T` are the objects that count in each frame, one frame for a picture. `direction` is one of
    `data_pipeline.clips.DIRECTIONS`, or None where nothing has to move.
    """
    reasons = []
    for number, objects in enumerate(objects_T):
        if [one.class_name for one in objects] != [shape]:
            found = ", ".join(sorted(one.class_name for one in objects)) or "nothing"
            frame = "" if len(objects_T) == 1 else f"frame {number}: "
            reasons.append(f"{frame}expected one {shape}, found {found}")
    if reasons or direction is None:
        return reasons
    colors = {objects[0].color for objects in objects_T}
    if len(colors) > 1:
        reasons.append(f"expected one colour, found {', '.join(sorted(map(str, colors)))}")
    boxes_T4 = np.array([objects[0].box for objects in objects_T])
    centers_T2 = (boxes_T4[:, :2] + boxes_T4[:, 2:]) / 2
    step = np.array(clips.DIRECTIONS[direction])
    moved = centers_T2[-1] - centers_T2[0]
    along, across = float(moved @ step), float(np.abs(moved @ step[::-1]))
    goes_back = bool((np.diff(centers_T2, axis=0) @ step < -JITTER).any())
    if along < clips.STEP - JITTER or along <= 2 * across or goes_back:
        reasons.append(f"expected to move {direction}, moved by {moved[0]:+.0f} {moved[1]:+.0f} pixels (right, down)")
    return reasons


def _meanings(description: ExportDescription, source: Path) -> list[_Meaning]:
    """What the classes of an export stand for. Raises ValueError where it is no model of the embedded data set's classes."""
    model = description.model
    if model.condition != "class":
        raise ValueError(f"{source} draws captions, not classes; measure it with `t2i geneval run`")
    if description.image_size == shapes.IMAGE_SIZE:
        if len(model.grid) == 2 and model.num_classes == len(shapes.SHAPES):
            return [_Meaning(shape) for shape in shapes.SHAPES]
        if len(model.grid) == 3 and model.num_classes == clips.CLASSES and model.grid[0] >= clips.MIN_FRAMES:
            return [_Meaning(*clips.clip_meaning(label)) for label in range(clips.CLASSES)]
    raise ValueError(
        f"{source} draws {model.num_classes} classes on a grid of {list(model.grid)} tokens, {description.image_size} pixels "
        f"a side; the shapes judge knows pictures of {len(shapes.SHAPES)} classes and clips of {clips.CLASSES}, "
        f"{shapes.IMAGE_SIZE} pixels a side, as `t2i data shapes` makes them"
    )


def score_samples(
    samples: Iterable[np.ndarray],
    meanings: Sequence[_Meaning],
    detector: Detector,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[str]]:
    """Why each sample, frames uint8 [T, H, W, 3], is not what its meaning says; no reasons for right ones."""
    reasons: list[list[str]] = []
    with tqdm(total=len(meanings), desc="judge", unit="sample", disable=not progress) as bar:
        for batch in batched(zip(samples, meanings, strict=True), batch_size):
            found = iter(detector.detect([frame for sample, _ in batch for frame in sample]))
            for sample, meaning in batch:
                objects_T = [
                    [
                        one
                        for group in keep_detections(next(found), "counting", detector.scoring).values()
                        for one in group
                    ]
                    for _ in sample
                ]
                reasons.append(reasons_against(objects_T, meaning.shape, meaning.direction))
            bar.update(len(batch))
    return reasons


def _correct_sample(meaning: _Meaning, frames: int, seed: int) -> np.ndarray:
    """A correct sample of a class from other random numbers than training, uint8 [T, H, W, 3]."""
    if meaning.direction is None:
        entry = {"class": meaning.shape, "count": 1}
        return shapes.ground_truth({"tag": "single_object", "include": [entry], "prompt": ""}, seed).image[None]
    label = clips.clip_class(meaning.shape, meaning.direction)
    return clips.clip_of_class(label, frames, np.random.default_rng([seed, 5])).frames


def _scores(meanings: Sequence[_Meaning], right_S: np.ndarray, correct_S: np.ndarray) -> list[ClassScore]:
    """Scores by shape, by direction where there are any, and overall."""

    def score(name: str, belongs: Callable[[_Meaning], bool]) -> ClassScore:
        chosen_S = np.array([belongs(meaning) for meaning in meanings])
        right, count = int(right_S[chosen_S].sum()), int(chosen_S.sum())
        return ClassScore(name, right, count, wilson_interval(right, count), float(correct_S[chosen_S].mean()))

    def of(attribute: str, value: str) -> ClassScore:
        return score(value, lambda meaning: getattr(meaning, attribute) == value)

    moving = meanings[0].direction is not None
    return [
        *(of("shape", shape) for shape in shapes.SHAPES),
        *(of("direction", direction) for direction in clips.DIRECTIONS if moving),
        score("overall", lambda _: True),
    ]


def score_classes(
    export: Path,
    out: Path,
    *,
    judge: str = "shapes",
    samples: int = 16,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[ClassScore]:
    """Draw `samples` of every class of an export, judge them, write what the module's description lists, print the table.

    Args:
        export: What `t2i export` wrote.
        out: Folder for the files.
        judge: Its name; see `eval.geneval.judges`.
        samples: Pictures or clips of each class.
        batch_size: Pictures or clips drawn or judged at once.
        seed: Other seeds draw other samples.
        progress: Show progress bars.

    Raises ValueError for an export of another kind, no such judge, and numbers below one.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples ({samples}) and batch size ({batch_size}) must be at least 1")
    description = read_description(export)
    classes = _meanings(description, export)
    judging = load_judge(judge, JudgeOptions(), needs_colors=False)
    if unknown := [meaning.shape for meaning in classes if meaning.shape not in judging.classes]:
        raise ValueError(
            f"{export} draws a {unknown[0]}, which the judge {judge!r} does not know; choose another judge"
        )
    detector = judging.detector
    pipe = TextToImagePipeline.from_pretrained(export, choose_device())
    labels = [label for label in range(len(classes)) for _ in range(samples)]
    meanings = [classes[label] for label in labels]
    seeds = [picture_seed(label, n % samples, seed) for n, label in enumerate(labels)]
    drawn: list[list[Image.Image]]
    if pipe.draws_clips:
        drawn = pipe.clips(labels, seeds=seeds, batch_size=batch_size, progress=progress)
    else:
        drawn = [[picture] for picture in pipe(labels, seeds=seeds, batch_size=batch_size, progress=progress)]
    reasons = score_samples(
        (np.stack([np.asarray(frame) for frame in one]) for one in drawn), meanings, detector, batch_size, progress
    )
    correct = (_correct_sample(m, len(drawn[0]), s) for m, s in zip(meanings, seeds, strict=True))
    ceiling = score_samples(map(pipe.encode_decode, correct), meanings, detector, batch_size, progress)
    scores = _scores(meanings, np.array([not why for why in reasons]), np.array([not why for why in ceiling]))

    if pipe.draws_clips:
        save_clips(drawn, out / "clips.webp", samples, frame_ms=250)
    else:
        out.mkdir(parents=True, exist_ok=True)
        picture_grid([one[0] for one in drawn], samples).save(out / "pictures.png")
    rows: list[dict[str, Any]] = [
        {"class": label, "meaning": str(meaning), "seed": one_seed, "correct": not why, "reason": "; ".join(why)}
        for label, meaning, one_seed, why in zip(labels, meanings, seeds, reasons, strict=True)
    ]
    write_jsonl(out / "results.jsonl", rows)
    document = {
        "model": asdict(description.provenance), "judge": judge, "samples": samples, "seed": seed,
        "sampling": asdict(description.sample), "scores": [asdict(score) for score in scores],
    }  # fmt: skip
    write_text(out / "summary.json", json.dumps(document, indent=2) + "\n")
    title = f"Classes, judge {judge}: {description.provenance.recipe}, step {description.provenance.step}"
    Console().print(_table(scores, title))
    print(f"samples and reasons: {out}")
    return scores


def _table(scores: Sequence[ClassScore], title: str) -> Table:
    table = Table(title=title, caption="share: of samples that are right, with Wilson's interval", box=box.SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    for heading in ("right", "share [95% interval]", "ceiling: reconstruction"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in scores:
        if score.name in ("left", "overall"):
            table.add_section()
        row = (score.name, f"{score.right}/{score.samples}", str(score.share), f"{score.ceiling:.3f}")
        table.add_row(*row, style="bold" if score.name == "overall" else None)
    return table
