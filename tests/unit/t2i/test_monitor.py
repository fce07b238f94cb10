"""Small jobs of real processes that come to an end in different ways; they only sleep, and so run side by side."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i.monitor import is_echo

ROOT = Path(__file__).parents[3]
LIMIT = 60

RANK = """
import os, signal, socket, sys, threading, time
from pathlib import Path
from t2i.monitor import Monitor

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def share(make):
    path = folder / "address"
    if rank == 0:
        data = make()
        (folder / "partial").write_bytes(data)
        (folder / "partial").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_bytes()

def others_have_begun():
    (folder / f"begun-{rank}").touch()
    while len(list(folder.glob("begun-*"))) < ranks:
        time.sleep(0.01)
    time.sleep(0.1)

def reading_for_ever():
    time.sleep(1000)

with Monitor(rank, ranks, local_rank=rank, folder=folder / "logs", watchdog=float(sys.argv[4]), share=share) as monitor:
    print("a line of rank", rank, file=sys.stderr)
    monitor.open_log()
    monitor.progress.step(7)
    others_have_begun()
    {body}
print("well done")
"""

JOBS = {
    "end": (3, 0.0, "if rank == 1: time.sleep(1.5)"),
    "killed": (3, 0.0, "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(1000)"),
    "first killed": (3, 0.0, "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(1000)"),
    "first two killed": (3, 0.0, "if rank < 2: os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(1000)"),
    "echo": (
        3, 0.0,
        "if rank == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4')",
    ),
    "raises": (3, 0.0, "if rank == 1: raise OSError('disk is full')\n    time.sleep(1000)"),
    "first raises": (2, 0.0, "if rank == 0: raise OSError('disk is full')\n    time.sleep(1000)"),
    "all raise": (3, 0.0, "time.sleep(rank / 5)\n    raise ValueError('global batch 8 is not divisible')"),
    "interrupted": (2, 0.0, "if rank == 1: raise KeyboardInterrupt\n    time.sleep(1000)"),
    "hangs": (3, 1.0, "reading_for_ever() if rank == 1 else threading.Event().wait()"),
    "stopped": (2, 1.0, "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(1000)"),
    "alone": (1, 1.0, "reading_for_ever()"),
    "slow end": (2, 0.0, "if rank == 0: time.sleep(1)"),
    "no way out": (
        2, 0.0, "if rank == 0: threading.Thread(target=time.sleep, args=(1000,)).start(); raise OSError('disk is full')\n"
        "    time.sleep(1000)",
    ),
}  # fmt: skip
"""Ranks, watchdog and what each does once all have begun."""


class Job:
    """Output and exit codes of the ranks of a job, once it has ended."""

    def __init__(self, folder: Path, ranks: int, watchdog: float, body: str) -> None:
        self.folder = folder
        folder.mkdir()
        self._errors = [open(folder / f"error-{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK.replace("{body}", body), str(rank), str(ranks), str(folder), str(watchdog)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost"}, stderr=error,
                stdout=subprocess.DEVNULL,
            )
            for rank, error in enumerate(self._errors)
        ]  # fmt: skip

    def codes(self) -> list[int]:
        return [process.wait(LIMIT) for process in self._processes]

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def errors(self, rank: int) -> str:
        text = (self.folder / f"error-{rank}").read_text()
        return text.removeprefix(f"a line of rank {rank}\n").strip()

    def name(self, rank: int) -> str:
        return f"rank {rank} on {socket.gethostname()}, pid {self.pid(rank)}"

    def kill(self) -> None:
        for process, error in zip(self._processes, self._errors, strict=True):
            process.kill()
            process.wait()
            error.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    folder = tmp_path_factory.mktemp("jobs")
    found: dict[str, Job] = {}
    try:
        for name, (ranks, watchdog, body) in JOBS.items():
            found[name] = Job(folder / name, ranks, watchdog, body)
        yield found
    finally:
        for job in found.values():
            job.kill()


@pytest.mark.parametrize("name", ["end", "slow end"])
def test_ranks_that_end_well_say_nothing(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    codes = job.codes()
    assert codes == [0] * len(codes)
    assert [job.errors(rank) for rank in range(len(codes))] == [""] * len(codes)


def test_a_killed_rank_ends_all_with_its_name_step_and_last_lines(jobs: dict[str, Job]) -> None:
    job = jobs["killed"]
    assert job.codes() == [86, -signal.SIGKILL, 86]
    expected = [f"{job.name(1)} died after step 7 without a word", "last lines of rank 1:", "    a line of rank 1"]
    assert job.errors(0).splitlines() == [f"error: {expected[0]}", *expected[1:]]
    # One rank of a host speaks; in the logs of the others it is as well.
    assert job.errors(2) == ""
    for rank in (0, 2):
        log = (job.folder / "logs" / f"rank-{rank:05d}.log").read_text().splitlines()
        assert re.fullmatch(rf"--- [-\d]+ [:\d]+ rank {rank} of 3 on \S+, pid {job.pid(rank)}", log[0])
        assert log[1:] == [f"a line of rank {rank}", *expected]


def test_without_rank_0_the_others_find_out_by_themselves(jobs: dict[str, Job]) -> None:
    job = jobs["first killed"]
    assert job.codes() == [-signal.SIGKILL, 86, 86]
    assert job.errors(1).startswith(f"error: {job.name(0)} died after step 7 without a word")
    assert "    a line of rank 0" in job.errors(1)
    assert job.errors(2) == ""
    job = jobs["first two killed"]
    assert job.codes() == [-signal.SIGKILL, -signal.SIGKILL, 86]
    log = (job.folder / "logs" / "rank-00002.log").read_text()
    assert f"{job.name(0)} died after step 7 without a word" in log


def test_a_rank_whose_collective_broke_names_the_one_that_was_killed(jobs: dict[str, Job]) -> None:
    job = jobs["echo"]
    assert job.codes() == [86, -signal.SIGKILL, 86]
    assert job.errors(0).startswith(f"error: {job.name(1)} died after step 7 without a word")
    assert "gloo" not in job.errors(0) + job.errors(2)
    assert "Connection closed by peer" in (job.folder / "logs" / "rank-00002.log").read_text()


@pytest.mark.parametrize(("name", "culprit", "well"), [("raises", 1, [0, 2]), ("first raises", 0, [1])])
def test_a_rank_that_raises_ends_as_it_would_alone_and_the_others_name_it(
    jobs: dict[str, Job], name: str, culprit: int, well: list[int]
) -> None:
    job = jobs[name]
    assert [code for rank, code in enumerate(job.codes()) if rank in well] == [86] * len(well)
    assert job.codes()[culprit] == 1
    assert job.errors(culprit).startswith("Traceback")
    assert job.errors(culprit).endswith("OSError: disk is full")
    assert job.errors(well[0]).startswith(f"error: {job.name(culprit)} failed after step 7: OSError: disk is full")
    assert "    OSError: disk is full" in job.errors(well[0])


def test_a_mistake_that_all_make_is_told_by_each(jobs: dict[str, Job]) -> None:
    job = jobs["all raise"]
    assert job.codes() == [1, 1, 1]
    for rank in range(3):
        assert job.errors(rank).endswith("ValueError: global batch 8 is not divisible")
        assert "error: rank" not in job.errors(rank)


def test_an_interrupted_rank_is_named(jobs: dict[str, Job]) -> None:
    job = jobs["interrupted"]
    assert job.codes()[0] == 86
    assert job.codes()[1] in (1, 130, -signal.SIGINT)
    assert "failed after step 7: KeyboardInterrupt" in job.errors(0)


def test_a_rank_that_hangs_ends_all_with_the_stacks_of_every_rank(jobs: dict[str, Job]) -> None:
    job = jobs["hangs"]
    assert job.codes() == [87, 87, 87]
    assert re.match(r"error: no step done for \d+ s, after step 7: ", job.errors(0))
    assert f"{job.folder}/logs/rank-*.stacks" in job.errors(0)
    assert job.errors(1) == job.errors(2) == ""
    for rank in range(3):
        stacks = (job.folder / "logs" / f"rank-{rank:05d}.stacks").read_text()
        assert f"{job.name(rank)} after step 7" in stacks
        assert ("in reading_for_ever" in stacks) == (rank == 1)
        assert "most recent call first" in stacks


def test_a_stopped_rank_is_named_and_does_not_outlive_the_others(jobs: dict[str, Job]) -> None:
    job = jobs["stopped"]
    assert job.codes() == [87, -signal.SIGKILL]
    assert f"nothing heard of {job.name(1)} either, which cannot write its stacks" in job.errors(0)
    assert [path.name for path in (job.folder / "logs").glob("*.stacks")] == ["rank-00000.stacks"]


def test_one_process_alone_has_a_watchdog_too(jobs: dict[str, Job]) -> None:
    job = jobs["alone"]
    assert job.codes() == [87]
    assert re.search(rf"{job.name(0)} is at \S+:\d+ \(reading_for_ever\)", job.errors(0))


def test_a_rank_that_cannot_end_by_itself_is_ended(jobs: dict[str, Job]) -> None:
    """Its own error is out, and a thread of a library keeps the process."""
    job = jobs["no way out"]
    assert job.codes() == [86, 86]
    assert job.errors(0).endswith("OSError: disk is full")


def test_strangers_are_turned_away(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", 2, 0.0, "time.sleep(1000)")
    try:
        limit = time.monotonic() + LIMIT
        while len(list(job.folder.glob("begun-*"))) < 2:
            assert time.monotonic() < limit
            time.sleep(0.05)
        port = int(re.findall(rb'"port": (\d+)', (job.folder / "address").read_bytes())[0])
        for hello in (b"GET / HTTP/1.1\r\n", b'{"secret": "x", "rank": 1}\n', b"[]\n", b"\xff\n"):
            with socket.create_connection(("localhost", port), timeout=LIMIT) as stranger:
                stranger.sendall(hello + b'{"beat": {}}\n')
                with_end = b"".join(iter(lambda stranger=stranger: _received(stranger), b""))
                assert with_end == b""
        os.kill(job.pid(1), signal.SIGKILL)
        assert job.codes() == [86, -signal.SIGKILL]
        assert job.errors(0).startswith(f"error: {job.name(1)} died")
    finally:
        job.kill()


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1000)
    except ConnectionResetError:
        return b""


def test_an_unreachable_monitor_is_a_mistake_that_says_where(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from t2i.monitor import Monitor
def share(make):
    return b'{"port": 1, "secret": ""}'
with Monitor(1, 2, local_rank=1, folder=Path(sys.argv[1]), watchdog=0, share=share):
    pass
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "localhost"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.search(
        r"OSError: rank 1 on \S+ cannot reach the monitor of rank 0 at localhost:1 \(.*refused\)", done.stderr
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited"), True),
        (RuntimeError("Socket Timeout"), False),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("nccl"), False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_echoes_are_errors_of_collectives(error: Exception, expected: bool) -> None:
    assert is_echo(error) == expected
