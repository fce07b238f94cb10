"""The report page: self-contained, complete, and safe whatever a prompt or a model is called."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shapes import evaluation_metadata
from eval.files import write_jsonl
from eval.geneval.ceiling import ground_truth_pictures
from eval.geneval.charts import MODELS, loss_chart, score_chart
from eval.geneval.detectors import load_detector
from eval.geneval.gallery import LARGEST_SIDE
from eval.geneval.judging import judge_pictures
from eval.geneval.prompts import coco_prompts
from eval.geneval.report import Losses, make_report, read_losses, write_report
from eval.geneval.results import Found, Judged, Results, Source, read_results
from eval.geneval.statistics import summarize

IMAGES = 2
LOSSES = Losses(((10, 6.5), (20, 6.0), (30, 5.5)), ((20, 6.1),))
SOURCE = Source("tiny", 1200, "0123456789abcdef" * 4, "shapes", "2026-03-01T12:30:00+00:00")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Two models, two prompts a task: correct pictures, some of which (more of the second) are of another prompt."""
    prompts = evaluation_metadata(per_task=2)
    pictures = list(ground_truth_pictures(prompts, IMAGES))
    made = []
    for name, every in (("first", 4), ("second", 2)):
        root = tmp_path_factory.mktemp(name)
        shown = [
            replace(picture, image=pictures[(place + 7 * (place % every == 1)) % len(pictures)].image)
            for place, picture in enumerate(pictures)
        ]
        for picture in shown:
            assert picture.image is not None
            file = root / f"{picture.filename}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.image).save(file)
        rows = judge_pictures(load_detector("shapes"), shown, len(shown), progress=False)
        assert 0 < sum(row["correct"] for row in rows) < len(rows)
        write_jsonl(root / "results.jsonl", [{**row, "filename": f"{row['filename']}.png"} for row in rows])
        made.append(read_results(f"{name}={root}"))
    assert sum(one.correct for one in made[0].pictures) > sum(one.correct for one in made[1].pictures)
    ceilings = {
        "ground truth": summarize(made[0].rows),
        "colors only": summarize([r for r in made[0].rows if r["tag"] == "colors"]),
    }
    return [replace(made[0], ceilings=ceilings, source=SOURCE), made[1]]


