"""Findings of a run in which all is well, to be spoilt by tests: two hosts with two GPUs each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2i.config import DataConfig, TrainConfig
from t2i.doctor.facts import Clock, Device, GroupFacts, LocalFacts, Plan, ShardFacts
from t2i.doctor.findings import Findings, Row
from t2i.recipes import shapes_tiny

GIB = 2**30
GPU = Device("cuda", "H100", 2, 80 * GIB, True)
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
}


def plan(**train: Any) -> Plan:
    recipe = replace(
        shapes_tiny(), data=DataConfig(path=Path("/no/set"), lanes=64), train=TrainConfig(**{"keep_last": 2, **train})
    )
    return Plan(recipe, Path("zero2.json"), (Path("recipe.json"), Path("zero2.json")), "0" * 16)


def local(rank: int) -> LocalFacts:
    return LocalFacts(
        rank=rank, ranks=4, local_ranks=2, node=rank // 2, hostname=f"host-{rank // 2}",
        versions={"python": "3.11.7", "torch": "2.14.1", "deepspeed": "0.19.8", "driver": "570", "source files": "abc"},
        device=GPU, variables={"OMP_NUM_THREADS": "8", "NCCL_DEBUG": "WARN"}, cores=64, memory=500 * GIB, open_files=65536,
        locked_memory=-1, shm_total=64 * GIB, shm_free=64 * GIB, infiniband=True,
        files={"recipe.json": "1" * 64, "zero2.json": "2" * 64}, config_error=None, init_error=None,
        data=ShardFacts("d" * 64, None, 100, 26, (), ()),
    )  # fmt: skip


def group(rank: int) -> GroupFacts:
    clocks = (Clock(1, 0.002, 0.0001, 0.0002),) if rank == 0 else ()
    wrote = (256 * 2**20, 0.5) if rank % 2 == 0 else (0, 0.0)
    return GroupFacts(rank, None, *wrote, 1000 * GIB, 0, 16, {}, 0.002, None, clocks)


def findings(**changes: Any) -> Findings:
    good = Findings(
        plan=plan(), ranks=4, hosts=("a", "b"), slots={"a": 2, "b": 2}, local=tuple(map(local, range(4))),
        group=tuple(map(group, range(4))), config=JSON, parameters=800_000_000,
    )  # fmt: skip
    return replace(good, **changes)


def on_b(**changes: Any) -> Findings:
    """What the ranks of the second host tell is another."""
    good = findings()
    return replace(good, local=tuple(replace(facts, **changes) if facts.node == 1 else facts for facts in good.local))


def together(rank: int, **changes: Any) -> Findings:
    """What one rank tells of the group is another."""
    good = findings()
    return replace(
        good, group=tuple(replace(facts, **changes) if facts.rank == rank else facts for facts in good.group)
    )


Check = Callable[[Findings], list[Row]]


def only(check: Check, found: Findings, status: str, *words: str) -> Row:
    """The single row that a check gives, which has this status and these words in it."""
    rows = check(found)
    bad = [row for row in rows if row.status != "green"] if status != "green" else rows
    assert [row.status for row in bad] == [status], rows
    text = f"{bad[0].seen} | {bad[0].remedy}"
    for word in words:
        assert word in text, text
    assert status == "green" or bad[0].remedy
    return bad[0]
