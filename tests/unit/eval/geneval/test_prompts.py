"""The published prompts byte for byte, and the shapes prompts' form."""

import hashlib
import json
from pathlib import Path

import pytest

from data_pipeline import shapes
from data_pipeline.geneval_text import prompt_for
from eval.geneval.prompts import (
    COCO_CLASSES,
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
    [("", "holds no prompts"), ('{"tag": "colors"}\n', "entry 1 lacks include, prompt"), ("[1]\n", "JSON object")],
)
def test_files_that_are_no_prompts_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path)
