"""Starts the probe through the stock `deepspeed` launcher, as training is started, and takes what its ranks tell."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t2i.doctor.facts import Inbox, Plan, pack

_GRACE = 30.0
"""Seconds for the launcher to end once its ranks have."""


@dataclass(frozen=True)
class Launched:
    """What came of it; `code` is the launcher's exit code, None where it did not end; `late`: the time was up."""

    code: int | None
    inbox: Inbox
    late: bool = False


def launch(plan: Plan, hostfile: Path | None, ranks: int | None, launcher_args: Sequence[str]) -> Launched:
    """Probe on all hosts of the file, or on `ranks` ranks of this one, for as long as the plan says."""
    # Of this interpreter, as the `deepspeed` command beside it is.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_args]
    if hostfile is not None:
        command += ["--hostfile", str(hostfile)]
    elif ranks is not None:
        command += ["--num_accelerators", str(ranks)]
    if hostfile is None and not any(arg.startswith("--master_port") for arg in launcher_args):
        command += ["--master_port", str(_free_port())]  # a training may be running here
    command += ["--module", "t2i.doctor.probe", pack(plan)]
    inbox = Inbox()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
        start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            inbox.take(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code: int | None = None
    begun = time.monotonic()
    try:
        code = process.wait(plan.timeout + _GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _end(process)
    reader.join(_GRACE)
    return Launched(code, inbox, late=time.monotonic() - begun >= plan.timeout)


def _end(process: "subprocess.Popen[str]") -> None:
    """End the launcher and all that it started here.

    Not by SIGTERM, at which it ends every run of this interpreter's launcher on all hosts, other trainings too (`pkill -f`).
    Ranks on other hosts end themselves.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
