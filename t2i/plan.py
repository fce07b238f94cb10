"""What a run will take before any GPU is asked: memory, traffic, time, disk, and the DeepSpeed JSON to start it with.

    t2i plan nar-xl-256 --nodes 16 --gpus-per-node 8 --gpu h100

All of it follows from the recipe and the cluster by arithmetic (`t2i.costs`, `t2i.memory`), so it takes no torch and no GPU.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.manifest import MANIFEST, load_manifest
from t2i.config import Recipe
from t2i.costs import GPU, GPUS, checkpoint_bytes, parameters, training_flops_per_sample
from t2i.memory import Arrangement, Memory, memory

ALLOWANCE = 0.08
"""Of a GPU's memory: what CUDA, NCCL and an allocator's fragments may take of it. No plan fills it to the brim."""
USUAL_CAPTION = 40
"""Tokens of the longest caption of a micro-batch, where nobody knows better."""
SHARD_SAMPLES = 1000
"""Of a shard, as `t2i data ingest` makes them, where the data is not there yet."""
WAYS = {
    "ZeRO 1": (1, ()),
    "ZeRO 2": (2, ()),
    "ZeRO 2, optimizer off": (2, ("offload_optimizer",)),
    "ZeRO 3": (3, ()),
    "ZeRO 3, optimizer off": (3, ("offload_optimizer",)),
    "ZeRO 3, all off": (3, ("offload_optimizer", "offload_param")),
}
"""Ways to run, with their ZeRO stage and what is offloaded to the processor, from the one that waits the least to the one that
takes the least of a GPU's memory."""


@dataclass(frozen=True)
class Cluster:
    """Where a run is to take place. Raises ValueError for a GPU that is not known, and numbers that cannot be."""

    nodes: int
    gpus_per_node: int
    gpu: str
    mfu: float = 0.4
    """Share of the GPUs' peak that the model's FLOPs make use of."""
    memory_gb: float | None = None
    """Of each GPU, in gigabytes of 10**9 bytes; the data sheet's when not given."""

    def __post_init__(self) -> None:
        if min(self.nodes, self.gpus_per_node) < 1:
            raise ValueError(f"{self.nodes} nodes of {self.gpus_per_node} GPUs are no cluster; give at least 1 of both")
        if self.gpu not in GPUS:
            raise ValueError(f"no GPU {self.gpu!r}; known are {', '.join(GPUS)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1 (0.4 is usual)")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ValueError(f"memory_gb is {self.memory_gb}; give what each GPU has, or leave it out")

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def model(self) -> GPU:
        """The data sheet."""
        return GPUS[self.gpu]

    @property
    def memory(self) -> int:
        """Of each GPU, in bytes."""
        return self.model.memory if self.memory_gb is None else int(self.memory_gb * 10**9)

    @property
    def usable(self) -> int:
        """What of that a run may take."""
        return int(self.memory * (1 - ALLOWANCE))


