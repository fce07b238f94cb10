"""The published prompts byte for byte, and the shapes prompts' form."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from data_pipeline import shapes
from data_pipeline.geneval_text import prompt_for
from eval.geneval.prompts import (
    COCO_CLASSES,
    check_metadata,
    coco_prompts,
    read_prompts,
    shapes_prompts,
    write_prompts,
)

PUBLISHED = {
    "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    "generation_prompts.txt": "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
}


def test_published_files_are_regenerated_byte_for_byte(tmp_path: Path) -> None:
    write_prompts(coco_prompts(), tmp_path)
    written = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in PUBLISHED}
    assert written == PUBLISHED
    assert len(read_prompts(tmp_path)) == 553


def test_folder_and_file_read_the_same(tmp_path: Path) -> None:
    entries = shapes_prompts(per_task=3)
    write_prompts(entries, tmp_path)
    assert read_prompts(tmp_path) == read_prompts(tmp_path / "evaluation_metadata.jsonl") == entries


@pytest.mark.parametrize("seed", [0, 43])
def test_no_duplicates_and_no_coloured_person(seed: int) -> None:
    entries = coco_prompts(per_task=300, seed=seed)
    assert len({json.dumps(entry) for entry in entries}) == len(entries)
    colored = {clause["class"] for entry in entries for clause in entry["include"] if "color" in clause}
    assert "person" not in colored
    assert colored <= set(COCO_CLASSES)


def test_shapes_prompts_read_like_geneval() -> None:
    for entry in shapes_prompts(per_task=20):
        assert entry["prompt"] == prompt_for(entry["tag"], entry["include"])
        assert {clause["class"] for clause in entry["include"]} <= set(shapes.SHAPES)


@pytest.mark.parametrize("make", [coco_prompts, shapes_prompts])
def test_at_least_one_prompt_per_task(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="prompts per task is 0"):
        make(per_task=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no prompts"), ('{"tag": "colors"}\n', "line 1 lacks include, prompt"), ("[1]\n", "JSON object")],
)
def test_files_that_are_no_prompts_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    good = {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a\u2028photo"}
    bad = {**good, "include": [{"class": "cow", "count": "1"}]}
    file.write_text(f"\n{json.dumps(good, ensure_ascii=False)}\r\n\n{json.dumps(bad)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.jsonl line 4: include 1 has count '1'"):
        read_prompts(file)
    file.write_bytes(json.dumps(good).encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"own\.jsonl is not UTF-8 text"):
        read_prompts(file)


COW = {"class": "cow", "count": 1}


@pytest.mark.parametrize("make", [coco_prompts, shapes_prompts])
def test_our_own_metadata_are_good(make) -> None:  # type: ignore[no-untyped-def]
    for entry in make(per_task=20):
        check_metadata(entry, "here")
    check_metadata({"tag": "counting", "include": [COW], "exclude": [], "prompt": "a photo"}, "here")
    others = [COW, COW, {**COW, "position": ["above", 1]}]  # nothing says that there are only two
    check_metadata({"tag": "position", "include": others, "prompt": "a photo", "more": 1}, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": ["colors"]}, "here has task ['colors']; it must be one of single_object, "),
        ({"prompt": 3}, "here has prompt 3; it must be the sentence"),
        ({"prompt": " "}, "here has prompt ' '; it must be the sentence"),
        ({"include": None}, "here has include None; it must be a list of the objects asked for, at least one"),
        ({"include": []}, "here has include []; it must be a list of the objects asked for, at least one"),
        ({"include": {"class": "cow", "count": 1}}, "here has include {'class': 'cow', 'count': 1}; it must be a list"),
        ({"include": [COW, "cow"]}, "here: include 2 is 'cow'; it must be an object with class and count"),
        ({"include": [{"count": 1}]}, "here: include 1 has no class; give the name of what is asked for"),
        ({"include": [{"class": "cow"}]}, "here: include 1 has no count; give a whole number of at least 1"),
        ({"include": [{"class": ["cow"], "count": 1}]}, "include 1 has class ['cow']; it must be a name"),
        ({"include": [{"class": "", "count": 1}]}, "include 1 has class ''; it must be a name"),
        *(
            ({"include": [{"class": "cow", "count": count}]}, f"include 1 has count {count!r}; it must be a whole number")
            for count in ("1", 1.0, None, True, 0, -1)
        ),
        ({"include": [{**COW, "color": "grey"}]}, "include 1 has color 'grey'; it must be one of red, orange, "),
        ({"include": [{**COW, "color": None}]}, "include 1 has color None; it must be one of red, orange, "),
        ({"include": [{**COW, "color": ["red"]}]}, "include 1 has color ['red']; it must be one of"),
        *(
            ({"include": [COW, {**COW, "position": position}]}, f"include 2 has position {position!r}; it must be [")
            for position in (
                "left of", None, [], ["left of"], ["left", 0], ["left of", 1], ["left of", 5], ["left of", -1],
                ["left of", "0"], ["left of", False], [["left of"], 0], ["left of", 0, 0],
            )
        ),
        ({"include": [{**COW, "position": ["left of", 0]}]}, "include 1 has position ['left of', 0]; it must be [RELATION, N]"),
        ({"exclude": None}, "here has exclude None; it must be a list, or left out"),
        ({"exclude": COW}, "here has exclude {'class': 'cow', 'count': 1}; it must be a list, or left out"),
        ({"exclude": [{"class": "cow", "count": 0}]}, "here: exclude 1 has count 0; it must be a whole number"),
        ({"exclude": [{**COW, "color": "red"}]}, "here: exclude 1 has a color, which is not judged there; delete it"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_judged_are_named(change: dict[str, object], message: str) -> None:
    good = {"tag": "colors", "include": [COW], "prompt": "a photo of a cow"}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_metadata({**good, **change}, "here")
    assert "\n" not in str(caught.value)
