"""GenEval's rules: from the detections in a picture to a verdict with its reasons.

    verdict = judge_picture(detections, metadata, options)

`keep_detections` decides which detections count, `color_candidates` names those whose colour a prompt asks for
(so that a neural colour classifier can run over a whole batch first), and `judge_picture` does both and applies the
clauses. Nothing here looks at pixels.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513, section 3), evaluation/evaluate_images.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.geneval.detections import Box, Detection

__all__ = [
    "ScoringOptions",
    "Verdict",
    "box_iou",
    "color_candidates",
    "judge_picture",
    "keep_detections",
    "relations_between",
    "result_row",
    "unreadable_row",
]

Kept = dict[str, list[Detection]]
ColorOf = Callable[[Detection], str]


@dataclass(frozen=True)
class ScoringOptions:
    """Thresholds of the judgement; the defaults are GenEval's published values for Mask2Former scores.

    Attributes:
        threshold: Detections count when their score is above this.
        counting_threshold: The same for counting prompts, where doubtful detections would add to the count.
        max_objects: At most this many detections per class are kept, the best first.
        max_overlap: A detection is dropped when a better one of its class overlaps it by at least this IoU;
            1.0 turns the suppression off.
        position_margin: Share of the summed box sizes by which an offset must be exceeded on an axis.
        position_share: A relation holds when the shrunk offset exceeds this share of the original offset's length.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1
    position_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("threshold", "counting_threshold", "position_margin", "position_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not 0.0 < self.max_overlap <= 1.0:
            raise ValueError(f"max_overlap is {self.max_overlap}; it must lie above 0 and up to 1 (1 is off)")
        if self.max_objects < 1:
            raise ValueError(f"max_objects is {self.max_objects}; it must be at least 1")


@dataclass(frozen=True)
class Verdict:
    """The judgement of one picture: whether it shows what was asked, one line per failed clause, what counted."""

    correct: bool
    reasons: tuple[str, ...]
    kept: Kept


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1) whose last pixels belong to them (+1)."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def keep_detections(detections: Sequence[Detection], tag: str, options: ScoringOptions) -> Kept:
    """The detections that count for a prompt of task `tag`, per class, best first; classes without any left out."""
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    by_class: Kept = {}
    # Of equal scores the later detection comes first, as in the published code (a reversed ascending sort).
    for detection in sorted(reversed(detections), key=lambda d: -d.score):
        if detection.score > threshold:
            by_class.setdefault(detection.class_name, []).append(detection)
    kept: Kept = {}
    for class_name, candidates in by_class.items():
        chosen: list[Detection] = []
        # The limit comes before the suppression: suppressed boxes use up places.
        for candidate in candidates[: options.max_objects]:
            suppressed = options.max_overlap < 1.0 and any(
                box_iou(better.box, candidate.box) >= options.max_overlap for better in chosen
            )
            if not suppressed:
                chosen.append(candidate)
        kept[class_name] = chosen
    return kept


def color_candidates(kept: Kept, metadata: Mapping[str, Any]) -> list[Detection]:
    """The kept detections whose colour decides a clause of the prompt; no others need classifying."""
    candidates: dict[int, Detection] = {}
    for clause in metadata.get("include", []):
        found = kept.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(found) == clause["count"]:
            candidates.update({id(detection): detection for detection in found})
    return list(candidates.values())


def relations_between(subject: Box, target: Box, options: ScoringOptions | None = None) -> set[str]:
    """How `subject` lies relative to `target`: a subset of left of, right of, above, below (y grows downwards)."""
    options = options or ScoringOptions()
    corners = np.array([subject, target], dtype=np.float64).reshape(2, 2, 2)  # box, corner, axis
    centers = corners.mean(axis=1)
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - options.position_margin * sizes.sum(axis=0), 0.0)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    # Measured against the offset before shrinking: an offset that the margin nearly eats has no clear direction.
    dx, dy = shrunk / np.linalg.norm(offset)
    share = options.position_share
    verdicts = {"left of": dx < -share, "right of": dx > share, "above": dy < -share, "below": dy > share}
    return {relation for relation, holds in verdicts.items() if holds}


