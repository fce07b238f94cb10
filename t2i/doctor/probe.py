"""The probe on every rank: `deepspeed --module t2i.doctor.probe PLAN`, as `t2i doctor` starts it.

Each rank tells what it knows before it meets the others, so that it is known if it never does. Besides `t2i.engine` and
`t2i.monitor` this is the one module that knows torch.distributed.
"""

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data_pipeline.shard_set import ShardSet
from t2i import run_checks
from t2i.checkpoint import newest
from t2i.doctor.facts import JOINING, Clock, GroupFacts, Plan, send, unpack
from t2i.doctor.folder import RunFolder
from t2i.doctor.local import gather_local, this_device
from t2i.engine import Runtime, read_deepspeed_config, start_runtime, stop_runtime

SIZES = (1, 1000, 2**18 + 1, 2**22)
"""Numbers of the all-reduces whose sums are looked at."""
TURNS = 20
REPEATS = 5


def main() -> int:
    """Probe what the plan, the last argument, says; returns the exit code."""
    plan: Plan = unpack(Plan, sys.argv[-1])  # the launcher puts --local_rank before it
    rank = int(os.environ.get("RANK", 0))
    deadline = threading.Timer(plan.timeout, os._exit, [1])  # nobody can end it from another host
    deadline.daemon = True
    deadline.start()
    try:
        probe(plan, rank)
    except Exception as error:
        send(rank, "error", f"{type(error).__name__}: {error}")
        raise
    return 0


def probe(plan: Plan, rank: int) -> None:
    """Gather and send the facts of a rank."""
    send(rank, "stage", "looking at its own host and shards")
    config_error = None
    try:
        read_deepspeed_config(plan.deepspeed_config)
    except ValueError as error:
        config_error = str(error)
    send(rank, "local", gather_local(plan, this_device(get_accelerator().device_name()), config_error, os.environ))
    send(rank, "stage", JOINING)
    runtime = start_runtime()
    dist.barrier()
    send(rank, "stage", "comparing clocks")
    clocks = compare_clocks(runtime, int(os.environ.get("CROSS_RANK", 0)))
    send(rank, "stage", "writing to the run folder")
    folder = RunFolder(plan)
    problem = _agree(folder.enter if runtime.is_first else lambda: None) or folder.join(rank)
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    dist.barrier()
    written, seconds = 0, 0.0
    if first_here and problem is None:
        try:
            written, seconds = folder.write(rank)
        except OSError as error:
            problem = f"{plan.recipe.run_dir} cannot be written: {error}"
    free, kept = folder.space()
    dist.barrier()
    folder.leave(rank)
    dist.barrier()
    if runtime.is_first:
        folder.remove()
    send(rank, "stage", "adding up over all ranks")
    wrong = wrong_sums(runtime)
    reduce_seconds = time_all_reduce(runtime, plan.reduce_bytes)
    set_error = None
    if runtime.is_first:
        send(rank, "stage", "reading set, tokenizer and text encoder as training does")
        set_error = check_inputs(plan)
    send(
        rank, "group",
        GroupFacts(
            rank, problem, written, seconds, free, kept, len(SIZES) * len(_dtypes(runtime)), wrong, reduce_seconds,
            set_error, tuple(clocks),
        ),
    )  # fmt: skip
    send(rank, "stage", "waiting for the others to end")
    dist.barrier()
    stop_runtime()
    send(rank, "stage", "done")


def _agree(action: Callable[[], str | None]) -> str | None:
    """The answer of the first rank, on all."""
    answer = [action()]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def check_inputs(plan: Plan) -> str | None:
    """Why a run of the recipe would be refused, besides what ranks and batches have to do with."""
    recipe = plan.recipe
    try:
        shards = ShardSet(recipe.data.path)
        inputs = run_checks.inputs_of(recipe, shards)
        if (found := newest(recipe.run_dir)) is not None:
            run_checks.check_resumable(recipe, inputs, found)
        run_checks.check_data(recipe, shards, inputs)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def compare_clocks(runtime: Runtime, node: int) -> list[Clock]:
    """On the first rank, the clock of each other host; by asking for the time, and taking the fastest answer (Cristian
    1989, "Probabilistic clock synchronization")."""
    places: list[tuple[int, int]] = [(0, 0)] * runtime.ranks
    dist.all_gather_object(places, (node, int(os.environ.get("LOCAL_RANK", 0))))
    peers = [rank for rank, (other, local) in enumerate(places) if local == 0 and other != places[0][0]]
    clocks = []
    for peer in peers:
        if runtime.is_first:
            clocks.append(ask_the_time(runtime, peer, places[peer][0]))
        elif runtime.rank == peer:
            tell_the_time(runtime)
    dist.barrier()
    return clocks


def ask_the_time(runtime: Runtime, peer: int, node: int) -> Clock:
    """The clock of `peer`, which calls `tell_the_time`."""
    best: Clock | None = None
    for turn in range(TURNS + 1):
        told = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        begun = time.time()
        dist.send(told, peer)
        dist.recv(told, peer)
        answer = float(told)
        took = time.time() - begun
        # The first turn makes the connection.
        if turn and (best is None or took < best.round_trip):
            best = Clock(node, answer - (begun + took / 2), took / 2, took)
    assert best is not None
    return best


def tell_the_time(runtime: Runtime) -> None:
    """Answer the first rank's `ask_the_time`."""
    for _ in range(TURNS + 1):
        asked = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        dist.recv(asked, 0)
        float(asked)  # on a GPU, until it is there
        dist.send(torch.full_like(asked, time.time()), 0)


def _dtypes(runtime: Runtime) -> tuple[torch.dtype, ...]:
    half = (torch.float16,) if runtime.device.type == "cuda" else ()
    return (torch.float32, torch.bfloat16, *half, torch.int64)


def pattern(rank: int, size: int) -> torch.Tensor:
    """What a rank adds, int64 [size]: -1, 0 and 1 in turn, and on the first rank 1 more. Partial sums of hundreds of ranks
    are exact in 16 bits."""
    return (torch.arange(size) + rank) % 3 - 1 + (rank == 0)


def expected_sum(ranks: int, size: int) -> torch.Tensor:
    """The sum of `pattern` over ranks 0 to `ranks` - 1."""
    one_period = sum((pattern(rank, 3) for rank in range(ranks)), torch.zeros(3, dtype=torch.int64))
    return one_period[torch.arange(size) % 3]


def wrong_sums(runtime: Runtime) -> dict[str, int]:
    """Of all-reduces of several sizes and types, how many numbers are not what they must be on this rank."""
    wrong = {}
    for dtype in _dtypes(runtime):
        for size in SIZES:
            values = pattern(runtime.rank, size).to(runtime.device, dtype)
            dist.all_reduce(values)
            count = int((values.to("cpu", torch.float64) != expected_sum(runtime.ranks, size)).sum())
            if count:
                wrong[f"{size:,} numbers of {str(dtype).removeprefix('torch.')}"] = count
    return wrong


def time_all_reduce(runtime: Runtime, size: int) -> float:
    """Median seconds of an all-reduce of `size` bytes of float32, of several, each as long as on the slowest rank."""
    values = torch.zeros(max(1, size // 4), device=runtime.device)
    seconds = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(values)
        float(values[0])  # on a GPU, until it is done
        longest = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=runtime.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        seconds.append(float(longest))
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
