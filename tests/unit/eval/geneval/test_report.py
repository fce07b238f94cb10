"""The report page: self-contained, complete, and safe whatever a prompt or a model is called."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_pages import Page, gallery, pictures, row, text, written

from data_pipeline.shapes import evaluation_metadata
from eval.geneval.prompts import coco_prompts
from eval.geneval.report import Losses, make_report, read_losses
from eval.geneval.results import Found, Judged, Results, Source


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


def test_an_overall_score_of_some_tasks_says_so(models: list[Results], page: str, tmp_path: Path) -> None:
    some = replace(models[0], pictures=tuple(one for one in models[0].pictures if one.tag in ("colors", "counting")))
    html = written([some], tmp_path)
    overall = some.summary.overall.per_image
    assert row(html, "per picture")[-1] == (f"{overall.value:.3f} {overall.low:.3f}–{overall.high:.3f} 2 of 6 tasks")
    assert "overall (2 of 6 tasks), 95% interval" in text(html)
    assert html.count("(2 of 6 tasks)") == 2  # and in the chart
    assert "of those that there are" in html
    assert "2 of 6 tasks" not in page
    differing = written([models[0], replace(some, name="some")], tmp_path)
    assert row(differing, "overall (2 of 6 tasks)")[-2] == "4"
    assert "(tasks differ)" in differing


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
