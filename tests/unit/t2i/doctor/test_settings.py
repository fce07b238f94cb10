from dataclasses import replace
from pathlib import Path

import pytest
from doctor_findings import GIB, GPU, JSON, findings, local, on_b, only
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loader import LaneOrder
from t2i.doctor import settings
from t2i.doctor.findings import Findings

ZERO = {"stage": 2}


def with_json(**changes: object) -> Findings:
    return findings(config={**JSON, **changes})


def test_nothing_is_red_or_yellow_where_all_is_well() -> None:
    rows = [row for check in settings.CHECKS for row in check(findings())]
    assert {row.status for row in rows} == {"green"}, rows
    assert [row.check for row in rows] == ["batch, lanes, ranks", "DeepSpeed JSON", "limits", "variables"]


def test_the_batch_is_divisible_by_lanes_and_lanes_by_ranks() -> None:
    only(
        settings.batches,
        findings(),
        "green",
        "micro-batch 16 x accumulation 1 x 4 ranks = batch 64, 64 lanes: 1 of each",
    )
    wrong = with_json(train_micro_batch_size_per_gpu=10)
    only(settings.batches, wrong, "red", "global batch 40", "train_micro_batch_size_per_gpu 16 (batch 64)",
         "gradient_accumulation_steps 8 (batch 320)", "--data.lanes 40")  # fmt: skip
    row = only(settings.batches, findings(ranks=3), "red", "batch 48", "--data.lanes 48")
    assert "accumulation_steps" not in row.remedy  # no batch helps where ranks do not divide lanes
    assert settings.batches(findings(config={})) == []


def test_too_few_samples_for_the_lanes(encoded_shapes: Path) -> None:
    found = findings()
    data = replace(found.plan.recipe.data, path=encoded_shapes, validation=90)
    few = replace(found, plan=replace(found.plan, recipe=replace(found.plan.recipe, data=data)))
    only(settings.batches, few, "red", "6 samples to train on, for 64 lanes", "data.validation lower")


@given(micro=st.integers(1, 40), accumulation=st.integers(1, 9), ranks=st.integers(1, 33), lanes=st.integers(1, 130))
def test_each_remedy_is_one(micro: int, accumulation: int, ranks: int, lanes: int) -> None:
    ways = settings.remedy_for_batch(micro, accumulation, ranks, lanes).split(", or ")
    assert len(ways) == (3 if lanes % ranks == 0 else 1)
    for way in ways:
        name, number = way.split()[:2]
        values = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "--data.lanes": lanes,
        }
        values[name] = int(number)
        new_micro, new_accumulation, new_lanes = values.values()
        LaneOrder(0, 10**6, new_lanes).check(new_micro * new_accumulation * ranks, ranks)


def test_what_training_would_refuse_is_red() -> None:
    only(settings.deepspeed_json, on_b(config_error="zero.json sets ZeRO stage 0; use 1, 2 or 3"), "red", "stage 0")


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"fp16": {"enabled": True}}, "red", "both"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "yellow", "fp16 on GPUs that have bf16"),
        ({"bf16": {}}, "yellow", "float32"),
        ({"gradient_clipping": 0}, "yellow", "gradient_clipping"),
        ({"zero_optimization": ZERO | {"offload_param": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, "yellow",
         "only stage 3"),
        ({"zero_optimization": ZERO | {"offload_optimizer": {"device": "cpu"}}}, "red", "zero_force_ds_cpu_optimizer"),
        ({"wall_clock_breakdown": True}, "yellow", "wall_clock_breakdown"),
        ({"comms_logger": {"enabled": True}}, "yellow", "comms_logger"),
        ({"zero_optimization": ZERO | {"reduce_bucket_size": 5e9}}, "yellow", "13% of a GPU's memory"),
    ],
)  # fmt: skip
def test_pitfalls(changes: dict[str, object], status: str, words: str) -> None:
    only(settings.deepspeed_json, with_json(**changes), status, words)


def test_pitfalls_that_depend_on_ranks_and_devices() -> None:
    only(
        settings.deepspeed_json,
        replace(with_json(zero_optimization={"stage": 3}), ranks=1),
        "yellow",
        "stage 3 on one rank",
    )
    only(settings.deepspeed_json, on_b(device=replace(GPU, name="V100", bf16=False)), "yellow", "bf16 on V100")
    only(settings.deepspeed_json, on_b(device=replace(GPU, memory=24 * GIB)), "yellow", "12% of a GPU's memory")
    offload = {
        "zero_optimization": ZERO | {"offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    assert settings.pitfalls(with_json(**offload)) == []
    short = replace(with_json(**offload), local=on_b(locked_memory=2**23).local)
    only(settings.deepspeed_json, short, "yellow", "pin_memory, and b may lock 8.0 MiB", "memlock")
    cpus = tuple(replace(local(rank), device=replace(GPU, kind="cpu")) for rank in range(4))
    only(settings.deepspeed_json, replace(with_json(**offload), local=cpus), "yellow", "from processors")


def test_shipped_configurations_have_no_pitfalls_on_gpus() -> None:
    import json

    for path in (Path(__file__).parents[4] / "deepspeed_configs").glob("zero*.json"):
        assert settings.pitfalls(findings(config=json.loads(path.read_text()))) == [], path


def test_limits() -> None:
    only(settings.limits, on_b(cores=8), "yellow", "b: 2 ranks x 8 threads on 8 cores", "OMP_NUM_THREADS=4")
    only(settings.limits, on_b(variables={}), "yellow", "b: 2 ranks x 64 threads on 64 cores", "OMP_NUM_THREADS=32")
    only(
        settings.limits,
        on_b(cores=1, device=replace(GPU, kind="cpu")),
        "yellow",
        "b: 2 ranks x 1 threads",
        "fewer ranks",
    )
    only(settings.limits, on_b(shm_total=2**26, shm_free=2**26), "red", "b: 64.0 MiB free of 64.0 MiB", "--shm-size")
    only(settings.limits, on_b(shm_free=2**29), "yellow", "b: 512.0 MiB free of 64.0 GiB")
    only(settings.limits, on_b(open_files=256), "red", "b: at most 256 a process", "ulimit -n")
    only(settings.limits, on_b(locked_memory=65536), "yellow", "b: at most 0.1 MiB", "memlock")
    assert settings.limits(on_b(locked_memory=65536, infiniband=False))[0].status == "green"
    assert settings.limits(on_b(shm_free=0, local_ranks=1))[0].status == "green"


def test_variables_that_differ_are_named() -> None:
    only(settings.variables, on_b(variables={"NCCL_DEBUG": "INFO"}), "yellow", "NCCL_DEBUG: WARN on a; INFO on b")
    only(settings.variables, on_b(variables={}), "yellow", "NCCL_DEBUG: WARN on a; not set on b", ".deepspeed_env")
