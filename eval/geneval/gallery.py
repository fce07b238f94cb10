"""Every judged picture for the report's page: small copies as data URIs, with what was seen in them."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_pipeline.geneval_text import TAGS
from data_pipeline.images import read_rgb
from eval.geneval.results import Found, Judged, Results

__all__ = ["LARGEST_SIDE", "Gallery", "make_gallery"]

LOSSLESS_SIDE = 96
"""Pixels; pictures up to this size are embedded as they are."""
LARGEST_SIDE = 160
"""Pixels; of larger pictures a copy of this size is embedded."""
QUALITY = 60
"""Of the copies, WebP's. With `LARGEST_SIDE` a picture full of texture takes 7 kB: the published 553 prompts with four
pictures each make a page of 22 MB."""


@dataclass(frozen=True)
class Gallery:
    """What the page's script shows.

    Attributes:
        prompts: One entry a prompt, tasks in order: task, prompt, the classes asked for, and of each model its pictures
            (file, verdict, reasons, objects, size), or None where the model lacks the prompt.
        copies: Of each prompt and model, in the same order, the pictures as data URIs; None where one cannot be shown.
        missing: Of each model the pictures that cannot be shown, each with the reason.
    """

    prompts: tuple[dict[str, Any], ...]
    copies: tuple[tuple[tuple[str | None, ...], ...], ...]
    missing: tuple[tuple[str, ...], ...]

    @property
    def shown(self) -> int:
        """How many pictures are embedded."""
        return sum(copy is not None for prompt in self.copies for model in prompt for copy in model)


@dataclass(frozen=True)
class _Copy:
    """A picture's copy as a data URI and the size of the original, or the reason why there is none."""

    uri: str | None
    width: int
    height: int
    problem: str = ""


def _copy(path: Path | None, side: int) -> _Copy:
    if path is None:
        return _Copy(None, 0, 0, "not found")
    try:
        picture = read_rgb(path)  # as the judge saw it: the boxes are in its pixels
    except ValueError as error:
        return _Copy(None, 0, 0, f"cannot be read: {error}")
    size = picture.size
    lossless = max(size) <= LOSSLESS_SIDE
    if not lossless:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # For lossless pictures "quality" is the effort.
    picture.save(stream, format="WEBP", lossless=lossless, quality=20 if lossless else QUALITY, method=2)
    return _Copy(f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", *size)


def _object(found: Found) -> list[Any]:
    """[class, colour, score, x0, y0, x1, y1]."""
    return [found.class_name, found.color, found.score, *found.box]


def _entry(one: Judged, copy: _Copy) -> dict[str, Any]:
    return {
        "file": one.filename,
        "ok": one.correct,
        "unreadable": one.unreadable,
        "why": one.reasons,
        "found": [_object(found) for found in one.found],
        "width": copy.width,
        "height": copy.height,
        "problem": copy.problem,
    }


def _by_prompt(results: Results) -> dict[str, list[Judged]]:
    grouped: dict[str, list[Judged]] = {}
    for one in results.pictures:
        grouped.setdefault(one.metadata, []).append(one)
    return grouped


def make_gallery(models: Sequence[Results], side: int = LARGEST_SIDE, progress: bool = False) -> Gallery:
    """Read the pictures of the models, and put those of a prompt side by side.

    Args:
        models: Their results, read.
        side: Pixels of the longer side of the embedded copies; smaller pictures are embedded as they are.
        progress: Show a progress bar.
    """
    grouped = [_by_prompt(results) for results in models]
    prompts = {key: pictures[0] for group in reversed(grouped) for key, pictures in group.items()}
    # Neighbouring prompts differ in little, so the first few in file order would show one class only: within a task the
    # order is arbitrary, but always the same.
    order = sorted(prompts, key=lambda key: (TAGS.index(prompts[key].tag), sha256(key.encode()).digest()))
    wanted = [(number, one) for key in order for number, group in enumerate(grouped) for one in group.get(key, [])]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes and encodes without Python's lock
    try:
        found = pool.map(lambda item: _copy(models[item[0]].find(item[1].filename), side), wanted)
        bar = tqdm(found, total=len(wanted), desc="report", unit="picture", disable=not progress)
        copies = {(number, one.filename): copy for (number, one), copy in zip(wanted, bar, strict=True)}
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for thousands of pictures

    entries = []
    for key in order:
        first = prompts[key]
        pictures = [
            [_entry(one, copies[number, one.filename]) for one in group[key]] if key in group else None
            for number, group in enumerate(grouped)
        ]
        entries.append({"task": first.tag, "prompt": first.prompt, "asked": first.asked, "models": pictures})
    return Gallery(
        prompts=tuple(entries),
        copies=tuple(
            tuple(
                tuple(copies[number, one.filename].uri for one in group.get(key, []))
                for number, group in enumerate(grouped)
            )
            for key in order
        ),
        missing=tuple(
            tuple(
                f"{file} ({copy.problem})"
                for (who, file), copy in sorted(copies.items(), key=lambda item: item[0])
                if who == number and copy.problem
            )
            for number in range(len(models))
        ),
    )
