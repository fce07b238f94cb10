"""The report: one HTML file with scores, charts and every picture, which needs neither a server nor a network.

Pictures are inlined as one sprite sheet per prompt; the page shows a few prompts of each task and more on request, so
that a thousand pictures stay quick to open.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from eval.files import read_jsonl, write_text
from eval.geneval.charts import loss_chart, score_chart
from eval.geneval.statistics import Summary

__all__ = ["Losses", "Report", "read_losses", "write_report"]

LOSSLESS_SIDE = 96  # pixels; larger pictures are stored lossily and at most LARGEST_SIDE wide, to keep the page light
LARGEST_SIDE = 256


@dataclass(frozen=True)
class Losses:
    """The loss curves of a run: (step, cross-entropy) points."""

    training: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Attributes:
        recipe: The model's recipe.
        step: The training step of its export.
        checksum: SHA-256 of the export, in hexadecimal.
        judge: Who looked at the pictures.
        judged_at: When.
        summary: The scores.
        ceilings: Name -> the judge's scores of pictures that no model can be expected to beat.
        rows: Lines of results.jsonl.
        pictures: The folder that the rows' filenames are relative to.
        losses: The loss curves, where the run is at hand.
    """

    recipe: str
    step: int
    checksum: str
    judge: str
    judged_at: datetime
    summary: Summary
    ceilings: Mapping[str, Summary]
    rows: Sequence[Mapping[str, Any]]
    pictures: Path
    losses: Losses | None = None


def read_losses(run_dir: Path) -> Losses:
    """The loss curves in a training run's metrics.jsonl.

    Raises:
        ValueError: no such file, a line that is no JSON object, or no losses in it.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl; give the folder of a training run, or none")
    rows = read_jsonl(path)

    def points(name: str) -> tuple[tuple[int, float], ...]:
        return tuple(sorted((int(row["step"]), float(row[name])) for row in rows if name in row))

    losses = Losses(points("loss"), points("val_loss"))
    if not losses.training:
        raise ValueError(f"{path} holds no training losses yet; let the run log its first steps")
    return losses


def _sheet(files: Sequence[Path]) -> tuple[str, int, int]:
    """The pictures side by side as a data URI, and the size of the first readable one; gaps where one is unreadable."""
    images: list[Image.Image | None] = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except (OSError, SyntaxError, UnidentifiedImageError):  # Pillow's PNG reader raises SyntaxError
            images.append(None)
    width, height = next((image.size for image in images if image is not None), (1, 1))
    lossless = max(width, height) <= LOSSLESS_SIDE
    scale = 1.0 if lossless else min(1.0, LARGEST_SIDE / max(width, height))
    tile = (round(width * scale), round(height * scale))
    sheet = Image.new("RGB", (tile[0] * len(images), tile[1]), "#888")
    for position, picture in enumerate(images):
        if picture is not None:
            shown = picture if picture.size == tile else picture.resize(tile, Image.Resampling.LANCZOS)
            sheet.paste(shown, (position * tile[0], 0))
    stream = io.BytesIO()
    sheet.save(stream, format="WEBP", lossless=lossless, quality=20 if lossless else 85, method=2)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}", width, height


def _objects(row: Mapping[str, Any]) -> list[list[Any]]:
    """What the judge counted in a picture: [label, score, x0, y0, x1, y1] per object, corners in pixels."""
    colors: dict[str, list[str | None]] = json.loads(row.get("colors", "{}"))
    found = []
    for name, boxes in json.loads(row["details"]).items():
        names = colors.get(name, [None] * len(boxes))
        for (x0, y0, x1, y1, score), color in zip(boxes, names, strict=True):
            found.append([f"{color} {name}" if color else name, score, x0, y0, x1, y1])
    return found


def _gallery(report: Report) -> list[dict[str, Any]]:
    """One entry per prompt, tasks in order; within a task in an order that is arbitrary but always the same."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in report.rows:
        by_prompt.setdefault(row["metadata"], []).append(row)
    order = {score.tag: place for place, score in enumerate(report.summary.tasks)}
    entries = []
    # Neighbouring prompts differ in little, so the first few in file order would show one shape only.
    for metadata, rows in sorted(
        by_prompt.items(), key=lambda item: (order[item[1][0]["tag"]], sha256(item[0].encode()).digest())
    ):
        sheet, width, height = _sheet([report.pictures / row["filename"] for row in rows])
        entries.append(
            {
                "task": rows[0]["tag"],
                "prompt": rows[0]["prompt"],
                "id": sha256(metadata.encode()).hexdigest()[:8],
                "sheet": sheet,
                "width": width,
                "height": height,
                "pictures": [
                    {
                        "file": row["filename"],
                        "ok": bool(row["correct"]),
                        "why": row["reason"].split("\n") if row["reason"] else [],
                        "objects": _objects(row),
                    }
                    for row in rows
                ],
            }
        )
    return entries


def write_report(report: Report, path: Path) -> None:
    """Write the page, self-contained, to `path`."""
    environment = Environment(
        loader=PackageLoader("eval.geneval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    # Charts are our own markup, from numbers and task names only.
    losses = report.losses
    page = environment.get_template("report.html.j2").render(
        report=report,
        scores=[*report.summary.tasks, report.summary.overall],
        gallery=_gallery(report),
        loss_chart=None if losses is None else Markup(loss_chart(losses.training, losses.validation)),
        score_chart=Markup(score_chart(report.summary, report.ceilings)),
    )
    write_text(path, page)