def _known_color(detection: Detection) -> str:
    if detection.color is None:
        raise ValueError(
            f"the prompt asks for the colour of a {detection.class_name}, which its detection does not tell; "
            "give a colour classifier"
        )
    return detection.color


def _wrong_colors(clause: Mapping[str, Any], found: list[Detection], color_of: ColorOf) -> str | None:
    """The reason why the group's colours fail the clause, or None."""
    colors = [color_of(detection) for detection in found]
    wanted, count = clause["color"], clause["count"]
    if colors.count(wanted) >= count:
        return None
    seen = ", ".join(f"{colors.count(color)} {color}" for color in sorted(set(colors)))
    return f"expected {wanted} {clause['class']}>={count}, found {colors.count(wanted)} {wanted}; and {seen}"


def _wrong_position(
    clause: Mapping[str, Any], found: list[Detection], targets: list[Detection] | None, options: ScoringOptions
) -> str | None:
    """The reason why some pair of the group and its target fails the relation, or None."""
    relation = clause["position"][0]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    for subject in found:
        for target in targets:
            seen = relations_between(subject.box, target.box, options)
            if relation not in seen:
                described = " and ".join(sorted(seen)) or "neither side of"
                return f"expected {clause['class']} {relation} {target.class_name}, found {described} it"
    return None


def judge_picture(
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    options: ScoringOptions | None = None,
    color_of: ColorOf | None = None,
) -> Verdict:
    """Judge one picture against its prompt.

    Args:
        detections: Everything the detector found, in any order and with any score.
        metadata: GenEval's entry: `tag`, `include` clauses `{class, count, [color], [position]}` and optional
            `exclude` clauses `{class, count}`, which fail at their count.
        options: Thresholds; the published ones when left out.
        color_of: Gives the colour of a detection; by default the one the detection carries.

    Returns:
        The verdict, with one reason per failed clause and the detections that counted.

    Raises:
        ValueError: a colour is asked for that no detection carries and no `color_of` was given.
    """
    options = options or ScoringOptions()
    color_of = color_of or _known_color
    kept = keep_detections(detections, metadata.get("tag", ""), options)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        wanted = clause["count"]
        found = kept.get(clause["class"], [])[:wanted]
        reason: str | None = None
        if len(found) < wanted:
            reason = f"expected {clause['class']}>={wanted}, found {len(found)}"
        if reason is None and "color" in clause:
            reason = _wrong_colors(clause, found, color_of)
        if reason is None and "position" in clause:
            reason = _wrong_position(clause, found, groups[clause["position"][1]], options)
        if reason is not None:
            reasons.append(reason)
        groups.append(found if reason is None else None)
    for clause in metadata.get("exclude", []):
        count = len(kept.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return Verdict(correct=not reasons, reasons=tuple(reasons), kept=kept)


def result_row(filename: str, metadata: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """One line of results.jsonl: the seven published fields, and `colors`.

    `metadata` and `details` are JSON strings, as published; `details` maps each class to its kept boxes
    [x0, y0, x1, y1, score] and the additional `colors`, also a JSON string, to their colours (null where unknown).
    """
    boxes = {
        name: [[*(round(float(edge), 2) for edge in d.box), round(float(d.score), 4)] for d in found]
        for name, found in verdict.kept.items()
    }
    colors = {name: [detection.color for detection in found] for name, found in verdict.kept.items()}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(dict(metadata)),
        "details": json.dumps(boxes),
        "colors": json.dumps(colors),
    }


def unreadable_row(filename: str, metadata: Mapping[str, Any], cause: str) -> dict[str, Any]:
    """The line of a picture that could not be read: it counts, as wrong, and is marked `unreadable`."""
    verdict = Verdict(correct=False, reasons=(f"picture cannot be read: {cause}",), kept={})
    return {**result_row(filename, metadata, verdict), "unreadable": True}
