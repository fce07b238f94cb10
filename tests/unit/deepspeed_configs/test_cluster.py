"""The files for clusters: what a scheduler would see of them, with small programs in the place of its own."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

from t2i.recipes import RECIPES

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "deepspeed_configs" / "cluster"

# What stands for a rank: notes who it is, and ends as RANK_CODES says by rank, or with 85 on the signal that it waits for.
PYTHON = """
told="$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE ${MASTER_ADDR:-} ${MASTER_PORT:-}"
echo "$told $(printf "'%s'" "$@")" > "$NOTES/rank-$RANK"
env > "$NOTES/environment-$RANK"
codes=($RANK_CODES)
if [ "${codes[$RANK]}" != wait ]; then exit "${codes[$RANK]}"; fi
trap 'echo "$RANK" > "$NOTES/signalled-$RANK"; exit 85' "$AWAITED"
touch "$NOTES/waiting-$RANK"
for _ in $(seq 200); do sleep 0.05; done
exit 1
"""
# As srun does: a task each, signals go on to all, the highest code counts. Options come before the command.
SRUN = """
while [[ $1 == --* ]]; do echo "$1" >> "$NOTES/srun"; shift; done
tasks=()
forwarded=
trap 'forwarded=1; kill -USR1 "${tasks[@]}"' USR1
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    while forwarded=; wait "$task"; code=$?; [ -n "$forwarded" ]; do :; done
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """
echo "$*" >> "$NOTES/scontrol"
if [ "$1 $2" = "show hostnames" ]; then printf 'node-7\\nnode-8\\n'; fi
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(script, arguments..., rank_codes=..., environment...) -> the running script; notes are in tmp_path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)

    def run(script: str, *arguments: str, rank_codes: str, **environment: str) -> "subprocess.Popen[str]":
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        known = {"PATH": path, "NOTES": str(tmp_path), "RANK_CODES": rank_codes, "AWAITED": "USR1"}
        return subprocess.Popen(
            [CLUSTER / script, *arguments], cwd=tmp_path, env=known | environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return run


SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "nar-t2i", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
}  # fmt: skip
FAULTS = "nar-t2i-1234567.faults"


def wait_for_ranks(notes: Path, ranks: int) -> None:
    limit = time.monotonic() + 20
    while len(list(notes.glob("waiting-*"))) < ranks:
        assert time.monotonic() < limit, sorted(path.name for path in notes.iterdir())
        time.sleep(0.01)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize("script", ["slurm.sbatch", "pod.sh"])
def test_scripts_are_valid_bash_and_executable(script: str) -> None:
    done = subprocess.run(["bash", "-n", CLUSTER / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(CLUSTER / script, os.X_OK)


# Slurm


def test_slurm_starts_a_rank_for_each_task(start: Start, tmp_path: Path) -> None:
    code, output = ended(start("slurm.sbatch", "nar-b-256", "--train.run", "two words", rank_codes="0 0 0 0", **SLURM))
    assert code == 0, output
    assert "4 ranks on node-7 node-8" in output
    for rank in range(4):
        told = (tmp_path / f"rank-{rank}").read_text()
        assert told == f"{rank} {rank % 2} 4 2 node-7 24567 '-u''t2i/train.py''nar-b-256''--train.run''two words'\n"
    assert (tmp_path / "scontrol").read_text() == "show hostnames node-[7-8]\n"
    # Otherwise the first rank that has saved would take the others down.
    assert "--kill-on-bad-exit=0" in (tmp_path / "srun").read_text()


@pytest.mark.parametrize("rank_codes", ["0 0 0 0", "2 2 2 2"])
def test_slurm_does_not_start_again_what_is_done_or_wrong(rank_codes: str, start: Start, tmp_path: Path) -> None:
    code, output = ended(start("slurm.sbatch", "nar-b-256", rank_codes=rank_codes, **SLURM))
    assert code == max(map(int, rank_codes.split())), output
    assert "requeue" not in (tmp_path / "scontrol").read_text()


@pytest.mark.parametrize("rank_codes", ["0 1 0 0", "86 86 137 86", "87 87 87 87"])
def test_slurm_starts_again_after_a_fault_and_notes_it(rank_codes: str, start: Start, tmp_path: Path) -> None:
    (tmp_path / FAULTS).write_text("a fault\n" * 19)
    code, output = ended(start("slurm.sbatch", rank_codes=rank_codes, SLURM_RESTART_COUNT="200", **SLURM))
    assert code == max(map(int, rank_codes.split())), output
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 1234567"
    lines = (tmp_path / FAULTS).read_text().splitlines()
    assert len(lines) == 20
    assert lines[-1].endswith(f"start 200: code {code}")


def test_slurm_gives_up_after_so_many_faults(start: Start, tmp_path: Path) -> None:
    (tmp_path / FAULTS).write_text("a fault\n" * 20)
    code, output = ended(start("slurm.sbatch", rank_codes="86 86 86 86", **SLURM))
    assert code == 86
    assert "after 20 restarts" in output
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_slurm_does_not_start_again_after_a_fault_that_it_cannot_note(start: Start, tmp_path: Path) -> None:
    (tmp_path / FAULTS).mkdir()
    code, output = ended(start("slurm.sbatch", rank_codes="86 86 86 86", **SLURM))
    assert code != 0
    assert f"{FAULTS}: Is a directory" in output
    assert "requeue" not in (tmp_path / "scontrol").read_text()


def test_slurm_starts_again_after_every_planned_stop_and_counts_faults_anew(start: Start, tmp_path: Path) -> None:
    (tmp_path / FAULTS).write_text("a fault\n" * 20)
    code, output = ended(start("slurm.sbatch", rank_codes="85 85 85 85", SLURM_RESTART_COUNT="200", **SLURM))
    assert code == 85, output
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 1234567"
    assert not (tmp_path / FAULTS).exists()


def test_slurms_signal_reaches_every_rank_and_the_saved_run_is_requeued(start: Start, tmp_path: Path) -> None:
    process = start("slurm.sbatch", "nar-b-256", rank_codes="wait wait wait wait", **SLURM)
    wait_for_ranks(tmp_path, 4)
    process.send_signal(signal.SIGUSR1)
    code, output = ended(process)
    assert code == 85, output
    assert len(list(tmp_path.glob("signalled-*"))) == 4
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 1234567"


def test_slurms_ranks_know_the_network_file(start: Start, tmp_path: Path) -> None:
    process = start("slurm.sbatch", rank_codes="0 0 0 0", NETWORK_ENV=str(CLUSTER / "network.env"), **SLURM)
    code, output = ended(process)
    assert code == 0, output
    told = (tmp_path / "environment-3").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME==eth0", "NCCL_IB_HCA=mlx5"} <= set(told)


def test_slurm_is_told_to_signal_the_script_and_to_allow_requeueing() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)


# Kubernetes


def pod(start: Start, rank_codes: str, **more: str) -> "subprocess.Popen[str]":
    known = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nar-t2i-master-0", "MASTER_PORT": "23456"}
    return start("pod.sh", "nar-b-256", "two words", rank_codes=rank_codes, **(known | {"GPUS_PER_POD": "2"} | more))


def test_a_pod_starts_a_rank_for_each_gpu(start: Start, tmp_path: Path) -> None:
    code, output = ended(pod(start, "9 9 0 0"))  # the first two belong to the other pod
    assert code == 0, output
    assert [path.name for path in sorted(tmp_path.glob("rank-*"))] == ["rank-2", "rank-3"]
    assert (
        tmp_path / "rank-3"
    ).read_text() == "3 1 4 2 nar-t2i-master-0 23456 '-u''t2i/train.py''nar-b-256''two words'\n"


def test_a_pods_exit_code_is_the_highest_of_its_ranks(start: Start) -> None:
    assert ended(pod(start, "0 0 86 1"))[0] == 86


def test_a_pod_that_has_to_go_lets_its_ranks_save(start: Start, tmp_path: Path) -> None:
    process = pod(start, "0 0 wait wait", AWAITED="TERM")
    wait_for_ranks(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 85, output
    assert len(list(tmp_path.glob("signalled-*"))) == 2


def test_a_pod_has_to_know_its_gpus(start: Start) -> None:
    code, output = ended(pod(start, "0 0 0 0", GPUS_PER_POD=""))
    assert code == 1
    assert "GPUS_PER_POD: how many GPUs the pod has" in output


def environment_of(pod_spec: dict[str, Any], claim: dict[str, Any], name: str) -> dict[str, str]:
    """The variables of a pod's only container, which fits together with its volumes and its script."""
    assert pod_spec["terminationGracePeriodSeconds"] >= 300
    (container,) = pod_spec["containers"]
    assert container["name"] == name
    (command,) = container["command"]
    assert ROOT / command == CLUSTER / "pod.sh"
    recipe, option, config, *_ = container["args"]
    assert recipe in RECIPES
    assert (option, (ROOT / config).is_file()) == ("--deepspeed_config", True)
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    assert int(environment["GPUS_PER_POD"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    volumes = {one["name"]: one for one in pod_spec["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    return environment


def test_the_pytorchjob_fits_together() -> None:
    claim, job = yaml.safe_load_all((CLUSTER / "pytorchjob.yaml").read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    # With it the operator would number ranks itself, other than pod.sh expects.
    assert "nprocPerNode" not in job["spec"]
    assert set(job["spec"]["runPolicy"]) <= {"cleanPodPolicy", "backoffLimit", "ttlSecondsAfterFinished"}
    replicas: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for spec in replicas.values():
        assert spec["restartPolicy"] == "OnFailure"
        environment_of(spec["template"]["spec"], claim, "pytorch")


def test_the_job_of_one_node_starts_all_of_its_ranks_and_ends_after_a_mistake(start: Start, tmp_path: Path) -> None:
    claim, job = yaml.safe_load_all((CLUSTER / "job.yaml").read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    template = job["spec"]["template"]["spec"]
    assert template["restartPolicy"] == "Never"  # Kubernetes takes a podFailurePolicy with no other
    environment = environment_of(template, claim, "train")
    code, output = ended(start("pod.sh", "nar-b-256", rank_codes="2 2 2 2 2 2 2 2", **environment))
    mistake, eviction = job["spec"]["podFailurePolicy"]["rules"]
    assert (mistake["action"], mistake["onExitCodes"]["containerName"]) == ("FailJob", "train")
    assert (mistake["onExitCodes"]["operator"], mistake["onExitCodes"]["values"]) == ("In", [code]), output
    assert (eviction["action"], eviction["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])
    for rank in range(8):
        assert (
            tmp_path / f"rank-{rank}"
        ).read_text() == f"{rank} {rank} 8 8 localhost 29500 '-u''t2i/train.py''nar-b-256'\n"


# Hostfile and network


def test_the_launcher_reads_the_hostfile() -> None:
    assert dict(fetch_hostfile(CLUSTER / "hostfile")) == {f"host-{number}": 8 for number in range(4)}


def test_the_network_file_is_read_by_bash_and_stripped_for_the_launcher() -> None:
    path = CLUSTER / "network.env"
    lines = path.read_text().splitlines()
    settings = re.compile(r"#?[A-Z][A-Z0-9_]*=[^\s'\"$]+")
    assert all(not line or line.startswith("# ") or settings.fullmatch(line) for line in lines)
    names = [line.lstrip("#").partition("=")[0] for line in lines if settings.fullmatch(line)]
    assert len(names) == len(set(names))
    # The launcher's file takes no comments: it would set them, or stumble over them (docs/cluster.md).
    stripped = subprocess.run(["grep", "^[A-Z]", path], check=True, capture_output=True, text=True).stdout
    told = dict(line.split("=", maxsplit=1) for line in stripped.splitlines())
    read = subprocess.run(
        ["bash", "-euc", f"set -a; . {path}; env"],
        env={"PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert told.items() <= dict(line.split("=", maxsplit=1) for line in read.splitlines()).items()
    assert told["NCCL_SOCKET_IFNAME"] == "=eth0"
