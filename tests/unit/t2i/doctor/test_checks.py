from dataclasses import replace

import pytest
import torch
from doctor_findings import GIB, GPU, JSON, findings, group, local, on_b, only, plan, together

from t2i.doctor import checks
from t2i.doctor.facts import Clock, ShardFacts
from t2i.engine import Engine

SIZE = 800_000_000 * (2 + 3 * 4)
"""Bytes of a checkpoint of these findings, at ZeRO 2 in bf16 and without an average."""


def test_nothing_is_red_or_yellow_where_all_is_well() -> None:
    rows = [row for check in checks.CHECKS for row in check(findings())]
    assert {row.status for row in rows} == {"green"}, rows
    assert {row.check for row in rows} == {
        "versions", "files", "devices", "clocks", "shards", "recipe and set", "run folder", "write speed", "free space",
        "memory for saving", "all-reduce", "all-reduce speed",
    }  # fmt: skip


def test_nothing_is_said_of_what_nobody_told() -> None:
    rows = [row for check in checks.CHECKS for row in check(findings(group=()))]
    assert {row.check for row in rows} == {"versions", "files", "devices", "shards"}


def test_another_version_is_red_and_names_package_and_hosts() -> None:
    versions = local(0).versions
    only(
        checks.versions, on_b(versions=versions | {"deepspeed": "0.19.7"}), "red", "deepspeed: 0.19.8 on a; 0.19.7 on b"
    )
    only(checks.versions, on_b(versions=versions | {"source files": "xyz"}), "red", "abc on a; xyz on b", "commit")
    only(checks.versions, on_b(versions=versions | {"NCCL": "2.29"}), "red", "none on a; 2.29 on b")
    only(checks.versions, on_b(versions=versions | {"driver": "550"}), "yellow", "570 on a; 550 on b")


def test_files_have_to_be_there_and_alike() -> None:
    files = local(0).files
    only(
        checks.files,
        on_b(files=files | {"zero2.json": "3" * 64}),
        "red",
        "zero2.json: 222222222222 on a; 333333333333 on b",
    )
    absent = on_b(files=files | {"recipe.json": "cannot be read: No such file or directory"})
    only(checks.files, absent, "red", "recipe.json cannot be read: No such file or directory on b", "copy it there")
    only(checks.files, on_b(init_error="runs/x (train.init_from) is no folder here"), "red", "train.init_from", "b")


def test_devices_of_one_kind_and_enough_of_them() -> None:
    only(checks.devices, on_b(device=replace(GPU, name="A100")), "yellow", "H100, 80.0 GiB on a; A100, 80.0 GiB on b")
    only(checks.devices, on_b(device=replace(GPU, count=1)), "red", "b has 1 for 2 ranks", "slots=1")
    rows = checks.devices(on_b(device=replace(GPU, kind="cpu", name="cpu", memory=0)))
    assert [row.status for row in rows] == ["yellow", "red"]
    assert "cuda on a; cpu on b" in rows[1].seen


@pytest.mark.parametrize(
    ("offset", "uncertainty", "status"),
    [(0.9, 0.0, "green"), (1.2, 0.5, "green"), (-1.2, 0.1, "yellow"), (29, 0.1, "yellow"), (31, 0.1, "red"), (-3600, 9, "red")],
)  # fmt: skip
def test_clocks(offset: float, uncertainty: float, status: str) -> None:
    found = together(0, clocks=(Clock(1, offset, uncertainty, 2 * uncertainty),))
    row = only(checks.clocks, found, status)
    if status != "green":
        assert f"b is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} a" in row.seen


def test_one_host_has_one_clock() -> None:
    only(checks.clocks, together(0, clocks=()), "green", "one host")


def test_shards_that_a_host_does_not_see_are_named_once() -> None:
    gone = ShardFacts(None, "shard 000007.tar of /no/set is gone", 0, 0, ("000007.tar", "000008.tar"), ())
    only(
        checks.shards,
        on_b(data=gone),
        "red",
        "on b: shard 000007.tar",
        "000007.tar, 000008.tar",
        "copy or mount /no/set",
    )
    unreadable = replace(local(0).data, unreadable=("000003.tar: Input/output error",))
    only(checks.shards, on_b(data=unreadable), "red", "rank 2 on b cannot read 000003.tar: Input/output error")
    other = replace(local(0).data, digest="e" * 64)
    only(checks.shards, on_b(data=other), "red", "dddddddddddd on a; eeeeeeeeeeee on b")


def test_inputs_that_do_not_fit_are_said_once() -> None:
    only(checks.inputs, together(0, set_error="was encoded with grid [16, 16]"), "red", "grid [16, 16]")
    gone = findings(local=(replace(local(0), data=ShardFacts(None, "gone", 0, 0, (), ())),))
    assert checks.inputs(replace(gone, group=(replace(group(0), set_error="gone"),))) == []


