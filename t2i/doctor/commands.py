"""`t2i doctor`. What it needs is imported when it runs, so that help is quick."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from t2i.config import Recipe
    from t2i.doctor.facts import Plan
    from t2i.doctor.findings import Findings
    from t2i.doctor.launch import Launched


@dataclass(frozen=True)
class Doctor:
    """Look at all hosts of a run before it begins, and say what to do about each red line.

    Starts a short probe through the deepspeed launcher, as training is started, and prints one table. Every field of the
    recipe is an option as for training (`python t2i/train.py RECIPE --help` lists them). Exit code 1 where a line is red.
    """

    recipe: Positional[str]
    """A recipe's name, or the recipe.json of a run."""
    deepspeed_config: Path
    """The DeepSpeed JSON of the run."""
    hostfile: Path | None = None
    """The launcher's hostfile; this machine alone when not given."""
    ranks: int | None = None
    """Ranks on this machine, without a hostfile; one for each accelerator when not given."""
    launcher_args: str = ""
    """More options of the launcher, as one text, such as "--master_addr 10.0.0.1 --include worker-0@worker-1"."""
    write_mib: int = 256
    """MiB that each host writes to the run folder, and removes."""
    reduce_mib: int = 64
    """MiB of the all-reduce whose speed is measured."""
    timeout: float = 600.0
    """Seconds after which ranks that have not answered are taken for missing."""
    json: bool = False
    """Print JSON in place of the table."""


def doctor(args: Sequence[str]) -> int:
    """Parse what follows `t2i doctor`, probe, print; returns the exit code. Raises ValueError for a mistake in `args`."""
    import tyro

    options, rest = tyro.cli(Doctor, args=list(args), return_unknown_args=True, prog="t2i doctor")
    from t2i.recipes import changed_recipe

    prog = f"t2i doctor {options.recipe} --deepspeed-config FILE"
    return examine(options, changed_recipe(options.recipe, rest, prog))


def examine(options: Doctor, recipe: "Recipe") -> int:
    """Probe and print; returns 1 where something is red, else 0."""
    import secrets
    import shlex
    import shutil

    from t2i.doctor.facts import Plan
    from t2i.doctor.folder import probe_folder
    from t2i.doctor.launch import launch
    from t2i.doctor.report import as_json, judge, print_report

    few = options.ranks is not None and options.ranks < 1
    if few or min(options.write_mib, options.reduce_mib) < 1 or options.timeout <= 0:
        raise ValueError(
            f"write_mib {options.write_mib}, reduce_mib {options.reduce_mib}, timeout {options.timeout:g} and ranks "
            f"{options.ranks} have to be at least 1"
        )
    if options.hostfile is not None and not options.hostfile.is_file():
        raise ValueError(f"hostfile {options.hostfile} is no file; the launcher would take this machine alone")
    if options.hostfile is not None and options.ranks is not None:
        raise ValueError(f"ranks is {options.ranks}, and the hostfile says how many each host has; leave one out")
    given = Path(options.recipe)
    files = (*((given,) if given.is_file() else ()), options.deepspeed_config)
    plan = Plan(
        recipe,
        options.deepspeed_config,
        files,
        secrets.token_hex(8),
        options.timeout,
        options.write_mib * 2**20,
        options.reduce_mib * 2**20,
    )
    try:
        launched = launch(plan, options.hostfile, options.ranks, shlex.split(options.launcher_args))
    finally:
        shutil.rmtree(probe_folder(plan), ignore_errors=True)  # of ranks that were ended on their way
    findings = _findings(plan, launched, options.hostfile)
    rows = judge(launched, findings)
    if options.json:
        print(as_json(rows, launched, findings))
    else:
        title = f"t2i doctor: {recipe.name}, ranks {findings.ranks}, hosts {len(findings.slots) or len(findings.hosts)}"
        print_report(rows, launched, title)
    return int(any(row.status == "red" for row in rows))


def _findings(plan: "Plan", launched: "Launched", hostfile: Path | None) -> "Findings":
    import json
    import os

    from t2i.costs import parameters
    from t2i.doctor.findings import Findings
    from t2i.doctor.local import gather_local, this_device

    inbox = launched.inbox
    hosts = inbox.hosts or (_hosts_in(hostfile) if hostfile is not None else {})
    local = tuple(facts for _, facts in sorted(inbox.local.items()))
    ranks = sum(hosts.values()) or (local[0].ranks if local else 1)
    named = tuple(hosts) or tuple(dict.fromkeys(facts.hostname for facts in local))
    if not local:
        # Nobody came up: at least what this machine knows, as the first rank.
        environ = {
            **os.environ,
            "RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(next(iter(hosts.values()), 1)),
        }
        local = (gather_local(plan, this_device(), _config_error(plan.deepspeed_config), environ),)
        named = ("this machine",)
    try:
        config = json.loads(plan.deepspeed_config.read_text())
    except (OSError, ValueError):
        config = {}
    return Findings(
        plan=plan,
        ranks=ranks,
        hosts=named,
        slots=hosts,
        local=local,
        group=tuple(facts for _, facts in sorted(inbox.group.items())),
        config=config if isinstance(config, dict) else {},
        parameters=sum(parameters(plan.recipe).values()),
    )


def _hosts_in(hostfile: Path) -> dict[str, int]:
    """Hosts and their slots; lines that the launcher would refuse are left to it."""
    import re

    lines = (re.match(r"(\S+)\s+slots=(\d+)", line.strip()) for line in hostfile.read_text().splitlines())
    return {found[1]: int(found[2]) for found in lines if found}


def _config_error(path: Path) -> str | None:
    import contextlib
    import sys

    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed says which accelerator it takes
        from t2i.engine import read_deepspeed_config

    try:
        read_deepspeed_config(path)
    except ValueError as error:
        return str(error)
    return None
