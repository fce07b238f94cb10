"""Which pictures are in a folder, whose prompts, and reading them ahead: order, damage, and how far ahead."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.pictures import PictureSet, list_pictures, read_ahead, read_prompt_file


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def published(folder: Path, numbers: list[int]) -> Path:
    """GenEval's layout, with so many pictures of each prompt."""
    for index, number in enumerate(numbers):
        (folder / f"{index:05d}/samples").mkdir(parents=True)
        for n in range(number):
            picture(folder / f"{index:05d}/samples/{n:04d}.png")
        picture(folder / f"{index:05d}/grid.png")
        (folder / f"{index:05d}/metadata.jsonl").write_text(
            json.dumps({"tag": "x", "prompt": f"prompt {index}"}) + "\n"
        )
    return folder


def test_the_published_layout_has_samples_and_no_grids(tmp_path: Path) -> None:
    found = list_pictures(published(tmp_path, [2, 1]))
    assert found.names == ("00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png")
    assert found.prompts == ("prompt 0", "prompt 1")
    assert found.prompt_of == (0, 0, 1)
    assert found.paths[2] == tmp_path / "00001/samples/0000.png"
    assert list_pictures(tmp_path, images_per_prompt=1).prompt_of == (0, 1)
    assert list_pictures(tmp_path, captions=False) == PictureSet(tmp_path, found.names)


def test_what_is_missing_in_a_layout_and_what_lies_beside_it_is_said(tmp_path: Path) -> None:
    published(tmp_path, [2, 1, 0])
    picture(tmp_path / "extra/9.png")
    picture(tmp_path / "00001/samples/best.png")
    (tmp_path / "00001/samples/0001.gif").touch()
    found = list_pictures(tmp_path)
    assert found.prompts == ("prompt 0", "prompt 1")
    assert found.prompt_of == (0, 0, 1)
    assert found.remarks == (
        f"1 prompts in {tmp_path} have no pictures and are left out: 00002",
        f"prompts in {tmp_path} differ in pictures: 1 have 1, 1 have 2",
        f"3 files in {tmp_path} are no numbered pictures of a prompt and are left out: 00001/samples/0001.gif, "
        "00001/samples/best.png, extra/9.png",
    )
    assert len(list_pictures(tmp_path, images_per_prompt=1).remarks) == 2
    assert list_pictures(tmp_path, captions=False).remarks == (found.remarks[0], found.remarks[2])
    (tmp_path / "00002/metadata.jsonl").write_text("{")
    assert list_pictures(tmp_path, captions=False).names == found.names


def test_a_layout_that_says_too_little_is_refused(tmp_path: Path) -> None:
    published(tmp_path, [1, 1])
    with pytest.raises(ValueError, match=r"leave the prompts out"):
        list_pictures(tmp_path, ["a"])
    (tmp_path / "00001/metadata.jsonl").write_text('{"tag": "x"}')
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl names no prompt"):
        list_pictures(tmp_path)
    for path in tmp_path.glob("*/samples/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"none of the 2 prompts in .* has a picture; generate some first"):
        list_pictures(tmp_path)


def test_captions_beside_pictures(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "sub/c.webp"):
        (picture(tmp_path / name).with_suffix(".txt")).write_text(f"caption of {name}\n")
    (tmp_path / "readme.txt").write_text("no caption")
    found = list_pictures(tmp_path)
    assert found.names == ("a.png", "b.jpg", "sub/c.webp")
    assert found.prompts == tuple(f"caption of {name}" for name in found.names)
    assert found.prompt_of == (0, 1, 2)
    assert list_pictures(tmp_path, captions=False).prompts == ()
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b.txt is empty"):
        list_pictures(tmp_path)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 pictures in .* have no .txt caption, such as b.jpg"):
        list_pictures(tmp_path)


def test_prompts_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("x2", "x10", "x1", "x3"):
        picture(tmp_path / "words" / f"{name}.png")
    found = list_pictures(tmp_path / "words", ["one", "two"], images_per_prompt=2)
    assert found.names == ("x1.png", "x10.png", "x2.png", "x3.png")
    assert found.prompt_of == (0, 0, 1, 1)
    with pytest.raises(ValueError, match=r"holds 4 pictures, and 3 prompts with 1 each make 3"):
        list_pictures(tmp_path / "words", ["a", "b", "c"])


def test_names_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / f"{number}.png")
    found = list_pictures(tmp_path, [f"prompt {number}" for number in range(12)])
    assert found.names == tuple(f"{number}.png" for number in range(12))


