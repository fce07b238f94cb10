"""Judging the arithmetic of batches, the DeepSpeed JSON, and the hosts' limits and variables."""

from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.loader import LaneOrder
from data_pipeline.manifest import load_manifest
from t2i.doctor.findings import Findings, Row, differing, gib, names

OPEN_FILES = 512
"""Files that a rank may have open: 256 shards at most (`data_pipeline.shard_set`), as many sockets to other ranks and files of
libraries."""
SHM_YELLOW, SHM_RED = 2**30, 2**26
"""Bytes of /dev/shm, over which NCCL moves data between the ranks of a host; the latter is what containers have by default."""
LOCKED = 2**30
"""Bytes of memory that a process must be able to lock: InfiniBand's buffers, and what offloading pins."""
BUCKET_SHARE = 0.1
"""Share of a GPU's memory for communication buckets that is worth a look."""


def batches(f: Findings) -> list[Row]:
    """Batch, lanes, ranks."""
    micro, accumulation = f.config.get("train_micro_batch_size_per_gpu"), f.config.get("gradient_accumulation_steps", 1)
    if not (isinstance(micro, int) and isinstance(accumulation, int) and min(micro, accumulation) > 0):
        return []  # the DeepSpeed JSON has a line of its own
    data, batch = f.plan.recipe.data, micro * accumulation * f.ranks
    terms = f"micro-batch {micro} x accumulation {accumulation} x {f.ranks} ranks = batch {batch}, {data.lanes} lanes"
    try:
        samples = load_manifest(data.path).samples - data.validation
    except (ValueError, OSError):
        samples = data.lanes  # how the set is seen has lines of its own
    if samples < data.lanes:
        remedy = "set data.lanes or data.validation lower, or add samples"
        return [Row("red", "batch, lanes, ranks", f"{samples} samples to train on, for {data.lanes} lanes", remedy)]
    try:
        LaneOrder(0, samples, data.lanes).check(batch, f.ranks)
    except ValueError as error:
        return [
            Row(
                "red",
                "batch, lanes, ranks",
                f"{terms}: {error}",
                remedy_for_batch(micro, accumulation, f.ranks, data.lanes),
            )
        ]
    return [
        Row(
            "green",
            "batch, lanes, ranks",
            f"{terms}: {batch // data.lanes} of each lane, {data.lanes // f.ranks} lanes a rank",
        )
    ]


