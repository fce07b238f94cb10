from pathlib import Path

import pytest

from data_pipeline.atomic import replacing, write_bytes


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def interrupted() -> None:
        with replacing(path) as stream:
            stream.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    write_bytes(path, b"old")
    with replacing(path, exclusive=True) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_an_exclusive_writer_replaces_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".a.tar.partial").write_bytes(b"left over by a killed process")
    with replacing(tmp_path / "a.tar", exclusive=True) as stream:
        stream.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
