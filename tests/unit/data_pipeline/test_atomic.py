import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.atomic import remove_leftovers, replacing, write_bytes


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


def long_ago(path: Path) -> None:
    """As if nobody had written to the file for two minutes."""
    os.utime(path, (time.time() - 120,) * 2)


def test_a_file_that_has_just_been_opened_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    """Its writer, another rank, may be about to lock it."""
    opened = tmp_path / f".a.tar.partial.{socket.gethostname()}.1"
    opened.touch()
    remove_leftovers(tmp_path)
    assert opened.exists()
    long_ago(opened)
    remove_leftovers(tmp_path)
    assert not opened.exists()


def test_leftovers_of_this_host_are_removed_unless_somebody_still_writes_them(tmp_path: Path) -> None:
    writing = "import sys; from pathlib import Path; from data_pipeline.atomic import replacing\n"
    writing += "with replacing(Path(sys.argv[1])) as stream: print(flush=True); input()"
    path = tmp_path / "folder" / "a.tar"
    with subprocess.Popen(
        [sys.executable, "-c", writing, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        partial = path.with_name(f".a.tar.partial.{socket.gethostname()}.{writer.pid}")
        elsewhere = tmp_path / f".a.tar.partial.elsewhere.{writer.pid}"
        elsewhere.write_bytes(b"half of it")
        long_ago(partial)
        remove_leftovers(tmp_path)
        assert partial.exists()
        writer.kill()
        writer.wait()
        assert partial.exists()
    remove_leftovers(tmp_path)
    assert not partial.exists()
    assert elsewhere.exists()