def test_folders_without_pictures_or_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        list_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no pictures"):
        list_pictures(tmp_path)
    picture(tmp_path / "a.png")
    assert list_pictures(tmp_path) == PictureSet(tmp_path, ("a.png",))
    with pytest.raises(ValueError, match=r"images per prompt is 2, and .* has no prompts"):
        list_pictures(tmp_path, images_per_prompt=2)
    with pytest.raises(ValueError, match="images per prompt is 0"):
        list_pictures(tmp_path, images_per_prompt=0)


def test_prompt_files(tmp_path: Path) -> None:
    expected = ["a cow", 'two "cats", asleep', "ein Schaf: grün"]
    (tmp_path / "p.txt").write_text("\ufeffa cow\r\n" + "\n".join(expected[1:]) + "\n\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"tag": 1, "prompt": one}) + "\n" for one in expected))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"caption": one}) + "\n" for one in expected))
    (tmp_path / "p.csv").write_text(
        'n,caption\n1,a cow\n2,"two ""cats"", asleep"\n3,ein Schaf: grün\n', encoding="utf-8"
    )
    (tmp_path / "p.tsv").write_text("Prompt\tn\n" + "".join(f"{one}\t1\n" for one in ["a cow", "b"]), encoding="utf-8")
    for name in ("p.txt", "p.jsonl", "c.jsonl", "p.csv"):
        assert read_prompt_file(tmp_path / name) == expected, name
    assert read_prompt_file(tmp_path / "p.tsv", "Prompt") == ["a cow", "b"]


@pytest.mark.parametrize(
    ("name", "text", "field", "message"),
    [
        ("p.txt", "a\n\nb\n", None, r"p.txt line 2 holds no prompt"),
        ("p.txt", "\n", None, r"p.txt line 1 holds no prompt"),
        ("p.txt", "a\n", "prompt", r"p.txt has lines and no fields"),
        ("p.csv", "text,n\na,1\n", None, r"has no field 'caption': choose among text, n"),
        ("p.csv", "prompt,n\na,1\n", "words", r"has no field 'words': choose among prompt, n"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', None, r"row 2 holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', None, r"row 2 holds no prompt \(3\)"),
        ("p.pdf", "a", None, r"is no file of prompts; give a .txt"),
    ],
)
def test_files_that_are_no_prompts_are_refused(
    name: str, text: str, field: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompt_file(tmp_path / name, field)
    with pytest.raises(ValueError, match="is no file of prompts"):
        read_prompt_file(tmp_path / "none.txt")


def test_pictures_come_in_order_with_the_reason_for_those_that_do_not(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png", value=n) for n in range(40)]
    paths[7].write_bytes(paths[7].read_bytes()[:45])
    paths[20].unlink()
    found = list(read_ahead(paths, lambda image: int(np.asarray(image)[0, 0, 0]), ahead=5))
    assert [one.number for one in found] == list(range(40))
    assert [one.value for one in found] == [None if n in (7, 20) else n for n in range(40)]
    assert "undecodable picture of 45 bytes" in found[7].problem
    assert found[20].problem == "No such file or directory"


def test_no_more_is_read_ahead_than_asked(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{n}.png") for n in range(60)]
    prepared: list[int] = []
    lock = threading.Lock()

    def prepare(image: Image.Image) -> int:
        with lock:
            prepared.append(1)
        return 0

    stream = read_ahead(paths, prepare, ahead=5)
    for _ in range(3):
        next(stream)
    stream.close()
    assert 3 <= len(prepared) <= 3 + 5


def test_a_fault_of_the_preparation_is_no_unreadable_picture(tmp_path: Path) -> None:
    def fail(image: Image.Image) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(read_ahead([picture(tmp_path / "a.png")], fail))
