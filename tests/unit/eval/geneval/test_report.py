"""The report page: self-contained, complete, and safe whatever a prompt or a recipe is called."""

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shapes import evaluation_metadata
from eval.geneval.ceiling import ground_truth_pictures
from eval.geneval.charts import loss_chart, score_chart
from eval.geneval.detectors import load_detector
from eval.geneval.judging import judge_pictures
from eval.geneval.report import Losses, Report, read_losses, write_report
from eval.geneval.statistics import summarize

IMAGES = 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Correct pictures of two prompts a task, half of them judged by another prompt's entry."""
    root = tmp_path_factory.mktemp("pictures")
    prompts = evaluation_metadata(per_task=2)
    pictures = list(ground_truth_pictures(prompts, IMAGES))
    shown = [
        replace(picture, image=pictures[(place + 7 * (place % 2)) % len(pictures)].image, filename=f"{place}.png")
        for place, picture in enumerate(pictures)
    ]
    for picture in shown:
        assert picture.image is not None
        Image.fromarray(picture.image).save(root / picture.filename)
    rows = judge_pictures(load_detector("shapes"), shown, len(shown), progress=False)
    assert 0 < sum(row["correct"] for row in rows) < len(rows)
    return Report(
        recipe="tiny",
        step=1200,
        checksum="0123456789abcdef" * 4,
        judge="shapes",
        judged_at=datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
        summary=summarize(rows),
        ceilings={"ground truth": summarize(rows), "colors only": summarize([r for r in rows if r["tag"] == "colors"])},
        rows=rows,
        pictures=root,
        losses=Losses(((10, 6.5), (20, 6.0), (30, 5.5)), ((20, 6.1),)),
    )


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(report, tmp_path_factory.mktemp("page"))


def written(report: Report, folder: Path) -> str:
    write_report(report, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


class Addresses(HTMLParser):
    """Every address that an element of the page names, and the tags themselves."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def gallery(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    entries: list[dict[str, Any]] = json.loads(match[1])
    return entries


def test_page_is_self_contained(page: str) -> None:
    addresses = Addresses(page)
    assert not [address for address in addresses.found if not address.startswith(("#", "data:"))]
    assert not addresses.tags & {"link", "iframe", "img", "object", "embed"}
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert all(uri.startswith(("data:", "#")) for uri in re.findall(r'url\("?([^)"]*)', page))


def test_every_prompt_picture_and_reason_is_there(report: Report, page: str) -> None:
    entries = gallery(page)
    assert {entry["prompt"] for entry in entries} == {row["prompt"] for row in report.rows}
    shown = {picture["file"]: picture for entry in entries for picture in entry["pictures"]}
    assert len(shown) == len(report.rows)
    for row in report.rows:
        assert shown[row["filename"]]["ok"] == row["correct"]
        assert "\n".join(shown[row["filename"]]["why"]) == row["reason"]
        boxes = sum(len(found) for found in json.loads(row["details"]).values())
        assert len(shown[row["filename"]]["objects"]) == boxes
    tasks = [entry["task"] for entry in entries]
    assert tasks == sorted(tasks, key=[score.tag for score in report.summary.tasks].index)


def test_sheets_hold_the_very_pixels(report: Report, page: str) -> None:
    for entry in gallery(page):
        content = base64.b64decode(entry["sheet"].removeprefix("data:image/webp;base64,"))
        sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert sheet.shape == (64, 64 * IMAGES, 3)
        for number, picture in enumerate(entry["pictures"]):
            original = np.asarray(Image.open(report.pictures / picture["file"]))
            np.testing.assert_array_equal(sheet[:, 64 * number : 64 * (number + 1)], original)


def test_objects_carry_their_colors(report: Report, page: str) -> None:
    labels = {one[0] for entry in gallery(page) for picture in entry["pictures"] for one in picture["objects"]}
    wanted = {row["prompt"].removeprefix("a photo of a ") for row in report.rows if row["tag"] == "colors"}
    assert wanted & labels
    assert all(len(label.split()) == 2 for label in labels)


def test_header_table_and_charts(report: Report, page: str) -> None:
    for word in ("tiny", "1,200", "0123456789ab", "01 March 2026, 12:30 UTC", "Loss over training steps"):
        assert word in page
    for score in (*report.summary.tasks, report.summary.overall):
        for number in (score.per_image.value, score.per_image.low, score.per_image.high):
            assert f"{number:.3f}" in page
        assert f"{score.correct}/{score.images}" in page
    assert page.count("<svg") == 2
    assert "ceiling: ground truth" in page
    assert "color-scheme: dark" in page


def test_without_a_run_the_page_says_how_to_give_one(report: Report, tmp_path: Path) -> None:
    page = written(replace(report, losses=None), tmp_path)
    assert "--run-dir RUN" in page
    assert page.count("<svg") == 1


def test_names_cannot_break_the_page(report: Report, tmp_path: Path) -> None:
    evil = "</script><script>alert('1')</script><b>&"

    def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": evil, "reason": evil}

    page = written(replace(report, recipe=evil, rows=[renamed(row) for row in report.rows]), tmp_path)
    assert "<script>alert" not in page
    assert {entry["prompt"] for entry in gallery(page)} == {evil}


def test_unreadable_and_large_pictures(report: Report, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number, row in enumerate(report.rows[:2]):
        rows.append({**row, "filename": f"{number}.png"})
        pixels = np.kron(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), np.ones((128, 128, 1), dtype=np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    entry = gallery(written(replace(report, rows=rows, pictures=tmp_path), tmp_path))[0]
    # Boxes are in the pixels of the original, also where a smaller copy is shown.
    assert (entry["width"], entry["height"]) == (512, 512)
    content = base64.b64decode(entry["sheet"].partition(",")[2])
    sheet = Image.open(io.BytesIO(content))
    assert sheet.size == (2 * 256, 256)
    assert max(abs(channel - 0x88) for channel in sheet.convert("RGB").getpixel((400, 128))) <= 3  # type: ignore[union-attr]


def test_a_thousand_pictures_stay_below_ten_megabytes(report: Report, tmp_path: Path) -> None:
    size = len(written(report, tmp_path).encode())
    empty = len(written(replace(report, rows=[]), tmp_path).encode())
    assert empty + (size - empty) / len(report.rows) * 1200 < 10e6


def test_losses_are_read_and_sorted(tmp_path: Path) -> None:
    lines = ['{"step": 20, "loss": 2.0, "lr": 0.1}', '{"step": 10, "loss": 3.0}', '{"step": 20, "val_loss": 2.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_losses(tmp_path) == Losses(((10, 3.0), (20, 2.0)), ((20, 2.5),))


def test_runs_without_losses_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        read_losses(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 20, "val_loss": 2.5}\n')
    with pytest.raises(ValueError, match="no training losses"):
        read_losses(tmp_path)


def test_charts_take_the_colors_of_the_page(report: Report) -> None:
    for chart in (loss_chart(((1, 2.0), (2, 1.0)), ()), score_chart(report.summary, report.ceilings)):
        assert "currentColor" in chart
        assert "var(--accent)" in chart
        assert not re.findall(r"#0000\d\d", chart)


def test_a_long_run_has_a_small_chart() -> None:
    rng = np.random.default_rng(0)
    points = [(step, float(rng.random())) for step in range(100_000)]
    assert len(loss_chart(points, points[::1000])) < 100_000