@dataclass(frozen=True)
class Way:
    """One way to run: what it takes of each GPU, the largest micro-batch that fits (0: none does), whatever the global batch,
    and the bytes that each GPU sends in a step."""

    name: str
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    memory: Memory
    fits: int
    traffic: int


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes, seconds and counts."""

    recipe: Recipe
    cluster: Cluster
    caption_tokens: int
    global_batch: int
    lanes: int
    """Of the data: the recipe's, or the fewest above it that the ranks and the batch allow."""
    micro_batch: int
    """For which the memory of every way is told."""
    ways: list[Way]
    recommended: str | None
    """Name of a way, None where no micro-batch fits."""
    checkpointing: bool
    """Whether the recommended way needs `train.activation_checkpointing`."""
    config: dict[str, Any] | None
    """The recommended DeepSpeed JSON."""
    steps: int
    tokens: int
    """That are predicted in the whole run."""
    flops_per_sample: int
    flops: int
    """Of the whole run: the model's."""
    seconds: float
    checkpoint_bytes: int
    samples: int | None
    shards: int | None
    epochs: float | None

    @property
    def seconds_per_step(self) -> float:
        """Of one optimizer step."""
        return self.seconds / self.steps


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    global_batch: int = 512,
    micro_batch: int | None = None,
    caption_tokens: int | None = None,
    samples: int | None = None,
    fp32: bool = False,
) -> Plan:
    """The plan of a recipe on a cluster.

    Args:
        recipe, cluster: What and where.
        global_batch: Samples of a step.
        micro_batch: For which memory is told; the recommended one, or where none fits 1, when not given.
        caption_tokens: Of the longest caption of a micro-batch, as it usually is, for FLOPs and time; memory is that of the
            longest captions that the recipe allows.
        samples: Of the data; those of `recipe.data.path` when not given, if that is there.
        fp32: In place of 16-bit weights and activations.

    Raises ValueError where batch and ranks do not fit together.
    """
    if caption_tokens is None:
        caption_tokens = min(USUAL_CAPTION, recipe.model.max_condition)
    _check(recipe, cluster, global_batch, micro_batch, caption_tokens, samples)
    lanes = lanes_for(recipe.data.lanes, global_batch, cluster.ranks)
    half = None if fp32 else cluster.model.half
    every = [(name, checkpointing) for checkpointing in (False, True) for name in WAYS]

    def config_of(name: str, size: int) -> dict[str, Any]:
        return deepspeed_config(name, size, global_batch // cluster.ranks // size, recipe, half)

    # Without computing anything twice, and without moving weights about, as long as something fits.
    chosen, config = None, None
    for name, checkpointing in every:
        sizes = [size for size in _divisors(global_batch // cluster.ranks) if micro_batch in (None, size)]
        for size in sizes:
            if needed(recipe, config_of(name, size), cluster, checkpointing).peak <= cluster.usable:
                chosen, config = (name, checkpointing), config_of(name, size)
        if chosen:
            break
    at = micro_batch or (1 if config is None else config["train_micro_batch_size_per_gpu"])
    ways = [
        Way(
            name, checkpointing, needed(recipe, config_of(name, at), cluster, checkpointing),
            largest_micro_batch(recipe, cluster, name, checkpointing, half),
            traffic(recipe, Arrangement.of(config_of(name, at)), cluster.ranks),
        )
        for name, checkpointing in every
    ]  # fmt: skip
    flops = training_flops_per_sample(recipe, caption_tokens)
    shards = None if samples is None else math.ceil(samples / SHARD_SAMPLES)
    if samples is None and (recipe.data.path / MANIFEST).is_file():
        manifest = load_manifest(recipe.data.path)
        shards, samples = len(manifest.shards), manifest.samples
        if samples - recipe.data.validation < lanes:
            raise ValueError(
                f"{recipe.data.path} has {samples} samples, {recipe.data.validation} of them for validation, too few for "
                f"{lanes} lanes; take fewer GPUs or more data"
            )
    steps = recipe.train.steps
    whole = flops * global_batch * steps
    stage = config["zero_optimization"]["stage"] if config else 3
    return Plan(
        recipe=recipe, cluster=cluster, caption_tokens=caption_tokens, global_batch=global_batch, lanes=lanes,
        micro_batch=at, ways=ways, recommended=chosen[0] if chosen else None,
        checkpointing=bool(chosen and chosen[1]), config=config, steps=steps,
        tokens=steps * global_batch * math.prod(recipe.model.grid), flops_per_sample=flops, flops=whole,
        seconds=whole / (cluster.ranks * cluster.model.flops * cluster.mfu),
        checkpoint_bytes=checkpoint_bytes(
            sum(parameters(recipe).values()), stage, 2 if half else 4, recipe.train.ema_decay > 0
        ),
        samples=samples, shards=shards,
        epochs=steps * global_batch / (samples - recipe.data.validation) if samples else None,
    )  # fmt: skip


def _check(
    recipe: Recipe, cluster: Cluster, batch: int, micro_batch: int | None, caption: int, samples: int | None
) -> None:
    if batch < 1 or batch % cluster.ranks:
        nearest = max(1, round(batch / cluster.ranks)) * cluster.ranks
        raise ValueError(f"global batch {batch} is not divisible by {cluster.ranks} GPUs; nearest: {nearest}")
    if micro_batch is not None and (micro_batch < 1 or batch // cluster.ranks % micro_batch):
        sizes = ", ".join(map(str, _divisors(batch // cluster.ranks)))
        raise ValueError(
            f"micro-batch {micro_batch} does not divide a rank's {batch // cluster.ranks} of {batch}; it may be {sizes}"
        )
    if not 1 <= caption <= recipe.model.max_condition and recipe.model.condition == "text":
        raise ValueError(
            f"captions of {caption} tokens are not within the 1 to {recipe.model.max_condition} of recipe {recipe.name}"
        )
    if samples is not None and samples <= recipe.data.validation:
        raise ValueError(f"{samples} samples leave none to train on: {recipe.data.validation} are for validation")


def lanes_for(lanes: int, batch: int, ranks: int) -> int:
    """Lanes of the data that ranks and batch allow (`data_pipeline.loader.LaneOrder.check`): as many as given, if that can be,
    else the fewest above, else the most below. A batch is divisible by the ranks."""
    possible = [number for number in _divisors(batch) if number % ranks == 0]
    above = [number for number in possible if number >= lanes]
    return above[0] if above else possible[-1]


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def largest_micro_batch(recipe: Recipe, cluster: Cluster, name: str, checkpointing: bool, half: str | None) -> int:
    """The largest micro-batch that fits one way to run, without accumulation, whatever the global batch; 0 where none does."""

    def fits(size: int) -> bool:
        config = deepspeed_config(name, size, 1, recipe, half)
        return needed(recipe, config, cluster, checkpointing).peak <= cluster.usable

    beyond = 1
    while fits(beyond):
        beyond *= 2
    largest = beyond // 2
    while beyond - largest > 1:
        middle = (largest + beyond) // 2
        largest, beyond = (middle, beyond) if fits(middle) else (largest, middle)
    return largest


def needed(recipe: Recipe, config: dict[str, Any], cluster: Cluster, checkpointing: bool) -> Memory:
    """Memory of a DeepSpeed JSON on a cluster, with the longest captions that the recipe allows."""
    recipe = replace(recipe, train=replace(recipe.train, activation_checkpointing=checkpointing))
    return memory(recipe, Arrangement.of(config), cluster.ranks, recipe.model.max_condition)


def deepspeed_config(
    name: str, micro_batch: int, accumulation: int, recipe: Recipe, half: str | None
) -> dict[str, Any]:
    """The DeepSpeed JSON of one way to run."""
    stage, offloads = WAYS[name]
    count = sum(parameters(recipe).values())
    # Some ten buckets, so that reducing the first begins long before the last gradient; none so small that latency counts.
    bucket = min(500_000_000, max(20_000_000, round(count / 10**8) * 10**7))
    zero: dict[str, Any] = {
        "stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }  # fmt: skip
    zero |= {offload: {"device": "cpu", "pin_memory": True} for offload in offloads}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_reuse_distance": 2 * bucket}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
    }
    if half:
        config[half] = {"enabled": True}
    if offloads:
        config["zero_force_ds_cpu_optimizer"] = False
    return config | {"zero_optimization": zero}


def traffic(recipe: Recipe, arrangement: Arrangement, ranks: int) -> int:
    """Bytes that each GPU sends in a step, all micro-batches together.

    At ZeRO 1 and 2 gradients are reduced in all-reduces, which DeepSpeed prefers (`use_multi_rank_bucket_allreduce`): twice
    their size; at 3 in reduce-scatters. Weights are gathered once a step, at ZeRO 3 once in each forward and backward pass.
    """
    size = sum(parameters(recipe).values()) * arrangement.item
    share, micro_batches = (ranks - 1) / ranks, arrangement.accumulation
    if arrangement.stage == 3:
        return int(share * size * 3 * micro_batches)
    reductions = micro_batches if arrangement.stage == 2 else 1
    return int(share * size * (2 * reductions + 1))


def config_json(config: dict[str, Any]) -> bytes:
    """A DeepSpeed JSON as it is written to a file."""
    return (json.dumps(config, indent=2) + "\n").encode()