def test_the_run_folder_has_to_be_one_and_writable() -> None:
    shared = together(2, folder_error="runs/x is not the folder that the first rank sees: no .doctor-1 in it")
    only(checks.run_folder, shared, "red", "on b: runs/x is not the folder", "NFS")
    only(checks.run_folder, together(0, folder_error="runs/x cannot be written: denied"), "red", "on a", "permission")
    assert checks.saving(shared) == []


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_is_as_large_as_the_engine_says(stage: int, half: bool, averaged: bool) -> None:
    engine = Engine.__new__(Engine)
    engine.n_parameters, engine.stage, engine.dtype = 800_000_000, stage, torch.bfloat16 if half else torch.float32
    config = JSON | {"bf16": {"enabled": half}, "zero_optimization": {"stage": stage}}
    found = findings(plan=plan(ema_decay=0.9 if averaged else 0.0), config=config)
    assert f"a checkpoint of {checks.gib(engine.checkpoint_bytes(averaged))} takes" in checks.saving(found)[0].seen


def test_a_json_whose_sections_are_none_is_taken_for_fp32_and_whole_weights() -> None:
    found = findings(config={"bf16": True, "zero_optimization": {"stage": "auto"}})
    assert "a checkpoint of 11.9 GiB takes" in checks.saving(found)[0].seen
    assert all(row.status == "green" for row in checks.all_reduce(found))


def test_write_speed_is_that_of_all_hosts_together() -> None:
    row = checks.saving(findings())[0]
    assert (row.check, row.status) == ("write speed", "green")
    assert "1.0 GiB/s from 2 hosts at once; a checkpoint of 10.4 GiB takes about 10.4 s" in row.seen
    slow = findings(
        group=tuple(replace(group(rank), write_seconds=20.0 if rank % 2 == 0 else 0.0) for rank in range(4))
    )
    row = checks.saving(slow)[0]
    assert row.status == "yellow"
    assert "background_save" in row.remedy


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("watchdog", "status"), [(1800.0, "red"), (2100.0, "yellow"), (0.0, "yellow")], ids=["less", "more", "none"]
)
def test_a_save_may_take_as_long_as_the_watchdog_waits(background: bool, watchdog: float, status: str) -> None:
    wrote = tuple(replace(group(rank), write_seconds=100.0 if rank % 2 == 0 else 0.0) for rank in range(4))
    made = plan(watchdog_seconds=watchdog, background_save=background)
    row = checks.saving(findings(plan=made, group=wrote))[0]
    assert (row.check, row.status) == ("write speed", status)
    assert "takes about 35 min" in row.seen
    if status == "red":
        assert "train.watchdog_seconds 1800 ends a run that waits longer" in row.seen
        assert "set train.watchdog_seconds above 2,086 (0: no limit)" in row.remedy


def test_free_space_against_the_checkpoints_that_are_kept() -> None:
    size = SIZE

    def space(free: int, kept: int = 0, **train: int) -> str:
        found = findings(
            plan=plan(**train), group=tuple(replace(group(rank), free=free, kept=kept) for rank in range(4))
        )
        return next(row.status for row in checks.saving(found) if row.check == "free space")

    assert space(3 * size) == "green"
    assert space(3 * size - 1) == "red"
    assert space(size, kept=2 * size) == "green"
    assert space(5 * size - 1, keep_last=4) == "red"
    assert space(3 * size, keep_every=500, steps=1000) == "yellow"
    assert space(5 * size, keep_every=500, steps=1000) == "green"


def test_memory_for_the_copy_that_is_written_in_the_background() -> None:
    size = SIZE
    short = on_b(memory=size // 2 - 1)
    only(checks.saving, short, "red", "b has", "background_save False")
    assert all(row.status == "green" for row in checks.saving(on_b(memory=size // 2)))
    assert all(
        row.check != "memory for saving" for row in checks.saving(replace(short, plan=plan(background_save=False)))
    )


def test_wrong_sums_are_red_with_rank_and_host() -> None:
    found = together(3, wrong_sums={"1,000 numbers of bfloat16": 7})
    only(
        checks.all_reduce,
        found,
        "red",
        "wrong sums on 1 ranks (b)",
        "rank 3: 7 of 1,000 numbers of bfloat16",
        "do not train",
    )


def test_bandwidth_of_algorithm_and_bus() -> None:
    row = checks.all_reduce(findings())[1]
    assert "algorithm 33.55 GB/s, bus 50.33 GB/s" in row.seen  # 64 MiB in 2 ms; 2 (n - 1) / n of it, n = 4
    assert "1.5 GiB of gradients take about 47.7 ms" in row.seen
    slow = findings(group=tuple(replace(group(rank), reduce_seconds=0.2) for rank in range(4)))
    only(checks.all_reduce, slow, "yellow", "NCCL_SOCKET_IFNAME")
    alone = replace(slow, local=tuple(replace(facts, node=0) for facts in slow.local), hosts=("a",))
    only(checks.all_reduce, alone, "yellow", "gradient_accumulation_steps")
    assert [row.check for row in checks.all_reduce(findings(ranks=1))] == ["all-reduce"]


def test_sizes_are_readable() -> None:
    assert checks.gib(3 * GIB) == "3.0 GiB"
    assert checks.gib(2**20) == "1.0 MiB"
