"""Small jobs of real processes that come to an end in different ways. They are forked from one process that has imported
everything, mostly sleep, and so run side by side; seconds are shorter in them than in training."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from t2i.liveness import BEAT_SECONDS
from t2i.monitor import Monitor, is_echo

ROOT = Path(__file__).parents[3]

DRIVER = """
import ctypes, json, os, signal, sys, threading, time, traceback
from pathlib import Path
from t2i import liveness, monitor

liveness.BEAT_SECONDS = monitor.BEAT_SECONDS = 0.2
liveness.SILENT_SECONDS = monitor.SILENT_SECONDS = 4.0
liveness.SILENT_AT_START_SECONDS = 12.0
liveness.QUIET_SECONDS, liveness.SETTLE_SECONDS, liveness.ECHO_SECONDS = 1.5, 1.0, 3.0

def reading_for_ever():
    time.sleep(1000)

def job(rank, ranks, folder, watchdog, body):
    def share(make):
        path = folder / "address"
        if rank == 0:
            data = make()
            (folder / "partial").write_bytes(data)
            (folder / "partial").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return path.read_bytes()

    if "elsewhere" in body and rank:
        monitor.socket.gethostname = lambda: "elsewhere"
    with monitor.Monitor(rank, ranks, local_rank=rank, folder=folder / "logs", watchdog=watchdog, share=share) as own:
        print("a line of rank", rank, file=sys.stderr)
        own.open_log()
        if "at start" not in body:
            own.progress.step(7)
        # Wait until rank 0 has surely heard of this.
        (folder / f"begun-{rank}").touch()
        while len(list(folder.glob("begun-*"))) < ranks:
            time.sleep(0.01)
        time.sleep(1)
        exec(body, globals(), {"rank": rank, "own": own})

