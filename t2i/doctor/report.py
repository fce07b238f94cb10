"""From what the launcher brought back to one table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t2i.doctor import checks, settings
from t2i.doctor.facts import JOINING
from t2i.doctor.findings import Findings, Row, names
from t2i.doctor.launch import Launched

_LAST_LINES, _LINE_LENGTH = 15, 240
_LOOK = "see the last lines below; if it only is slow, give more time with --timeout"
_CONNECT = (
    "open the hosts' firewalls to each other; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in .deepspeed_env to the interface "
    "that they share, and --master_addr to the first host's address there"
)


def launching(launched: Launched, findings: Findings) -> list[Row]:
    """Whether all ranks came up, met and ended."""
    inbox, ranks = launched.inbox, findings.ranks
    how = (
        f"not done after {findings.plan.timeout:g} s"
        if launched.late
        else f"the launcher ended with code {launched.code}"
    )
    absent = [rank for rank in range(ranks) if rank not in inbox.stages]
    if absent:
        there = ranks - len(absent)
        where = names(findings.host_of(rank) for rank in absent)
        alone = "" if inbox.local else "; what follows is of this machine alone"
        return [
            Row("red", "ranks", f"{there} of {ranks} came up; not {names(absent)} on {where}; {how}{alone}",
                f"see the last lines below; try `ssh {where.split(',')[0]} hostname`, and whether Python and this project are "
                "under the same paths there")
        ]  # fmt: skip
    stuck = {rank: stage for rank, stage in inbox.stages.items() if stage != "done"}
    # Ranks that fail alike are told of together; of those that wait for each other, all that wait at the same point.
    ends = {rank: f"failed while {stuck.get(rank, 'ending')}: {error}" for rank, error in inbox.errors.items()}
    ends = ends or {rank: f"stopped while {stage}; {how}" for rank, stage in stuck.items()}
    rows = []
    for end in dict.fromkeys(ends.values()):
        who = names(f"{rank} ({findings.host_of(rank)})" for rank in sorted(ends) if ends[rank] == end)
        rows.append(Row("red", "ranks", f"{who} {end}", _CONNECT if JOINING in end else _LOOK))
    if launched.code != 0 and not rows:
        rows = [Row("red", "ranks", how, _LOOK)]
    return rows or [Row("green", "ranks", f"{ranks} on {names(findings.hosts)}: up, met and ended")]


def judge(launched: Launched, findings: Findings) -> list[Row]:
    """All rows of the table."""
    rows = launching(launched, findings)
    for check in (*checks.CHECKS, *settings.CHECKS):
        rows += check(findings)
    return rows


def print_report(rows: Sequence[Row], launched: Launched, title: str, console: Console | None = None) -> None:
    """Print one table, and below it the last lines of a launcher that failed."""
    console = console or Console()
    console.width = max(console.width, 160)  # a table in a log file is not folded into slivers
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("", "check", "what was seen", "what to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        style = "" if row.status == "green" else row.status
        table.add_row(f"[{row.status}]{row.status}[/]", row.check, escape(row.seen), escape(row.remedy), style=style)
    console.print(table)
    if launched.code != 0:
        console.print("The last lines of the launcher's output:")
        for line in launched.inbox.lines[-_LAST_LINES:]:
            console.print(f"  {line[:_LINE_LENGTH]}", markup=False, highlight=False)
    counts = {status: sum(row.status == status for row in rows) for status in ("red", "yellow", "green")}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


def as_json(rows: Sequence[Row], launched: Launched, findings: Findings) -> str:
    """The same for machines, with all that the ranks have told."""
    answer: dict[str, Any] = {
        "rows": [asdict(row) for row in rows],
        "hosts": findings.hosts,
        "local": [asdict(facts) for facts in findings.local],
        "group": [asdict(facts) for facts in findings.group],
        "last_lines": launched.inbox.lines[-_LAST_LINES:] if launched.code != 0 else [],
    }
    return json.dumps(answer, indent=2)
