"""What the checks look at, and what they say: rows of a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from t2i.doctor.facts import GroupFacts, LocalFacts, Plan

Status = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Row:
    """One line of the table: green, yellow (a run goes, but see) or red (it will fail or be spoilt)."""

    status: Status
    check: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Findings:
    """All that is known. `hosts` are names by number, `slots` how many ranks were to come up on each; `local` and `group`
    are in the order of the ranks, those that told; `config` is the DeepSpeed JSON as it stands, empty where it cannot be
    read; `parameters` are the model's."""

    plan: Plan
    ranks: int
    hosts: tuple[str, ...]
    slots: dict[str, int]
    local: tuple[LocalFacts, ...]
    group: tuple[GroupFacts, ...]
    config: dict[str, Any]
    parameters: int

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        stage = self._section("zero_optimization").get("stage")
        return stage if isinstance(stage, int) else 0

    @property
    def item(self) -> int:
        """Bytes of a weight as it is trained."""
        return 2 if any(self._section(name).get("enabled") for name in ("bf16", "fp16")) else 4

    def _section(self, name: str) -> dict[str, Any]:
        """Of the DeepSpeed JSON; one that is none has a line of its own in the table."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def together(self) -> str:
        """What to say of things that are alike."""
        return ", the same on all hosts" if len(self.hosts) > 1 else ""

    def host_of(self, rank: int) -> str:
        """Name of a rank's host."""
        for facts in self.local:
            if facts.rank == rank:
                return self.host(facts.node)
        places = [host for host, count in self.slots.items() for _ in range(count)]
        return places[rank] if rank < len(places) else "this machine"

    def host(self, node: int) -> str:
        """Name of a host by its number in the launcher's order."""
        if node < len(self.hosts):
            return self.hosts[node]
        return next((facts.hostname for facts in self.local if facts.node == node), f"host {node}")

    def by_host(self, value: Callable[[LocalFacts], Any]) -> dict[str, Any]:
        """A value of the first rank of each host."""
        found: dict[str, Any] = {}
        for facts in self.local:
            found.setdefault(self.host(facts.node), value(facts))
        return found


def differing(values: Mapping[str, Any]) -> str:
    """'x on a, b; y on c' where hosts have different values; empty where all have the same."""
    holders: dict[str, list[str]] = {}
    for host, value in values.items():
        holders.setdefault(str(value), []).append(host)
    if len(holders) < 2:
        return ""
    ordered = sorted(holders.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in ordered)


def names(values: Any, most: int = 4) -> str:
    """A list for a table, the first few."""
    values = list(dict.fromkeys(map(str, values)))
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def gib(size: float) -> str:
    """Bytes for a table."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def seconds(value: float) -> str:
    """A time for a table."""
    if value >= 120:
        return f"{value / 60:,.0f} min"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.3g} ms"
