"""Reading results: ours and the published script's, names, pictures that have moved, and mistakes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from eval.files import write_jsonl
from eval.geneval.detections import Detection
from eval.geneval.results import read_results
from eval.geneval.scoring import judge_picture, result_row, unreadable_row
from eval.geneval.statistics import summarize

METADATA = {
    "tag": "counting",
    "include": [{"class": "bench", "count": 2}],
    "exclude": [{"class": "bench", "count": 3}],
    "prompt": "a photo of two benchs",
}
BOXES = {"bench": [[1.5, 2.0, 30.0, 40.0, 0.98], [4.0, 5.0, 6.0, 7.0, 0.91]], "cow": [[0.0, 0.0, 9.0, 9.0, 0.95]]}


def published_row(**changes: Any) -> dict[str, Any]:
    """A line as GenEval's own script writes it."""
    row = {
        "filename": "outputs/00000/samples/0000.png",
        "tag": "counting",
        "prompt": METADATA["prompt"],
        "correct": False,
        "reason": "expected bench>=2, found 1\nexpected cow<1, found 1",
        "metadata": json.dumps(METADATA),
        "details": json.dumps(BOXES),
    }
    return {**row, **changes}


def results_file(folder: Path, *rows: dict[str, Any]) -> Path:
    write_jsonl(folder / "results.jsonl", rows)
    return folder / "results.jsonl"


@pytest.mark.parametrize("changes", [{}, {"metadata": METADATA, "details": BOXES, "colors": None, "correct": 0}])
def test_a_line_of_the_published_script(tmp_path: Path, changes: dict[str, Any]) -> None:
    results = read_results(results_file(tmp_path, published_row(**changes)))
    (one,) = results.pictures
    assert (one.tag, one.prompt, one.correct, one.unreadable) == ("counting", METADATA["prompt"], False, False)
    assert one.reasons == ("expected bench>=2, found 1", "expected cow<1, found 1")
    assert json.loads(one.metadata) == METADATA
    assert one.asked == ("bench",)
    assert [(found.class_name, found.color, found.score) for found in one.found] == [
        ("bench", None, 0.98), ("bench", None, 0.91), ("cow", None, 0.95),
    ]  # fmt: skip
    assert one.found[0].box == (1.5, 2.0, 30.0, 40.0)


def test_the_order_of_the_keys_does_not_make_another_prompt(tmp_path: Path) -> None:
    turned = dict(reversed(METADATA.items()))
    rows = [published_row(), published_row(filename="b.png", metadata=json.dumps(turned, indent=1))]
    results = read_results(results_file(tmp_path, *rows))
    assert results.summary["counting"].prompts == 1
    assert results.summary["counting"].images == 2


def test_our_own_lines_with_colors(tmp_path: Path) -> None:
    metadata = {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a photo"}
    seen = [
        Detection("bench", (1.0, 2.0, 3.0, 4.0), 0.9, color="blue"),
        Detection("cow", (1.0, 2.0, 3.0, 4.0), 0.8),
    ]
    rows = [
        result_row("0.png", metadata, judge_picture(seen, metadata)),
        unreadable_row("1.png", metadata, "OSError"),
    ]
    results = read_results(results_file(tmp_path, *rows))
    judged, unreadable = results.pictures
    assert [(found.class_name, found.color) for found in judged.found] == [("bench", "blue"), ("cow", None)]
    assert unreadable.unreadable
    assert unreadable.reasons == ("picture cannot be read: OSError",)
    assert results.summary == summarize(rows)
    assert results.summary.overall.unreadable == 1


def test_names(tmp_path: Path) -> None:
    folder = tmp_path / "some export" / "geneval"
    file = results_file(folder, published_row())
    assert read_results(folder).name == read_results(file).name == "some export"
    assert read_results(f"mine={folder}").name == "mine"
    assert read_results(f" my own ={file}").name == "my own"
    (folder / "other.jsonl").write_bytes(file.read_bytes())
    assert read_results(folder / "other.jsonl").name == "other"
    odd = tmp_path / "lr=0.1"
    results_file(odd, published_row())
    assert read_results(odd).name == "lr=0.1"
    assert read_results(f"best={odd}").name == "best"


def summary_of(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    scores = summarize(rows).to_json()
    model = {"recipe": "tiny", "step": 1200, "sha256": "ab" * 32}
    return {
        "model": model,
        "judge": "shapes",
        "judged_at": "2026",
        "scores": scores,
        "ceilings": {"truth": scores},
    } | changes


def test_the_summary_beside_tells_name_and_ceilings(tmp_path: Path) -> None:
    rows = [published_row(filename=f"{n}.png", correct=n < 2) for n in range(4)]
    results_file(tmp_path, *rows)
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(rows)))
    results = read_results(tmp_path)
    assert results.name == "tiny, step 1,200"
    assert (results.source.step, results.source.judge) == (1200, "shapes")
    assert results.ceilings == {"truth": summarize(rows)}
    assert read_results(f"mine={tmp_path}").name == "mine"