@pytest.fixture(scope="module")
def page(models: list[Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the first model alone."""
    return written(models[:1], tmp_path_factory.mktemp("page"), LOSSES)


@pytest.fixture(scope="module")
def both(models: list[Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the two side by side."""
    return written(models, tmp_path_factory.mktemp("both"))


def written(models: list[Results], folder: Path, losses: Losses | None = None, **options: Any) -> str:
    write_report(models, folder / "report.html", losses, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every address that an element names, the tags, and the rows of the tables as texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += f" {data}"


def row(page: str, first: str, number: int = 0) -> list[str]:
    """The cells of the table row that starts with this text, the n-th of them."""
    return [cells for cells in Page(page).rows if cells[0] == first][number][1:]


def text(page: str) -> str:
    """The page with all white space single."""
    return " ".join(page.split())


def gallery(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    entries: list[dict[str, Any]] = json.loads(match[1])["prompts"]
    return entries


def pictures(page: str, model: int = 0) -> Iterator[tuple[dict[str, Any], Image.Image | None]]:
    """What the page says of each picture of a model, and its copy."""
    for number, entry in enumerate(gallery(page)):
        match = re.search(rf'<script type="application/json" id="copies-{number}-{model}">(.*?)</script>', page)
        assert match is not None
        for one, copy in zip(entry["models"][model] or [], json.loads(match[1]), strict=True):
            if copy is None:
                yield one, None
            else:
                content = base64.b64decode(copy.removeprefix("data:image/webp;base64,"))
                yield one, Image.open(io.BytesIO(content)).convert("RGB")


def test_pages_are_self_contained(page: str, both: str) -> None:
    for html in (page, both):
        found = Page(html)
        assert not [address for address in found.addresses if not address.startswith(("#", "data:"))]
        assert not found.tags & {"link", "iframe", "img", "object", "embed"}
        assert "http://" not in html
        assert "https://" not in html
        assert "@import" not in html
        assert all(uri.startswith(("data:", "#")) for uri in re.findall(r'url\("?([^)"]*)', html))


def test_every_prompt_picture_and_reason_is_there(models: list[Results], both: str) -> None:
    entries = gallery(both)
    assert [len(entry["models"]) for entry in entries] == [2] * 12
    for number, results in enumerate(models):
        shown = {one["file"]: one for one, _ in pictures(both, number)}
        assert {entry["prompt"] for entry in entries} == {one.prompt for one in results.pictures}
        assert len(shown) == len(results.pictures)
        for judged in results.pictures:
            one = shown[judged.filename]
            assert one["ok"] == judged.correct
            assert one["why"] == list(judged.reasons)
            assert bool(one["why"]) != one["ok"]
            assert [(*found[:3], *found[3:]) for found in one["found"]] == [
                (found.class_name, found.color, found.score, *found.box) for found in judged.found
            ]
    tasks = [entry["task"] for entry in entries]
    assert tasks == sorted(tasks, key=[score.tag for score in models[0].summary.tasks].index)


def test_copies_hold_the_very_pixels(models: list[Results], both: str) -> None:
    for number, results in enumerate(models):
        for one, copy in pictures(both, number):
            original = np.asarray(Image.open(results.folder / one["file"]))
            np.testing.assert_array_equal(np.asarray(copy), original)
            assert (one["width"], one["height"]) == (64, 64)


def test_objects_carry_their_colors(models: list[Results], page: str) -> None:
    found = {(color, name) for one, _ in pictures(page) for name, color, *_ in one["found"]}
    wanted = {tuple(one.prompt.split()[-2:]) for one in models[0].pictures if one.tag == "colors"}
    assert wanted & found
    assert all(color for color, _ in found)


def test_header_table_and_charts(models: list[Results], page: str) -> None:
    for word in ("tiny", "1,200", "0123456789ab", "2026-03-01 12:30:00", "Loss over training steps"):
        assert word in page
    assert "24 judged pictures of 12 prompts. 24 are in this page" in text(page)
    summary = models[0].summary
    for title, key in (("per picture", "per_image"), ("per prompt, any of 2", "per_prompt")):
        cells = row(page, title)
        for cell, score in zip(cells, (*summary.tasks, summary.overall), strict=True):
            it = getattr(score, key)
            assert cell == f"{it.value:.3f} {it.low:.3f}–{it.high:.3f}"
    assert row(page, "right pictures")[-1] == f"{summary.overall.correct}/24 12 prompts"
    assert row(page, "ceiling: ground truth")[-1].startswith(f"{summary.overall.per_image.value:.3f}")
    assert row(page, "ceiling: colors only")[:3] == ["—", "—", "—"]
    assert page.count("<svg") == 2
    assert "color-scheme: dark" in page


def test_published_figures_are_as_published_and_missing_ones_stay_missing(page: str, both: str) -> None:
    expected = """
        SD v1.5 .97 .38 .35 .76 .04 .06 .43
        SD v2.1 .98 .51 .44 .85 .07 .17 .50
        SDXL .98 .74 .39 .85 .15 .23 .55
        LlamaGen-XL .71 .34 .21 .58 .07 .04 .32
        NAR-XL .98 .37 .34 .76 — — .43
        Chameleon-7B — — — — — — .39
    """
    for line in expected.strip().splitlines():
        name, figures = re.split(r" (?=[.—])", line.strip(), maxsplit=1)
        for html in (page, both):
            assert row(html, name) == [figure.replace(".", "0.") for figure in figures.split()]
    assert row(page, "model") == [
        "single object",
        "two object",
        "counting",
        "colors",
        "position",
        "color attr",
        "overall",
    ]


@pytest.mark.parametrize(
    ("kept", "words"), [(553, None), (100, "have 100, so they can only roughly"), (0, "are on other prompts")]
)
def test_whether_published_scores_compare_is_said(
    models: list[Results], tmp_path: Path, kept: int, words: str | None
) -> None:
    entries = coco_prompts()[:kept] or evaluation_metadata(per_task=1)
    rows = tuple(
        replace(models[0].pictures[0], filename=str(n), tag=entry["tag"], metadata=json.dumps(entry, sort_keys=True))
        for n, entry in enumerate(entries)
    )
    html = text(written([replace(models[0], pictures=rows)], tmp_path))
    for part in ("can only roughly", "are on other prompts"):
        assert (part in html) == (words is not None and part in words)
    assert words is None or words in html


def test_differences_of_two_models(models: list[Results], both: str) -> None:
    overall = [cells for cells in Page(both).rows if cells[0] == "overall"]
    assert len(overall) == 2
    difference = models[1].summary.overall.per_image.value - models[0].summary.overall.per_image.value
    assert overall[0][1].startswith(f"−{-difference:.3f} ")
    assert overall[0][3:6] == [f"{results.summary.overall.per_image.value:.3f}" for results in models] + ["12"]
    assert "second minus first" in text(both)
    assert "Left out" not in both
    assert "Pictures of a prompt" not in both


def test_the_same_results_twice_are_not_distinguishable(models: list[Results], tmp_path: Path) -> None:
    html = written([models[0], replace(models[0], name="again")], tmp_path)
    for tag in ("single object", "counting", "overall"):
        for number in (0, 1):
            cells = row(html, tag, number)
            assert cells[0] == "0.000 0.000 to 0.000"
            assert cells[1] == "not distinguishable"


def test_more_than_two_are_held_against_the_first(models: list[Results], tmp_path: Path) -> None:
    html = written([*models, replace(models[0], name="third")], tmp_path)
    headings = re.findall(r"<h2>([^<]* minus [^<]*)</h2>", html)
    assert headings == ["second minus first", "third minus first"]
    assert len(gallery(html)[0]["models"]) == 3


def test_other_prompts_and_numbers_of_pictures_are_said(models: list[Results], tmp_path: Path) -> None:
    kept = [one for one in models[1].pictures if one.tag != "colors"]
    fewer = replace(models[1], pictures=tuple(kept[1:]))  # a prompt with one picture, and two prompts without any
    html = text(written([models[0], fewer], tmp_path))
    assert "Over the 10 prompts that both have" in html
    assert "Left out: 2 prompts that only first has and 0 that only second has." in html
    assert "Pictures of a prompt: 2 of first, 1 to 2 of second" in html
    assert "per prompt, any of 1 to 2" in html
    assert sum(entry["models"][1] is None for entry in gallery(html)) == 2
    assert row(html, "per picture", 1)[3] == "—"


def test_models_that_cannot_be_compared_are_errors(models: list[Results], tmp_path: Path) -> None:
    first, second = models
    colors = replace(first, name="colors", pictures=tuple(one for one in first.pictures if one.tag == "colors"))
    others = replace(second, pictures=tuple(one for one in second.pictures if one.tag != "colors"))
    with pytest.raises(ValueError, match="colors and second have no prompt in common"):
        written([colors, others], tmp_path)
    with pytest.raises(ValueError, match="2 results are called 'first'"):
        written([first, first], tmp_path)
    with pytest.raises(ValueError, match="there are no results"):
        written([], tmp_path)
    with pytest.raises(ValueError, match="thumbnails of 8 pixels"):
        written([first], tmp_path, side=8)
    assert not list(tmp_path.iterdir())


def test_without_a_run_the_page_says_how_to_give_one(models: list[Results], tmp_path: Path) -> None:
    page = written(models[:1], tmp_path)
    assert "--run-dir RUN" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize(
    "evil", ["</script><script>alert('1')</script><b>&", "{{ 7 * 7 }}{% raw %}", "$x^$ #000010 \\\u2028\ud800"]
)
def test_names_cannot_break_the_page(models: list[Results], tmp_path: Path, evil: str) -> None:
    shown = evil.encode("utf-8", "replace").decode()  # names are made so when they are read

    def renamed(one: Judged) -> Judged:
        found = (Found(evil, evil, 0.5, (0.0, 0.0, 9.0, 9.0)),)
        return replace(one, prompt=evil, reasons=(evil, evil), asked=(evil,), found=found)

    hostile = [
        replace(
            results,
            name=f"{number}{shown}",
            pictures=tuple(map(renamed, results.pictures)),
            ceilings={shown: results.summary},
            source=Source(shown, 1, shown, shown, shown),
        )
        for number, results in enumerate(models)
    ]
    page = written(hostile, tmp_path)
    assert "<script>alert" not in page
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", page)[0]
    assert {entry["prompt"] for entry in gallery(page)} == {evil}
    assert next(pictures(page))[0]["found"][0][:2] == [evil, evil]
    assert Page(page).tags == Page(written(models, tmp_path)).tags
    assert row(page, f"ceiling: {' '.join(shown.split())}")


def test_unreadable_missing_and_large_pictures(models: list[Results], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (4, 8, 3), dtype=np.uint8), np.ones((64, 64, 1), dtype=np.uint8))
    names = ["large.png", "damaged.png", "cut.png", "missing.png", "odd.png"]
    for name in names[:3]:
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    Image.fromarray(pixels[:1]).convert("L").save(tmp_path / "odd.png")
    rows = tuple(replace(models[0].pictures[0], filename=name) for name in names)
    page = written([replace(models[0], folder=tmp_path, pictures=rows)], tmp_path)
    shown = {one["file"]: (one, copy) for one, copy in pictures(page)}
    one, copy = shown["large.png"]
    # Boxes are in the pixels of the original, also where a smaller copy is shown.
    assert (one["width"], one["height"]) == (512, 256)
    assert copy is not None
    assert copy.size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert np.abs(np.asarray(copy)[10, 10].astype(int) - pixels[32, 32]).max() < 25
    assert shown["odd.png"][1] is not None
    assert shown["odd.png"][1].size == (LARGEST_SIDE, 1)
    problems = {name: one["problem"] for name, (one, copy) in shown.items() if copy is None}
    assert problems["missing.png"] == "not found"
    assert problems["damaged.png"].startswith("cannot be read: ")
    assert problems["cut.png"].startswith("cannot be read: ")
    assert len(problems) == 3
    assert "3 pictures of first are not found or cannot be read" in text(page)
    assert "5 judged pictures of 1 prompts. 2 are in this page" in text(page)


def test_a_thousand_small_pictures_stay_below_ten_megabytes(models: list[Results], page: str, tmp_path: Path) -> None:
    one = replace(models[0], pictures=models[0].pictures[:1])
    size, empty = len(page.encode()), len(written([one], tmp_path, LOSSES).encode())
    assert empty + (size - empty) / (len(models[0].pictures) - 1) * 1200 < 10e6


def test_the_published_prompts_with_large_pictures_stay_usable(models: list[Results], tmp_path: Path) -> None:
    """Pictures of 512x512 full of texture, of which a whole evaluation would be twenty megabytes."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    frequency[0, 0] = 1
    rows = []
    for number in range(4):
        noise = np.fft.fft2(rng.normal(size=(3, 512, 512)))
        field = np.real(np.fft.ifft2(noise / frequency**1.1)).transpose(1, 2, 0)
        Image.fromarray(np.clip(128 + 45 * field / field.std(), 0, 255).astype(np.uint8)).save(
            tmp_path / f"{number}.png"
        )
        rows.append(replace(models[0].pictures[0], filename=f"{number}.png"))

    def size(kept: int, **options: Any) -> int:
        return len(written([replace(models[0], folder=tmp_path, pictures=tuple(rows[:kept]))], tmp_path, **options))

    each = (size(4) - size(1)) / 3
    assert 3e3 < each
    assert each * 553 * 4 < 25e6
    assert (size(4, side=64) - size(1, side=64)) / 3 < each / 3


def test_a_report_from_files(models: list[Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(results.folder) for results in models]
    out = tmp_path / "new" / "report.html"
    written = make_report([f"a={folders[0]}", f"b={folders[1]}/results.jsonl"], out, progress=False)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"report: {out} ({out.stat().st_size / 1e6:.1f} MB, 48 pictures)"]
    assert (written.shown, written.missing) == (48, ())
    assert "<h1>GenEval: a, b</h1>" in out.read_text()
    before = out.read_bytes()
    make_report([f"a={folders[0]}", f"b={folders[1]}"], out, progress=False)
    assert out.read_bytes() == before


def test_pictures_that_are_not_there_are_printed(
    models: list[Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 20, "loss": 2.0}\n')
    folder = str(models[0].folder)
    written = make_report(
        [folder], tmp_path / "a.html", images=[tmp_path / "empty"], run_dir=tmp_path / "run", progress=False
    )
    assert (written.shown, len(written.missing)) == (0, 24)
    first = models[0].pictures[0].filename
    assert f"24 pictures cannot be shown: {first} (not found), " in capsys.readouterr().out
    assert "Loss over training steps" in (tmp_path / "a.html").read_text()


def test_options_that_do_not_fit_are_errors(models: list[Results], tmp_path: Path) -> None:
    folders = [str(results.folder) for results in models]
    with pytest.raises(ValueError, match="1 folders of pictures for 2 results"):
        make_report(folders, tmp_path / "a.html", images=[tmp_path], progress=False)
    with pytest.raises(ValueError, match="is the training run of one model, and there are 2"):
        make_report(folders, tmp_path / "a.html", run_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="is a folder; give a file name"):
        make_report(folders[:1], tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


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


def test_charts_take_the_colors_of_the_page(models: list[Results]) -> None:
    summaries = [results.summary for results in models] * 4
    chart = score_chart(summaries, [results.ceilings for results in models] * 4)
    for drawn in (loss_chart(((1, 2.0), (2, 1.0)), ()), chart):
        assert "currentColor" in drawn
        assert not re.findall(r"#0000\d\d", drawn)
    # More models than colours begin again.
    assert {f"var(--model{number})" for number in range(len(MODELS))} <= set(re.findall(r"var\(--model\d+\)", chart))
    assert chart.count("<path") > score_chart(summaries[:1], [{}]).count("<path")


def test_a_long_run_has_a_small_chart() -> None:
    rng = np.random.default_rng(0)
    points = [(step, float(rng.random())) for step in range(100_000)]
    assert len(loss_chart(points, points[::1000])) < 100_000
