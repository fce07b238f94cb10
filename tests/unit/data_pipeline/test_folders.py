import os
from pathlib import Path

import pytest

from data_pipeline.folders import files_under


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two files, beside another one with one file."""
    for name in ("root/b.txt", "root/a/c.txt", "elsewhere/deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "root"


def test_files_of_real_and_linked_folders_in_order(root: Path) -> None:
    assert files_under(root) == (["a/c.txt", "b.txt"], [])
    (root / "link").symlink_to(root.parent / "elsewhere")
    assert files_under(root) == (["a/c.txt", "b.txt", "link/deep/d.txt"], [])
    assert files_under(root / "link") == (["deep/d.txt"], []), "the root itself may be a link"


def test_a_real_folder_is_read_once_under_its_own_name(root: Path) -> None:
    (root / "0").symlink_to(root / "a")
    (root / "x").symlink_to(root.parent / "elsewhere" / "deep")
    (root / "y").symlink_to(root.parent / "elsewhere")
    (root / "z").symlink_to(root.parent / "elsewhere")
    assert files_under(root) == (["a/c.txt", "b.txt", "x/d.txt"], ["0", "z"])


def test_links_that_lead_back_end(root: Path) -> None:
    (root / "a" / "self").symlink_to(root / "a")
    (root / "top").symlink_to(root.parent)
    (root / "link").symlink_to(root.parent / "elsewhere")
    (root.parent / "elsewhere" / "back").symlink_to(root)
    assert files_under(root) == (["a/c.txt", "b.txt", "link/deep/d.txt"], ["a/self", "link/back", "top"])


def test_links_to_files_and_to_nothing_are_files(root: Path) -> None:
    (root / "file").symlink_to(root / "b.txt")
    (root / "gone").symlink_to(root / "nowhere")
    assert files_under(root)[0] == ["a/c.txt", "b.txt", "file", "gone"]


def test_folders_can_be_left_out(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "elsewhere")
    assert files_under(root, lambda folder: folder.name in ("a", "link")) == (["b.txt"], [])


def test_folders_that_cannot_be_listed_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path) in refused:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = {root / "a"}
    assert files_under(root) == (["b.txt"], ["a"])
    refused = {root}
    with pytest.raises(PermissionError):
        files_under(root)


def test_a_relative_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert files_under(Path()) == files_under(root)
