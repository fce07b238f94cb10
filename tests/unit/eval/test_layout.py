"""The published layout as all commands read it: numbers, their order, and what does not count."""

import json
from pathlib import Path

import pytest
from PIL import Image

from eval import pictures
from eval.geneval import score
from eval.layout import is_layout, prompt_folders, read_metadata, samples_of, some

METADATA = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}


def prompt_folder(folder: Path, *samples: str, metadata: dict[str, object] = METADATA) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "metadata.jsonl").write_text(json.dumps(metadata))
    for name in samples:
        Image.new("RGB", (4, 4)).save(folder / "samples" / name, "PNG")
    return folder


def test_both_commands_take_the_same_first_pictures(tmp_path: Path) -> None:
    """In the order of numbers, of folders and of pictures, whatever the names look like as text."""
    prompt_folder(tmp_path / "10", "0.png", metadata={**METADATA, "prompt": "ten"})
    prompt_folder(
        tmp_path / "9", "10.png", "9.PNG", "00008.webp", "a.png", "b.jpg", metadata={**METADATA, "prompt": "nine"}
    )
    for number, expected in ((None, ["00008.webp", "9.PNG", "10.png", "0.png"]), (2, ["00008.webp", "9.PNG", "0.png"])):
        measured = pictures.list_pictures(tmp_path, images_per_prompt=number)
        judged = [path for prompt in score.list_pictures(tmp_path, number) for path in prompt.files]
        assert [path.name for path in judged] == expected
        assert measured.paths == judged
        assert measured.prompts == ("nine", "ten")
        assert measured.prompt_of == (0,) * (len(expected) - 1) + (1,)


def test_what_does_not_count_is_told_apart(tmp_path: Path) -> None:
    folder = prompt_folder(tmp_path / "7", "1.png", "0002.gif", "image.png", "3.bmp", "0.jpeg")
    (folder / "samples/4.png").mkdir()
    (folder / "samples/.1.png.partial").touch()
    found = samples_of(folder)
    assert [path.name for path in found.files] == ["0.jpeg", "1.png"]
    assert [path.name for path in found.ignored] == ["0002.gif", "3.bmp", "4.png", "image.png"]
    prompt_folder(tmp_path / "07")
    (tmp_path / "8").touch()
    with pytest.raises(ValueError, match=r"two folders of prompt 7, 07 and 7 in .*; remove one"):
        prompt_folders(tmp_path)
    Image.new("RGB", (4, 4)).save(folder / "samples/01.png")
    with pytest.raises(ValueError, match=r"7/samples has picture 1 twice: 01.png and 1.png; remove one"):
        samples_of(folder)


def test_a_folder_of_pictures_with_numbers_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert not is_layout(tmp_path)
    (tmp_path / "0/metadata.jsonl").write_text("{}")  # as of any data set
    assert not is_layout(tmp_path)
    prompt_folder(tmp_path / "0 (copy)", "0.png")
    assert not is_layout(tmp_path)
    assert pictures.list_pictures(tmp_path).names == ("0 (copy)/samples/0.png",)
    (tmp_path / "0/samples").mkdir()
    assert is_layout(tmp_path)


def test_metadata_are_one_object(tmp_path: Path) -> None:
    folder = prompt_folder(tmp_path / "0")
    assert read_metadata(folder) == METADATA
    for content in (b"[1]", b"{", b"{}\n{}", b"\xff"):
        (folder / "metadata.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"0/metadata.jsonl is not one JSON object"):
            read_metadata(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"0 has no metadata.jsonl and so no prompt"):
        read_metadata(folder)


def test_few_names_stand_for_many() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(range(7), 5, " (there)") == "0, 1, 2, 3, 4 and 2 more (there)"
