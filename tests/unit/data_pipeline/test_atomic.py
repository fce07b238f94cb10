import os
import socket
import subprocess
import sys
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


def test_a_later_writer_removes_what_a_killed_one_of_this_host_left_and_nothing_else(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    killed.kill()
    killed.wait()
    host = socket.gethostname()
    gone = tmp_path / f".a.tar.partial.{host}.{killed.pid}"
    kept = [
        tmp_path / name
        for name in (
            f".a.tar.partial.{host}.{os.getppid()}",  # still writing
            f".a.tar.partial.elsewhere.{killed.pid}",
            f".b.tar.partial.{host}.{killed.pid}",
        )
    ]
    for path in (gone, *kept):
        path.write_bytes(b"half of it")
    write_bytes(tmp_path / "a.tar", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.tar", *kept])