def start(folder, ranks, watchdog, body):
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(f"{folder}/error-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 2)
            code = 0
            try:
                job(rank, ranks, Path(folder), watchdog, body)
            except SystemExit as asked:
                code = asked.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stderr.flush()
            os._exit(code)
        pids[pid] = folder, rank

def end(*_):
    late.extend(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)

pids, late, waiting = {}, [], json.loads(sys.argv[1])
signal.signal(signal.SIGALRM, end)
signal.alarm(100)
while pids or waiting:
    # A few at once: tens of processes that open connections at the same moment keep each other waiting for seconds.
    while waiting and len(pids) < 8:
        start(*waiting.pop(0))
    pid, status = os.wait()
    folder, rank = pids.pop(pid)
    Path(folder, f"end-{rank}").write_text(json.dumps([pid, "late" if pid in late else os.waitstatus_to_exitcode(status)]))
"""

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
REST = "\ntime.sleep(1000)"
SLOW_BEAT = """
def slow(beat=own._beat):
    sent = beat()
    time.sleep(1)
    return sent
if rank == 1:
    own._beat = slow
time.sleep(0.5 if rank == 1 else 4)
"""
JOBS = {
    "end": (3, 0.0, "if rank == 1: time.sleep(0.5)"),
    "end of the first": (2, 0.0, "if rank == 0: time.sleep(0.5)"),
    "lock kept": (2, 0.0, "if rank == 1: ctypes.PyDLL(None).sleep(6)  # at start"),
    "end during a beat": (2, 0.0, SLOW_BEAT),
    "killed": (3, 0.0, f"if rank == 1: {KILL}{REST}"),
    "killed elsewhere": (3, 0.0, f"if rank == 1: {KILL}{REST}  # elsewhere"),
    "first killed": (3, 0.0, f"if rank == 0: {KILL}{REST}"),
    "echo": (
        3, 0.0,
        f"if rank == 1: {KILL}\n"
        "raise RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4')",
    ),
    "echo of none": (2, 0.0, "if rank == 1: raise RuntimeError('NCCL error: remote process exited')\nreading_for_ever()"),
    "raises": (3, 0.0, f"if rank == 1: raise OSError('disk is full'){REST}"),
    "first raises": (2, 0.0, f"if rank == 0: raise OSError('disk is full'){REST}"),
    "all raise": (3, 0.0, "time.sleep(rank / 5); raise ValueError('global batch 8 is not divisible')"),
    "hangs": (3, 2.0, "reading_for_ever() if rank == 1 else threading.Event().wait()"),
    "hangs though busy": (2, 2.0, f"for _ in range(4):\n  with own.progress.busy('saving'): time.sleep(0.8)\n{REST.strip()}"),
    "stopped": (2, 3.0, f"if rank == 1: os.kill(os.getpid(), signal.SIGSTOP){REST}"),
    "first stopped": (2, 2.0, f"if rank == 0: os.kill(os.getpid(), signal.SIGSTOP){REST}"),
    "killed, and the other ended": (
        2, 0.0, f"if rank == 1: {KILL}\ntime.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1000)",
    ),
    "all ended": (3, 0.0, f"time.sleep(rank / 5); os.kill(os.getpid(), signal.SIGTERM){REST}"),
    "alone": (1, 2.0, "reading_for_ever()"),
}  # fmt: skip
"""Ranks, watchdog and what each does once all have begun."""


class Job:
    """What a job has left."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.logs = folder / "logs"
        ends = [json.loads((folder / f"end-{rank}").read_text()) for rank in range(ranks)]
        self.codes = [code for _, code in ends]
        self.names = [f"rank {rank} on {socket.gethostname()}, pid {pid}" for rank, (pid, _) in enumerate(ends)]
        texts = [(folder / f"error-{rank}").read_text() for rank in range(ranks)]
        self.errors = [text.removeprefix(f"a line of rank {rank}\n").strip() for rank, text in enumerate(texts)]

    def log(self, rank: int, kind: str = "log") -> str:
        return (self.logs / f"rank-{rank:05d}.{kind}").read_text()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("jobs")
    plan = [(str(folder / name), *job) for name, job in JOBS.items()]
    for path, *_ in plan:
        os.mkdir(path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", DRIVER, json.dumps(plan)], env=environment, check=True, timeout=120)
    return {name: Job(folder / name, ranks) for name, (ranks, *_) in JOBS.items()}


@pytest.mark.parametrize("name", ["end", "end of the first", "end during a beat", "lock kept"])
def test_ranks_that_end_well_say_nothing(jobs: dict[str, Job], name: str) -> None:
    assert set(jobs[name].codes) == {0}, jobs[name].errors
    assert set(jobs[name].errors) == {""}


def test_a_killed_rank_ends_all_with_its_name_step_and_last_lines(jobs: dict[str, Job]) -> None:
    job = jobs["killed"]
    assert job.codes == [86, -signal.SIGKILL, 86]
    first, *more = job.errors[0].splitlines()
    assert first.startswith(f"error: {job.names[1]} is dead (its process has ended), after step 7, last seen at ")
    assert more == ["last lines of rank 1:", "    a line of rank 1"]
    assert job.errors[2] == ""  # one rank of a host speaks; in the logs of the others it is as well
    for rank in (0, 2):
        title, *lines = job.log(rank).splitlines()
        assert re.fullmatch(r"--- [-\d]+ [:\d]+ " + job.names[rank].replace(" on", " of 3 on"), title)
        assert lines == [f"a line of rank {rank}", first.removeprefix("error: "), *more]


def test_a_killed_rank_on_another_host_is_known_by_its_silence(jobs: dict[str, Job]) -> None:
    job = jobs["killed elsewhere"]
    assert job.codes == [86, -signal.SIGKILL, 86]
    name = job.names[1].replace(socket.gethostname(), "elsewhere")
    # On each host one rank speaks.
    for rank in (0, 2):
        assert job.errors[rank].startswith(f"error: {name} is dead or stopped: no sign of life for 4 s, after step 7, ")


@pytest.mark.parametrize(("name", "why"), [("first killed", "is dead (or cut off: "), ("first stopped", "is dead ")])
def test_without_rank_0_the_others_find_out_by_themselves(jobs: dict[str, Job], name: str, why: str) -> None:
    job = jobs[name]
    assert job.codes == [-signal.SIGKILL, *[86] * (len(job.codes) - 1)]
    assert f"error: {job.names[0]} {why}" in job.errors[1]
    assert ", after step 7" in job.errors[1]
    assert "    a line of rank 0" in job.errors[1]
    for rank in range(2, len(job.codes)):
        assert "error: " not in job.errors[rank]
        assert f"{job.names[0]} is dead" in job.log(rank)


def test_a_rank_whose_collective_failed_names_the_one_that_was_killed(jobs: dict[str, Job]) -> None:
    job = jobs["echo"]
    assert job.codes == [86, -signal.SIGKILL, 86]
    assert job.errors[0].startswith(f"error: {job.names[1]} is dead (its process has ended)")
    assert "gloo" not in job.errors[0] + job.errors[2]
    assert "Connection closed by peer" in job.log(2)


def test_a_collective_that_failed_though_nobody_died_is_told_with_stacks(jobs: dict[str, Job]) -> None:
    job = jobs["echo of none"]
    assert job.codes == [87, 87]
    assert f"a collective failed on {job.names[1]} after step 7 (RuntimeError: NCCL error" in job.errors[0]
    assert f"{job.names[0]} is behind" in job.errors[0]
    assert "in reading_for_ever" in job.log(0, "stacks")
    assert "Traceback" in job.log(1)


@pytest.mark.parametrize(("name", "culprit"), [("raises", 1), ("first raises", 0)])
def test_a_rank_that_raises_ends_as_it_would_alone_and_the_others_name_it(
    jobs: dict[str, Job], name: str, culprit: int
) -> None:
    job = jobs[name]
    assert job.codes == [1 if rank == culprit else 86 for rank in range(len(job.codes))]
    assert job.errors[culprit].startswith("Traceback")
    assert job.errors[culprit].endswith("OSError: disk is full")
    assert job.errors[1 - culprit].startswith(f"error: {job.names[culprit]} failed after step 7: OSError: disk is full")
    assert "    OSError: disk is full" in job.errors[1 - culprit]


def test_a_mistake_that_all_make_is_told_by_each(jobs: dict[str, Job]) -> None:
    job = jobs["all raise"]
    assert job.codes == [1, 1, 1]
    for error in job.errors:
        assert error.endswith("ValueError: global batch 8 is not divisible")
        assert "error: rank" not in error


def test_a_rank_that_hangs_ends_all_with_the_stacks_of_every_rank(jobs: dict[str, Job]) -> None:
    job = jobs["hangs"]
    assert job.codes == [87, 87, 87]
    assert re.match(r"error: no step done for \d+ s, after step 7; ", job.errors[0])
    assert f"{job.logs}/rank-*.stacks" in job.errors[0]
    assert job.errors[1:] == ["", ""]
    for rank in range(3):
        stacks = job.log(rank, "stacks")
        assert f"{job.names[rank]}: no step done" in stacks
        assert ("in reading_for_ever" in stacks) == (rank == 1)
        assert "most recent call first" in stacks


def test_beginning_and_ending_what_is_no_step_are_signs_of_life(jobs: dict[str, Job]) -> None:
    job = jobs["hangs though busy"]
    assert job.codes == [87, 87]
    # Saving took 3.2 s in four parts, more than the watchdog allows for one.
    assert re.match(r"error: no step done for [23] s, after step 7; none of 2 ranks is behind", job.errors[0])


def test_a_stopped_rank_is_named_and_does_not_outlive_the_others(jobs: dict[str, Job]) -> None:
    job = jobs["stopped"]
    assert job.codes == [86, -signal.SIGKILL]
    assert job.errors[0].startswith(f"error: {job.names[1]} is dead or stopped: no sign of life for 4 s")
    assert "it cannot write its stacks" in job.errors[0]


def test_a_rank_that_its_launcher_ends_first_says_why(jobs: dict[str, Job]) -> None:
    job = jobs["killed, and the other ended"]
    assert job.codes == [86, -signal.SIGKILL]
    assert job.errors[0].startswith(f"error: {job.names[1]} is dead (its process has ended)")


def test_a_job_that_is_ended_by_a_signal_has_no_dead(jobs: dict[str, Job]) -> None:
    assert jobs["all ended"].codes == [143, 143, 143]
    assert not [error for error in jobs["all ended"].errors if "error: " in error]


def test_one_process_alone_has_a_watchdog_too(jobs: dict[str, Job]) -> None:
    job = jobs["alone"]
    assert job.codes == [87]
    assert re.search(rf"{job.names[0]} is behind, after step 7, at \S+:\d+ \(reading_for_ever\)", job.errors[0])


def test_an_unreachable_monitor_is_a_mistake_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr("t2i.monitor.CONNECT_SECONDS", 0.1)
    monitor = Monitor(1, 2, local_rank=1, folder=tmp_path, watchdog=0, share=lambda make: b"1")
    with pytest.raises(OSError, match=r"^rank 1 on \S+ cannot reach the monitor of rank 0 at localhost:1 \("):
        monitor.__enter__()


def test_time_stands_still_for_a_process_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(0, 1, local_rank=0, folder=tmp_path, watchdog=0, share=lambda make: make())
    monkeypatch.setattr("t2i.monitor.time.monotonic", iter([0.0, 1.0, 3600.0, 3601.0]).__next__)
    times = [monitor._time() for _ in range(4)]
    assert times[1] - times[0] == times[3] - times[2] == 1.0
    assert times[2] - times[1] == 2 * BEAT_SECONDS


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited"), True),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("nccl"), False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_echoes_are_errors_of_collectives(error: Exception, expected: bool) -> None:
    assert is_echo(error) == expected
