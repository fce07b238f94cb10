import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from t2i.rank_log import LAST_LINES, LINE_LENGTH, RankLog, Tee, place, write_stacks


@pytest.fixture
def log(tmp_path: Path) -> RankLog:
    return RankLog(tmp_path / "logs" / "rank-00000.log")


def written(log: RankLog) -> list[str]:
    """Without the title, which has the time."""
    return log.path.read_text().splitlines()[1:]


def test_prints_go_through_and_into_the_log(log: RankLog, capsys: pytest.CaptureFixture[str]) -> None:
    with log:
        print("before there is a file")
        print("to standard error", file=sys.stderr)
        assert not log.path.parent.exists()
        log.open("rank 0 of 1")
        print("after", "it")
    print("when it is over")
    assert log.path.read_text().splitlines()[0].endswith(" rank 0 of 1")
    assert written(log) == ["before there is a file", "to standard error", "after it"]
    assert log.last == ("before there is a file", "to standard error", "after it")
    out, err = capsys.readouterr()
    assert out == "before there is a file\nafter it\nwhen it is over\n"
    assert err == "to standard error\n"


def test_a_process_goes_on_in_the_log_of_the_one_before(log: RankLog) -> None:
    for number in range(2):
        again = RankLog(log.path)
        again.line(f"attempt {number}")
        again.open("rank 0 of 1")
    assert [line for line in log.path.read_text().splitlines() if "---" not in line] == ["attempt 0", "attempt 1"]


@given(st.lists(st.lists(st.sampled_from("ab\n"), max_size=6).map("".join)))
def test_lines_are_whole_however_they_are_written(parts: list[str]) -> None:
    log = RankLog(Path("unused"))
    stream = io.StringIO()
    tee = Tee(stream, log)
    for part in parts:
        assert tee.write(part) == len(part)
    assert stream.getvalue() == "".join(parts)
    whole = [line for line in "".join(parts).split("\n")[:-1] if line]
    assert log.last == tuple(whole[-LAST_LINES:])


def test_of_a_progress_bar_the_last_state_is_kept_and_lines_between_are_whole(log: RankLog) -> None:
    stream = io.StringIO()
    with log:
        tee = Tee(stream, log)
        with tqdm(total=3, file=tee, mininterval=0, desc="run") as bar:
            for step in range(3):
                bar.update()
                if step == 1:
                    tqdm.write("a word", file=tee)
    assert stream.getvalue().count("\r") > 3
    assert [line for line in log.last if "%" not in line] == ["a word"]
    assert log.last[-1].startswith("run: 100%")
    assert not any("\r" in line for line in log.last)
    assert len(tee._partial) < 200


def test_last_lines_are_few_and_short(log: RankLog) -> None:
    for number in range(100):
        log.line(f"{number} " + "x" * 1000)
    assert [int(line.split()[0]) for line in log.last] == list(range(100 - LAST_LINES, 100))
    assert {len(line) for line in log.last} == {LINE_LENGTH}


def test_a_disk_that_is_full_ends_the_log_and_not_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    log = RankLog(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        log.open("rank 0 of 1")
    log.line("one")
    log.line("two")
    assert log.last == ("one", "two")
    assert capfd.readouterr().err.count("/dev/full cannot be written to any more") == 1


def test_a_place_in_this_project_is_told_with_what_it_waits_for() -> None:
    found: list[tuple[str, bool]] = []
    done = threading.Event()

    def look() -> None:
        while not found or "threading.py" not in found[-1][0]:
            found.append(place())
        done.set()

    threading.Thread(target=look).start()
    assert done.wait(10)
    where, waits = found[-1]
    assert where.startswith("python3.11/threading.py:") or "/threading.py:" in where
    assert where.endswith("(wait)")
    assert not waits


def test_inside_torch_a_rank_may_wait_for_others(tmp_path: Path) -> None:
    """The main thread is inside a function of a package of that name, and then of another one."""
    for name in ("torch", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("def wait(lock):\n    lock.acquire()\n")
    code = """
import elsewhere, threading, time, torch
from t2i.rank_log import place

def look():
    while "__init__.py:2 (wait)" not in place()[0]:
        time.sleep(0.001)
    print(*place())
    lock.release()

for package in (torch, elsewhere):
    lock = threading.Lock()
    lock.acquire()
    threading.Thread(target=look).start()
    package.wait(lock)
"""
    paths = f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.stdout.splitlines() == ["torch/__init__.py:2 (wait) True", "elsewhere/__init__.py:2 (wait) False"]


def test_stacks_of_all_threads_are_added(tmp_path: Path) -> None:
    begun, end = threading.Event(), threading.Event()

    def somewhere_else() -> None:
        begun.set()
        end.wait()

    thread = threading.Thread(target=somewhere_else)
    thread.start()
    begun.wait()
    for number in range(2):
        write_stacks(tmp_path / "logs" / "rank-00000.stacks", f"attempt {number}")
    end.set()
    thread.join()
    text = (tmp_path / "logs" / "rank-00000.stacks").read_text()
    assert text.count("in somewhere_else") == text.count("in test_stacks_of_all_threads_are_added") == 2
    assert [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("---")] == ["0", "1"]
