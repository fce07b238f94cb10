"""Scoring of folders in the published layout: the whole path on loaded models, ranks, resuming, odd folders."""

import json
import os
import shutil
import socket
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_folders import PROMPTS, SHAPES_PROMPTS, MakeJudge, counting, make_images, shapes_judge
from PIL import Image

from data_pipeline import shapes
from eval.files import read_jsonl
from eval.geneval.score import Scores, list_pictures, missing_prompts, score_pictures, unfinished, write_summary
from eval.ranks import Ranks

PUBLISHED_FIELDS = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]


def published_summary(rows: list[dict[str, Any]]) -> tuple[dict[str, float], float, float]:
    """What the published summary script prints: task scores, their mean, and the share of prompts with a right picture."""
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, list[bool]] = {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(row["correct"])
        prompts.setdefault(row["metadata"], []).append(row["correct"])
    scores = {tag: float(np.mean(correct)) for tag, correct in tags.items()}
    return scores, float(np.mean(list(scores.values()))), float(np.mean([any(correct) for correct in prompts.values()]))


@pytest.fixture(scope="module")
def whole(images: Path, neural: MakeJudge, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    """The results of one rank, and their folder, which lies beside the images."""
    out = images.parent / "results"
    scores = score_pictures(list_pictures(images), out, neural(), progress=False)
    assert scores is not None
    write_summary(scores, out)
    return out, scores


def test_the_whole_path_on_loaded_models(whole: tuple[Path, Scores], images: Path) -> None:
    out, scores = whole
    rows = read_jsonl(out / "results.jsonl")
    assert rows == scores.rows
    assert len(rows) == 24
    for row in rows:
        assert list(row)[: len(PUBLISHED_FIELDS)] == PUBLISHED_FIELDS
        assert (out / row["filename"]).resolve().is_file()
        assert bool(row["reason"]) != row["correct"]
        details, colors = json.loads(row["details"]), json.loads(row["colors"])
        assert details.keys() == colors.keys()
        for name, boxes in details.items():
            assert len(boxes) == len(colors[name]) <= 16
            for x0, y0, x1, y1, score in boxes:
                assert 0 <= x0 < x1 <= 48
                assert 0 <= y0 < y1 <= 48
                assert 0.02 < score < 1
    assert [row["filename"] for row in rows[:3]] == [
        "../images/00000/samples/0000.png", "../images/00000/samples/0001.png", "../images/00001/samples/0000.png",
    ]  # fmt: skip
    found = [len(boxes) for row in rows for boxes in json.loads(row["details"]).values()]
    assert sum(found) > 24


def test_colors_are_told_of_what_prompts_ask_about_and_of_nothing_else(
    images: Path, neural: MakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts about what the detector sees, CLIP is asked, and its answer decides."""
    judge = neural()
    picture = np.asarray(Image.open(images / "00000/samples/0000.png"))
    (found,) = judge.detector.detect([picture])
    best = max(found, key=lambda one: one.score)
    assert judge.colors is not None
    (color,) = judge.colors.classify([(picture, best)])
    right = {"tag": "colors", "include": [{"class": best.class_name, "count": 1, "color": color}], "prompt": "one"}
    other = "red" if color != "red" else "blue"
    wrong = {"tag": "colors", "include": [{"class": best.class_name, "count": 1, "color": other}], "prompt": "other"}
    plain = {"tag": "single_object", "include": [{"class": best.class_name, "count": 1}], "prompt": "plain"}
    made = make_images(tmp_path / "images", [right, wrong, plain], pictures=0)
    for number in range(3):
        shutil.copy(images / "00000/samples/0000.png", made / f"{number:05d}/samples/0000.png")
    scores = score_pictures(list_pictures(made), tmp_path / "out", judge, progress=False)
    assert scores is not None
    assert [row["correct"] for row in scores.rows] == [True, False, True]
    assert scores.rows[1]["reason"].startswith(f"expected {other} {best.class_name}>=1, found 0 {other}; and 1 {color}")
    known = [json.loads(row["colors"]) for row in scores.rows]
    assert known[0][best.class_name][0] == known[1][best.class_name][0] == color
    assert all(one is None for names in known[2].values() for one in names)
    assert all(one is None for name, names in known[0].items() for one in names[name == best.class_name :])


def test_the_published_summary_is_ours(whole: tuple[Path, Scores]) -> None:
    _, scores = whole
    rows = [{**row, "correct": number % 3 == 0} for number, row in enumerate(scores.rows)]
    from eval.geneval.statistics import summarize

    tasks, overall, prompts = published_summary(rows)
    summary = summarize(rows)
    assert {task.tag: task.per_image.value for task in summary.tasks} == pytest.approx(tasks)
    assert summary.overall.per_image.value == pytest.approx(overall)
    right = [task.per_prompt.value * task.prompts for task in summary.tasks]
    assert sum(right) / summary.overall.prompts == pytest.approx(prompts)


def test_summary_json_says_what_the_verdicts_depend_on(whole: tuple[Path, Scores], small_clip: Path) -> None:
    out, _ = whole
    document = json.loads((out / "summary.json").read_text())
    assert (document["judge"], document["prompts"], document["prompts_by_pictures"]) == ("mask2former", 12, {"2": 12})
    made_from = document["made_from"]
    assert document["judge_files"]["clip"] == f"local-dir:{small_clip}"
    assert made_from["libraries"]["torch"] == ".".join(version("torch").split(".")[:2])
    assert {"numpy", "pillow", "transformers", "open-clip-torch", "torchvision"} < made_from["libraries"].keys()
    assert made_from["scoring"]["threshold"] == 0.02
    assert made_from["scoring"]["max_objects"] == 16
    assert document["scores"]["overall"]["images"] == 24
    assert document["unreadable"] == document["prompts_without_pictures"] == []


@pytest.mark.parametrize("batch_size", [1, 5])
def test_ranks_and_batches_change_nothing(
    images: Path, neural: MakeJudge, whole: tuple[Path, Scores], tmp_path: Path, batch_size: int
) -> None:
    out = images.parent / f"shared{batch_size}"
    done = [
        score_pictures(
            list_pictures(images), out, neural(), ranks=Ranks(rank, 3), batch_size=batch_size, progress=False
        )
        for rank in (2, 0, 1)
    ]
    assert [scores is None for scores in done] == [True, True, False]
    together, alone = read_jsonl(out / "results.jsonl"), read_jsonl(whole[0] / "results.jsonl")
    for one, other in zip(together, alone, strict=True):
        assert one["filename"] == other["filename"]
        assert one["correct"] == other["correct"]
        # Products of another number of rows are summed in another order: scores may differ in their last digit.
        mine, others = json.loads(one["details"]), json.loads(other["details"])
        assert mine.keys() == others.keys()
        for name in mine:
            np.testing.assert_allclose(sorted(mine[name]), sorted(others[name]), atol=2e-4)


def test_ranks_on_hosts_with_weights_in_other_places_share_the_work(
    images: Path, neural: MakeJudge, small_detector: Path, small_clip: Path, tmp_path: Path
) -> None:
    """As with caches in other folders, a trailing slash, and files that no judge reads."""
    detector, clip = tmp_path / "cache" / "detector", tmp_path / "cache" / "clip"
    shutil.copytree(small_detector, detector)
    shutil.copytree(small_clip, clip)
    (detector / "notes.json").write_text("{}")
    there = neural(detector=f"{detector}/", clip=f"local-dir:{clip}/")
    prompts = list_pictures(images)
    assert score_pictures(prompts, tmp_path / "out", neural(), ranks=Ranks(0, 2), progress=False) is None
    scores = score_pictures(prompts, tmp_path / "out", there, ranks=Ranks(1, 2), progress=False)
    assert scores is not None
    assert len(scores.rows) == 24
    assert scores.document["judge_files"]["detector"] == f"{detector}/"
    one = neural(detector=f"{small_detector}/")
    nothing = counting(one)
    assert score_pictures(prompts, tmp_path / "out", one, progress=False) is not None
    assert nothing.pictures == 0


def test_the_shapes_judge_finds_drawn_pictures_right(drawn: Path, tmp_path: Path) -> None:
    scores = score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False)
    assert scores is not None
    assert scores.summary.overall.per_image.value == 1.0
    assert [task.images for task in scores.summary.tasks] == [6] * 6
    assert scores.remarks == []


def test_a_run_that_was_cut_off_goes_on(drawn: Path, tmp_path: Path) -> None:
    prompts, out = list_pictures(drawn), tmp_path / "out"
    cut = shapes_judge()
    first = counting(cut, stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        score_pictures(prompts, out, cut, batch_size=4, progress=False)
    assert not (out / "results.jsonl").exists()
    again = shapes_judge()
    rest = counting(again)
    assert score_pictures(prompts, out, again, batch_size=4, progress=False) is not None
    assert first.pictures == 12
    assert rest.pictures == 36 - 12
    assert len(read_jsonl(out / "results.jsonl")) == 36
    third = shapes_judge()
    nothing = counting(third)
    results = (out / "results.jsonl").stat().st_mtime_ns
    assert score_pictures(prompts, out, third, progress=False) is not None
    assert nothing.pictures == 0
    assert (out / "results.jsonl").stat().st_mtime_ns == results


def test_what_a_killed_rank_left_is_removed(drawn: Path, tmp_path: Path) -> None:
    assert score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False) is not None
    (part,) = (tmp_path / "out/parts").glob("*/00003.json")
    left = part.with_name(f".{part.name}.partial.{socket.gethostname()}.1")
    left.write_text("half of i")
    os.utime(left, (time.time() - 120,) * 2)
    assert score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False) is not None
    assert part.exists()
    assert not left.exists()


def test_changed_pictures_and_other_thresholds_are_judged_again(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = score_pictures(list_pictures(drawn), out, shapes_judge(), progress=False)
    Image.new("RGB", (64, 64), "#888888").save(drawn / "00002/samples/0001.png")
    judge = shapes_judge()
    detector = counting(judge)
    second = score_pictures(list_pictures(drawn), out, judge, progress=False)
    assert first is not None
    assert second is not None
    assert detector.pictures == 3
    changed = [n for n, (a, b) in enumerate(zip(first.rows, second.rows, strict=True)) if a != b]
    assert changed == [2 * 3 + 1]
    strict = shapes_judge(threshold=1.0)
    everything = counting(strict)
    third = score_pictures(list_pictures(drawn), out, strict, progress=False)
    assert everything.pictures == 36
    assert third is not None
    assert third.summary["single_object"].correct == 0


def test_results_of_an_earlier_call_do_not_stand_for_one_that_was_cut_off(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, prompts = tmp_path / "out", list_pictures(drawn)
    first = score_pictures(prompts, out, shapes_judge(), progress=False)
    assert first is not None
    write_summary(first, out)
    assert (
        json.loads((out / "summary.json").read_text())["results_sha256"]
        == sha256((out / "results.jsonl").read_bytes()).hexdigest()
    )
    before = {name: (out / name).read_bytes() for name in ("results.jsonl", "summary.json")}
    capsys.readouterr()
    assert score_pictures(prompts, out, shapes_judge(threshold=0.9), ranks=Ranks(0, 2), progress=False) is None
    assert not {name for name in before if (out / name).exists()}
    assert "results.jsonl, summary.json in" in capsys.readouterr().err
    assert missing_prompts(prompts, out, shapes_judge(threshold=0.9)) == 6
    # Their verdicts are kept: they are back at once, and stay as long as nothing else is asked for.
    judge = shapes_judge()
    nothing = counting(judge)
    again = score_pictures(prompts, out, judge, progress=False)
    assert again is not None
    assert (nothing.pictures, again.rows) == (0, first.rows)
    write_summary(again, out)
    assert score_pictures(prompts, out, shapes_judge(), progress=False) is not None
    assert (out / "summary.json").exists()
    # Fewer pictures, all of them judged: the summary goes before other results come.
    assert score_pictures(list_pictures(drawn)[:5], out, shapes_judge(), progress=False) is not None
    assert not (out / "summary.json").exists()
    # And a picture that is replaced while the call is cut off.
    Image.new("RGB", (64, 64)).save(drawn / "00002/samples/0001.png")
    cut = shapes_judge()
    counting(cut, stop_after=0)
    with pytest.raises(KeyboardInterrupt):
        score_pictures(list_pictures(drawn), out, cut, progress=False)
    assert not (out / "results.jsonl").exists()


def test_who_has_finished_says_how_much_is_missing(tmp_path: Path) -> None:
    assert "rank 1 of 3 has finished its share; 7 prompts have no verdicts yet" in unfinished(Ranks(1, 3), tmp_path, 7)
    with pytest.raises(ValueError, match="pictures of 2 prompts changed while they were judged; run the same command"):
        unfinished(Ranks(), tmp_path, 2)


def test_a_picture_that_cannot_be_read_is_named_and_counted(drawn: Path, tmp_path: Path) -> None:
    broken = drawn / "00001/samples/0002.png"
    broken.write_bytes(broken.read_bytes()[:200])
    out = tmp_path / "out"
    scores = score_pictures(list_pictures(drawn), out, shapes_judge(), progress=False)
    assert scores is not None
    (row,) = [row for row in scores.rows if row.get("unreadable")]
    assert row["filename"] == "../images/00001/samples/0002.png"
    assert row["correct"] is False
    assert row["reason"].startswith("picture cannot be read: undecodable picture of 200 bytes: ")
    assert scores.summary.overall.images == 36
    assert scores.document["unreadable"] == [row["filename"]]
    assert scores.remarks == ["1 pictures could not be read and count as wrong: ../images/00001/samples/0002.png"]
    shutil.copy(drawn / "00001/samples/0001.png", broken)  # and once it has been restored, it counts
    again = score_pictures(list_pictures(drawn), out, shapes_judge(), progress=False)
    assert again is not None
    assert again.summary.overall.unreadable == 0


def test_prompts_may_differ_in_pictures(drawn: Path, tmp_path: Path) -> None:
    (drawn / "00000/samples/0001.png").unlink()
    for path in (drawn / "00003/samples").iterdir():
        path.unlink()
    shutil.rmtree(drawn / "00004")
    scores = score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False)
    assert scores is not None
    assert scores.summary.overall.images == len(scores.rows) == 36 - 1 - 3 - 3
    assert scores.document["prompts_by_pictures"] == {"2": 1, "3": 9}
    assert scores.document["prompts_without_pictures"] == [3]
    assert scores.remarks == [
        "1 prompts have no pictures and are not in the scores: 3",
        "prompts differ in pictures: 1 have 2, 9 have 3",
    ]
    assert scores.document["tasks_missing"] == []
    colors = [prompt for prompt in list_pictures(drawn) if prompt.metadata["tag"] == "colors"]
    one = score_pictures(colors, tmp_path / "colors", shapes_judge(), progress=False)
    assert one is not None
    assert one.document["tasks_missing"] == ["single_object", "two_object", "counting", "position", "color_attr"]
    assert one.remarks == [
        "overall (1 of 6 tasks): the mean of what is there, without single_object, two_object, counting, position, color_attr"
    ]
    few = score_pictures(list_pictures(drawn, 1), tmp_path / "few", shapes_judge(), progress=False)
    assert few is not None
    assert [row["filename"][-8:] for row in few.rows] == ["0000.png"] * 10


def test_layouts_of_others_are_read(tmp_path: Path) -> None:
    """Prompts with other numbers, pictures of other kinds and numbers, and files that are none of them."""
    folder = tmp_path / "images" / "7" / "samples"
    folder.mkdir(parents=True)
    (folder.parent / "metadata.jsonl").write_text(json.dumps(SHAPES_PROMPTS[0], indent=2))
    image = Image.fromarray(shapes.ground_truth(SHAPES_PROMPTS[0], 0).image)
    for name in ("10.png", "2.PNG", "00001.webp"):
        image.save(folder / name)
    (folder / "notes.txt").touch()
    (folder / "a1.png").touch()
    (tmp_path / "images" / "grids").mkdir()
    (prompt,) = list_pictures(tmp_path / "images")
    assert prompt.number == 7
    assert [path.name for path in prompt.files] == ["00001.webp", "2.PNG", "10.png"]
    assert [path.name for path in prompt.ignored] == ["a1.png", "notes.txt"]


def test_files_that_do_not_count_are_named(drawn: Path, tmp_path: Path) -> None:
    for name in ("00000/samples/0003.gif", "00002/samples/image.png", "00002/samples/.hidden"):
        (drawn / name).touch()
    scores = score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False)
    assert scores is not None
    assert scores.summary.overall.images == 36
    ignored = ["../images/00000/samples/0003.gif", "../images/00002/samples/image.png"]
    assert scores.document["ignored_files"] == ignored
    assert scores.remarks == [
        "2 files under samples/ are no numbered pictures (jpg, jpeg, png, webp) and are left out: " + ", ".join(ignored)
    ]


def break_folder(folder: Path, what: str) -> None:
    metadata = folder / "00001/metadata.jsonl"
    match what:
        case "no prompts":
            shutil.rmtree(folder)
        case "no metadata":
            metadata.unlink()
        case "no JSON":
            metadata.write_text("{")
        case "no object":
            metadata.write_text("[1]")
        case "no tag":
            metadata.write_text('{"include": [], "prompt": ""}')
        case "odd tag":
            metadata.write_text('{"tag": "cows", "include": [], "prompt": ""}')
        case "odd clause":
            metadata.write_text('{"tag": "colors", "include": [{"class": "star"}], "prompt": "a star"}')
        case "other class":
            metadata.write_text(json.dumps(PROMPTS[0]))
        case "twice":
            shutil.copy(folder / "00001/samples/0001.png", folder / "00001/samples/1.png")
        case "two folders":
            shutil.copytree(folder / "00001", folder / "1")
        case "size":
            Image.new("RGB", (64, 65)).save(folder / "00001/samples/0001.png")
        case "no pictures":
            for path in folder.glob("*/samples/*"):
                path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no prompts", "images has no folders 00000, 00001 ... of prompts"),
        ("no metadata", "00001 has no metadata.jsonl and so no prompt"),
        ("no JSON", "00001/metadata.jsonl is not one JSON object"),
        ("no object", "00001/metadata.jsonl is not one JSON object"),
        ("no tag", "00001/metadata.jsonl lacks tag"),
        ("odd tag", "00001/metadata.jsonl has task 'cows'; it must be one of single_object"),
        ("odd clause", "00001/metadata.jsonl: include 1 has no count"),
        ("other class", "asks for .*, which the judge 'shapes' does not know; choose the other judge"),
        ("twice", "has picture 1 twice: 0001.png and 1.png"),
        ("two folders", "there are two folders of prompt 1"),
        ("size", "00001/samples/0001.png is 64x65; the judge 'shapes' sees only 64x64"),
        ("no pictures", "none of the 12 prompts has a picture"),
    ],
)
def test_folders_that_cannot_be_scored_are_named(drawn: Path, tmp_path: Path, what: str, message: str) -> None:
    break_folder(drawn, what)
    with pytest.raises(ValueError, match=message):
        score_pictures(list_pictures(drawn), tmp_path / "out", shapes_judge(), progress=False)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_numbers_are_checked(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images per prompt is 0"):
        list_pictures(drawn, 0)
    with pytest.raises(ValueError, match="batch size is 0"):
        score_pictures(list_pictures(drawn), tmp_path, shapes_judge(), batch_size=0)
