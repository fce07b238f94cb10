"""Two ranks on two hosts, through the stock launcher for many of them: hostfile, pdsh and SSH. See `two_hosts`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from t2i.checkpoint import checkpoints
from t2i.export import merged_weights

from .conftest import STEPS, losses, results, rows
from .test_faults import has_rows, pid_of
from .two_hosts import TwoHosts, two_hosts, wait_for, why_not

_REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=f"no two hosts here: {_REASON}")]

Stage = Callable[[int], Path]
RUN_SECONDS = 200


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


def assert_same_weights(one: Path, other: Path) -> None:
    for averaged in (False, True):
        mine, theirs = (merged_weights(checkpoints(run_dir)[-1], averaged) for run_dir in (one, other))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), (name, averaged)


def test_two_hosts_train_as_one(
    hosts: TwoHosts, trained: Stage, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = hosts.deepspeed("t2i/train.py", recipe_file, "--deepspeed_config", deepspeed_config(2), "--run-dir", run_dir)
    assert job.wait(RUN_SECONDS) == 0, job.said()
    assert f"{hosts.first.name}: {STEPS} steps done" in job.said()
    for rank, host in enumerate(hosts.hosts):
        assert re.search(rf"^{host.name}: .*nnodes=2, num_local_procs=1, node_rank={rank}$", job.said(), re.MULTILINE)
    assert results(run_dir) == results(trained(2))
    assert_same_weights(run_dir, trained(2))


def test_a_cut_cable_ends_the_job_on_both_hosts_and_the_same_command_resumes(
    hosts: TwoHosts, trained: Stage, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path
) -> None:
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    # What the far rank says goes nowhere once its SSH connection is dead, unless it goes to a file as well. Saved in the
    # foreground, a checkpoint is whole before the next step begins: half of the run is left then to cut the cable in.
    command = (
        "--enable_each_rank_log", logs, "t2i/train.py", recipe_file, "--deepspeed_config", deepspeed_config(2),
        "--run-dir", run_dir, "--train.no-background-save",
    )  # fmt: skip
    job = hosts.deepspeed(*command)
    assert wait_for(lambda: bool(checkpoints(run_dir)) or job.process.poll() is not None, RUN_SECONDS), job.said()
    hosts.cut()
    try:
        assert job.wait(RUN_SECONDS) != 0, job.said()
        for host in hosts.hosts:
            assert wait_for(lambda host=host: not host.processes(), RUN_SECONDS), (host.name, host.processes())
    finally:
        hosts.mend()
    assert [one.info.step for one in checkpoints(run_dir)] == [STEPS // 2]
    assert rows(run_dir)[-1]["step"] < STEPS
    # The launcher names the host that it has lost, and each rank the other one.
    assert f"{hosts.second.name}: ssh exited with exit code 255" in job.said()
    for rank, other in ((0, 1), (1, 0)):
        (log,) = logs.glob(f"*_rank{rank}.log")
        assert f"error: rank {other} on {hosts.hosts[other].name}, pid " in log.read_text(), log.read_text()

    job = hosts.deepspeed(*command)
    assert job.wait(RUN_SECONDS) == 0, job.said()
    assert losses(run_dir) == losses(trained(2))
    assert_same_weights(run_dir, trained(2))


def test_a_rank_killed_on_the_far_host_ends_the_job_on_both_which_says_who_it_was(
    hosts: TwoHosts, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = hosts.deepspeed(
        "t2i/train.py", recipe_file, "--deepspeed_config", deepspeed_config(2), "--run-dir", run_dir,
        "--train.steps", "100000", "--train.save-every", "100000", "--train.sample-every", "0", "--eval.geneval-every", "0",
    )  # fmt: skip
    assert wait_for(lambda: has_rows(run_dir, STEPS) or job.process.poll() is not None, RUN_SECONDS), job.said()
    assert job.process.poll() is None, job.said()
    killed = pid_of(run_dir, 1)  # by its own count
    hosts.second.run("sh", "-c", f"kill -KILL {killed}")
    emptied = wait_for(lambda: not any(host.processes() for host in hosts.hosts), 30)
    assert emptied, ([host.processes() for host in hosts.hosts], job.said())
    assert job.wait(5) != 0, job.said()
    # Said by the rank that is well, which is on the first host.
    told = rf"^{hosts.first.name}: error: rank 1 on {hosts.second.name}, pid {killed} is dead"
    assert len(re.findall(told, job.said(), re.MULTILINE)) == 1, job.said()


def test_hosts_reach_each_other_until_the_cable_is_cut_or_one_crashes(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as pair:
        assert pair.first.run("hostname", "-I").split() == [pair.first.address]
        assert pair.ssh(pair.second).stdout == f"{pair.second.name}\n"
        pair.cut()
        assert pair.ssh(pair.second).returncode == 255
        pair.mend()
        assert pair.ssh(pair.second).returncode == 0
        # A host that loses its power takes along what runs there.
        with psutil.Popen(pair.second.inside("sleep", "1000")) as process:
            assert wait_for(lambda: "sleep 1000" in pair.second.processes(), 10)
            pair.crash()
            assert process.wait(10) != 0
        assert pair.second.processes() == []
        assert pair.ssh(pair.second).returncode == 255
        assert pair.ssh(pair.first).returncode == 0


def test_hosts_leave_nothing_behind_after_a_failure(tmp_path: Path) -> None:
    made: list[psutil.Process] = []

    def fail() -> None:
        with two_hosts(tmp_path) as pair:
            made.extend(psutil.Process(host.server) for host in pair.hosts)
            made.append(psutil.Process(pair.deepspeed("--help").process.pid))
            assert all(process.is_running() for process in made)
            raise KeyError("a test that fails")

    with pytest.raises(KeyError, match="a test that fails"):
        fail()
    assert not any(process.is_running() for process in made)
