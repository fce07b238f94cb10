"""Two hosts on one machine, for what happens between hosts alone.

    with two_hosts(folder) as hosts:
        job = hosts.deepspeed("t2i/train.py", "recipe.json", ...)     # typed on the first host, one rank on each
        hosts.cut()

A host is a set of namespaces around an SSH server: a network with one end of the cable as its only device, a process list,
mounts and a name of its own. The server is process 1 in there: when it dies, the system ends every process of the host.
Nothing has a name outside that could stay behind, or could meet another test's.

The process list is a must: on SIGTERM the launcher ends processes on all hosts by pattern (`pkill -f`).
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .conftest import ROOT, environment

PACKAGES = {
    "ip": "iproute2", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "sshd": "openssh-server", "pdsh": "pdsh",
    "unshare": "util-linux", "taskset": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "hostname": "hostname",
}  # fmt: skip
"""The programs that this takes, and the Debian packages that they are in."""
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# A dead host would otherwise keep pdsh waiting until the link is back.
KEEP_ALIVE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"
READY_SECONDS = 20.0

_UNSHARE = ("unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def why_not() -> str | None:
    """Why two hosts cannot be made here, or None where they can."""
    if os.geteuid() != 0:
        return "making namespaces takes root"
    missing = sorted({package for name, package in PACKAGES.items() if shutil.which(name, path=_PATH) is None})
    if missing:
        return f"packages missing: {' '.join(missing)}"
    probe = [*_UNSHARE, "sh", "-c", "mount -t tmpfs tmpfs /run && ip link add eth0 type veth peer name eth1"]
    done = subprocess.run(probe, capture_output=True, text=True, env=os.environ | {"PATH": _PATH})
    return None if done.returncode == 0 else f"namespaces are not permitted: {done.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """One host; `server` is the pid of its SSH server, seen from outside."""

    name: str
    address: str
    server: int

    def inside(self, *command: str | Path) -> list[str]:
        """The command line that runs a command in this host, in the folder of the project."""
        spaces = ["nsenter", "--target", str(self.server), "--net", "--uts", "--pid", "--mount"]
        return [*spaces, "env", "-C", str(ROOT), *map(str, command)]

    def run(self, *command: str) -> str:
        """Run a command there and return what it prints. Raises CalledProcessError."""
        return subprocess.run(
            self.inside(*command), check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PATH": _PATH}
        ).stdout

    def processes(self) -> list[str]:
        """Command lines of the processes there, without those of its SSH server."""
        try:
            space = os.readlink(f"/proc/{self.server}/ns/pid")
        except FileNotFoundError:
            return []
        lines = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.name() != "sshd":
                    lines.append(shlex.join(process.cmdline()))
            except (OSError, psutil.Error):  # ended meanwhile
                continue
        return lines


@dataclass(frozen=True)
class Job:
    """A running `deepspeed` command and the file that takes its output."""

    process: "subprocess.Popen[bytes]"
    output: Path

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises AssertionError with its output where it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said()}") from None

    def said(self) -> str:
        return self.output.read_text(errors="replace")


class TwoHosts:
    """Two hosts and the cable between them; made by `two_hosts`."""

    def __init__(self, folder: Path, hosts: Sequence[Host], stack: ExitStack, server_logs: Sequence[Path]) -> None:
        self.folder, self.hosts, self._stack, self._server_logs = folder, hosts, stack, server_logs
        self.first, self.second = hosts
        self._jobs = 0
        # In front of ssh for launcher and pdsh alike, neither of which takes a configuration file.
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh", path=_PATH)} -F {folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)
        self.environment = environment(
            PDSH_SSH_ARGS_APPEND=KEEP_ALIVE, DS_ENV_FILE=str(folder / "deepspeed_env"), DS_ACCELERATOR="cpu"
        )
        self.environment["PATH"] = f"{wrapper.parent}{os.pathsep}{self.environment['PATH']}{os.pathsep}{_PATH}"
        (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))

    def deepspeed(self, *arguments: str | Path, **exports: str) -> Job:
        """Type `deepspeed --hostfile HOSTFILE ARGUMENTS` on the first host; `exports` are set for every rank."""
        ranks = {
            "PATH": self.environment["PATH"], "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        lines = "".join(f"{name}={value}\n" for name, value in (ranks | exports).items())
        (self.folder / "deepspeed_env").write_text(lines)
        self._jobs += 1
        output = self.folder / f"job-{self._jobs}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.first.inside("deepspeed", "--hostfile", self.folder / "hostfile", *arguments),
                env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
        # What runs inside ends with its host; this is the process that waits for it outside.
        self._stack.callback(_end, process)
        return Job(process, output)

    def ssh(self, host: Host) -> "subprocess.CompletedProcess[str]":
        """Ask a host for its name, from the first one over the cable."""
        command = self.first.inside("ssh", "-o", "ConnectTimeout=2", host.name, "hostname")
        return subprocess.run(command, capture_output=True, text=True, env=self.environment)

    def cut(self) -> None:
        """Cut the cable: packets are lost on the way, and no connection is told."""
        self.second.run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        self.second.run("ip", "link", "set", "eth0", "up")
        self.wait_until_ready()

    def crash(self) -> None:
        """Take the power from the second host: all there ends at once, and no connection is told."""
        self.cut()
        _kill(self.second.server)

    def wait_until_ready(self) -> None:
        """Until both SSH servers answer. Raises RuntimeError with what they say where they do not."""
        for host, log in zip(self.hosts, self._server_logs, strict=True):
            answers: list[subprocess.CompletedProcess[str]] = []

            def answered(host: Host = host, answers: list[Any] = answers) -> bool:
                answers.append(self.ssh(host))
                return bool(answers[-1].returncode == 0)

            if not wait_for(answered, READY_SECONDS):
                raise RuntimeError(f"no SSH to {host.name}: {answers[-1].stderr}\nits server says: {log.read_text()}")


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts, with their files in a folder of their own; gone afterwards, whatever happens, and after SIGKILL too."""
    with ExitStack() as stack:
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        config = folder / "sshd_config"
        config.write_text(
            f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'user_key.pub'}\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name in zip(ADDRESSES, NAMES, strict=True))
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder / 'user_key'}\nIdentitiesOnly yes\nBatchMode yes\nLogLevel ERROR\n"
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\n"
        )
        logs = [folder / f"{name}.sshd.log" for name in NAMES]
        hosts = [
            Host(name, address, _server(folder, name, log, stack))
            for name, address, log in zip(NAMES, ADDRESSES, logs, strict=True)
        ]
        ends = [f"name eth0 netns {host.server}" for host in hosts]
        link = f"ip link add {ends[0]} type veth peer {ends[1]}"
        subprocess.run(link.split(), check=True, env=os.environ | {"PATH": _PATH})
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.run("ip", "link", "set", device, "up")
        pair = TwoHosts(folder, hosts, stack, logs)
        pair.wait_until_ready()
        yield pair


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def _server(folder: Path, name: str, log: Path, stack: ExitStack) -> int:
    """Start a host; returns the pid of its SSH server, which `stack` ends."""
    # A core of its own: ranks take as many threads as their host has cores for each, and sums depend on that.
    cores = sorted(os.sched_getaffinity(0))
    core = cores[NAMES.index(name) % len(cores)]
    begin = f"""set -e
        hostname {name}
        mount -t tmpfs tmpfs /run && mkdir /run/sshd
        mount -t tmpfs tmpfs /dev/shm
        mount --bind {shlex.quote(str(folder / "hosts"))} /etc/hosts
        exec taskset -c {core} {shutil.which("sshd", path=_PATH)} -D -e -f {shlex.quote(str(folder / "sshd_config"))}"""
    with log.open("wb") as file:
        # setpriv: should this process be killed, so is unshare, and with it the host.
        outside = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "sh", "-c", begin], env=os.environ | {"PATH": _PATH},
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    stack.callback(_end, outside)
    process = psutil.Process(outside.pid)
    wait_for(lambda: outside.poll() is not None or bool(process.children()), READY_SECONDS)
    if outside.poll() is not None or not process.children():
        raise RuntimeError(f"{name} does not start: {log.read_text()}")
    server = process.children()[0].pid
    # Else the cable would go with a host that crashes, and the other would know at once.
    stack.callback(os.close, os.open(f"/proc/{server}/ns/net", os.O_RDONLY))
    stack.callback(_stop, server, outside)
    return server


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _stop(server: int, outside: "subprocess.Popen[bytes]") -> None:
    """End a host, and wait until the last of its processes has gone."""
    _kill(server)
    with suppress(subprocess.TimeoutExpired):
        outside.wait(READY_SECONDS)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