def remedy_for_batch(micro: int, accumulation: int, ranks: int, lanes: int) -> str:
    """The nearest micro-batch, accumulation and lanes, each of which fits the rest; lanes always exist."""
    batch, ways = micro * accumulation * ranks, []
    if lanes % ranks == 0:
        fitting = [m for m in range(1, micro + lanes + 1) if m * accumulation * ranks % lanes == 0]
        best = min(fitting, key=lambda m: abs(m - micro))
        ways.append(f"train_micro_batch_size_per_gpu {best} (batch {best * accumulation * ranks})")
        fitting = [a for a in range(1, accumulation + lanes + 1) if micro * a * ranks % lanes == 0]
        best = min(fitting, key=lambda a: abs(a - accumulation))
        ways.append(f"gradient_accumulation_steps {best} (batch {micro * best * ranks})")
    fitting = [ranks * n for n in range(1, batch // ranks + 1) if batch % (ranks * n) == 0]
    ways.append(f"--data.lanes {min(fitting, key=lambda n: abs(n - lanes))} for a run that has not begun")
    return ", or ".join(ways)


def deepspeed_json(f: Findings) -> list[Row]:
    """What stops training, and known pitfalls."""
    path = f.plan.deepspeed_config
    for facts in f.local:
        if facts.config_error is not None:
            return [
                Row(
                    "red", "DeepSpeed JSON", facts.config_error, "as it says; training would stop with the same message"
                )
            ]
    rows = [Row("red" if fatal else "yellow", "DeepSpeed JSON", seen, remedy) for fatal, seen, remedy in pitfalls(f)]
    return rows or ([Row("green", "DeepSpeed JSON", f"{path}: none of the known pitfalls")] if f.local else [])


def pitfalls(f: Findings) -> list[tuple[bool, str, str]]:
    """(whether training fails, what is there, what to do) for each known pitfall of DeepSpeed 0.19."""
    config, found = f.config, []
    zero: dict[str, Any] = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    on = {name: bool(config.get(name, {}).get("enabled")) for name in ("bf16", "fp16", "comms_logger")}
    devices = [facts.device for facts in f.local]
    gpus = bool(devices) and all(device.kind != "cpu" for device in devices)
    offloads = [
        name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device", "none") != "none"
    ]
    if on["bf16"] and on["fp16"]:
        found.append((True, "bf16 and fp16 are both enabled", "leave one; bf16 wherever the GPU has it"))
    elif on["fp16"] and gpus and all(device.bf16 for device in devices):
        found.append(
            (
                False,
                "fp16 on GPUs that have bf16",
                'write "bf16": {"enabled": true} in its place: no loss scale, no overflows',
            )
        )
    if on["bf16"] and gpus and not all(device.bf16 for device in devices):
        lacking = names(device.name for device in devices if not device.bf16)
        found.append((False, f"bf16 on {lacking}, which only emulates it", "use fp16 there, or newer GPUs"))
    if gpus and not on["bf16"] and not on["fp16"]:
        found.append((False, "neither bf16 nor fp16: trains in float32", 'write "bf16": {"enabled": true}'))
    if not config.get("gradient_clipping"):
        found.append(
            (False, "no gradient_clipping: one bad batch can spoil the weights", 'write "gradient_clipping": 1.0')
        )
    if stage == 3 and f.ranks == 1:
        found.append((False, "stage 3 on one rank: nothing to share, and it costs time", "use stage 1"))
    if "offload_param" in offloads and stage != 3:
        found.append(
            (False, f"offload_param at stage {stage}, which only stage 3 takes notice of", "remove it or set stage 3")
        )
    if offloads and config.get("zero_force_ds_cpu_optimizer", True):
        found.append(
            (True, f"{' and '.join(offloads)} without \"zero_force_ds_cpu_optimizer\": false, and the optimizer is torch's",
             'write "zero_force_ds_cpu_optimizer": false')
        )  # fmt: skip
    if offloads and devices and not gpus:
        found.append((False, f"{' and '.join(offloads)} to a processor from processors", "remove it"))
    locked = [facts for facts in f.local if 0 <= facts.locked_memory < LOCKED]
    if locked and any(zero[name].get("pin_memory") for name in offloads):
        found.append(
            (False, f"pin_memory, and {names(f.host(facts.node) for facts in locked)} may lock {gib(locked[0].locked_memory)}",
             "set memlock to unlimited there (/etc/security/limits.conf, or ulimits of the container), or pin_memory false")
        )  # fmt: skip
    if gpus and (share := _buckets(zero, stage) / min(device.memory for device in devices)) > BUCKET_SHARE:
        found.append(
            (False, f"communication buckets take {share:.0%} of a GPU's memory",
             "set reduce_bucket_size and allgather_bucket_size lower than the default 5e8, such as 1e8")
        )  # fmt: skip
    if config.get("wall_clock_breakdown"):
        found.append((False, "wall_clock_breakdown waits for the GPU at every timer", "remove it after measuring"))
    if on["comms_logger"]:
        found.append((False, "comms_logger waits for the GPU at every operation", "remove it after measuring"))
    return found


def _buckets(zero: dict[str, Any], stage: int) -> float:
    """Bytes of 16-bit buckets on a GPU: a second one where communication overlaps, and one for gathering weights."""
    double = 2 if zero.get("overlap_comm", stage == 3) else 1
    gathered = zero.get("stage3_prefetch_bucket_size", 5e7) if stage == 3 else zero.get("allgather_bucket_size", 5e8)
    return 2 * (double * float(zero.get("reduce_bucket_size", 5e8)) + float(gathered))


def limits(f: Findings) -> list[Row]:
    """Threads, shared memory, open files, locked memory; one line where all is well."""
    rows = []
    for host, facts in f.by_host(lambda facts: facts).items():
        gpu = facts.device.kind != "cpu"
        # On processors training sets its own number of threads.
        threads = int(facts.variables.get("OMP_NUM_THREADS") or facts.cores) if gpu else 1
        if threads * facts.local_ranks > facts.cores:
            seen = f"{host}: {facts.local_ranks} ranks x {threads} threads on {facts.cores} cores"
            best = facts.cores // facts.local_ranks
            remedy = f"set OMP_NUM_THREADS={best}" if gpu and best else "start fewer ranks there"
            rows.append(Row("yellow", "threads", seen, remedy))
        if gpu and facts.local_ranks > 1 and facts.shm_free < SHM_YELLOW:
            rows.append(
                Row("red" if facts.shm_total <= SHM_RED else "yellow", "/dev/shm",
                    f"{host}: {gib(facts.shm_free)} free of {gib(facts.shm_total)}",
                    "start the container with --shm-size=8g or --ipc=host, or remove what fills it")
            )  # fmt: skip
        if 0 <= facts.open_files < OPEN_FILES:
            rows.append(
                Row("red", "open files", f"{host}: at most {facts.open_files} a process (ulimit -n), {OPEN_FILES} may be used",
                    "ulimit -n 65536 before starting, or nofile in /etc/security/limits.conf")
            )  # fmt: skip
        if facts.infiniband and 0 <= facts.locked_memory < LOCKED:
            rows.append(
                Row("yellow", "locked memory", f"{host}: at most {gib(facts.locked_memory)} (ulimit -l), with InfiniBand",
                    "set memlock to unlimited (/etc/security/limits.conf, or ulimits of the container)")
            )  # fmt: skip
    if not rows and f.local:
        rows.append(Row("green", "limits", "threads, /dev/shm, open files and locked memory suffice"))
    return rows


def variables(f: Findings) -> list[Row]:
    """The same network settings on all hosts."""
    rows = []
    found = f.by_host(lambda facts: facts.variables)
    for name in sorted({name for values in found.values() for name in values} - {"OMP_NUM_THREADS"}):
        if odd := differing({host: values.get(name, "not set") for host, values in found.items()}):
            rows.append(
                Row(
                    "yellow",
                    "variables",
                    f"{name}: {odd}",
                    "write it into .deepspeed_env, which the launcher takes to all hosts",
                )
            )
    if not rows and f.local:
        rows.append(Row("green", "variables", "those of NCCL, Gloo and UCX are the same on all hosts"))
    return rows


CHECKS: Sequence[Callable[[Findings], list[Row]]] = (batches, deepspeed_json, limits, variables)