def test_a_summary_of_other_results_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [published_row(filename=f"{n}.png", correct=n < 2) for n in range(4)]
    results_file(tmp_path / "mine", *rows[:3])
    (tmp_path / "mine/summary.json").write_text(json.dumps(summary_of(rows)))
    results = read_results(tmp_path / "mine")
    assert (results.name, results.ceilings) == ("mine", {})
    assert "summary.json is of other results" in capsys.readouterr().out


def test_a_summary_of_as_many_right_ones_of_other_results_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [published_row(filename=name, correct=name == "a.png") for name in ("a.png", "b.png")]
    file = results_file(tmp_path, *rows)
    document = summary_of(rows, results_sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    (tmp_path / "summary.json").write_text(json.dumps(document))
    assert read_results(tmp_path).source.recipe is not None
    assert capsys.readouterr().out == ""
    results_file(tmp_path, *({**row, "correct": not row["correct"]} for row in rows))
    assert read_results(tmp_path).source.recipe is None
    assert "summary.json is of other results" in capsys.readouterr().out


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    rows = [published_row()]
    results_file(tmp_path, *rows)
    for text in ("{", "[]", json.dumps(summary_of(rows, ceilings={"truth": {"tasks": 3}}))):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
            read_results(tmp_path)


def test_nobody_elses_pictures_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another model, which lie where the command is started, under the names that all have."""
    for name in ("here/00000/samples/0000.png", "images/00000/samples/0000.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("00000/samples/0000.png", "../images/00000/samples/0000.png"):
        results = read_results(results_file(tmp_path / "far/away/results", published_row(filename=name)))
        assert results.find(name) is None


def test_pictures_are_found_where_the_summary_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures/00000/samples").mkdir(parents=True)
    place = tmp_path / "pictures/00000/samples/0000.png"
    place.touch()
    row = published_row(filename="../gone/00000/samples/0000.png")
    moved = tmp_path / "far/away"
    results_file(moved, row)
    monkeypatch.chdir(tmp_path)
    # Without its beginning it is a folder of wherever the pictures were judged.
    for images, expected in ((str(tmp_path / "pictures"), place), ("pictures", None)):
        (moved / "summary.json").write_text(json.dumps(summary_of([row], images=images)))
        assert read_results(moved).find(row["filename"]) == expected


def test_pictures_are_found_where_they_they_may_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "outputs/00000/samples/0000.png"
    results = read_results(results_file(tmp_path / "results", published_row(filename=name)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def made(file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    assert results.find(name) is None
    made(tmp_path / "elsewhere/00000/samples/0000.png")  # of whichever model the command happens to start beside
    assert results.find(name) is None
    # The better a place, the later it is made.
    for place in (
        tmp_path / "elsewhere" / name,
        tmp_path / "results/images/00000/samples/0000.png",
        tmp_path / "results/00000/samples/0000.png",
        tmp_path / "results" / name,
    ):
        made(place)
        found = results.find(name)
        assert found is not None
        assert found.resolve() == place.resolve()
    (tmp_path / "moved").mkdir()
    moved = read_results(tmp_path / "results", tmp_path / "moved")
    assert moved.find(name) is None
    place = made(tmp_path / "moved/00000/samples/0000.png")
    assert moved.find(name) == place
    absolute = made(tmp_path / "absolute.png")
    assert results.find(str(absolute)) == absolute


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "shapes"}, "the task is 'shapes'"),
        ({"correct": "false"}, "correct is 'false'"),
        ({"correct": None}, "correct missing"),
        ({"filename": None, "prompt": None}, "filename, prompt missing"),
        ({"metadata": "{"}, "no GenEval result"),
        ({"metadata": "[1]"}, r"metadata is '\[1\]'"),
        ({"details": {"bench": [[1, 2, 3]]}}, "a box of 'bench'"),
        ({"details": '{"bench": [[1, 2, 3, NaN, 0.5]]}'}, "a box of 'bench'"),
        ({"details": {"bench": [["a", 2, 3, 4, 5]]}}, "no GenEval result"),
        ({"details": {"bench": 7}}, "no GenEval result"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = results_file(tmp_path, published_row(), published_row(**{"filename": "b.png"} | changes))
    with pytest.raises(ValueError, match=message) as caught:
        read_results(file)
    assert f"{file}, result 2," in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"results\.jsonl does not exist"):
        read_results(tmp_path)
    (tmp_path / "results.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path)
    results_file(tmp_path, published_row(), published_row())
    with pytest.raises(ValueError, match="1 pictures more than once"):
        read_results(tmp_path)
    results_file(tmp_path, published_row())
    with pytest.raises(ValueError, match="none is not a folder"):
        read_results(tmp_path, tmp_path / "none")
