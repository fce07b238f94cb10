"""How much memory a rank needs to train a recipe, on paper: by kind, ZeRO stage and offload, at each moment of a step.

Pure arithmetic, importable without torch. What is counted is what the code keeps: `t2i.layers` and `t2i.heads` for
activations, DeepSpeed 0.19's stage_1_and_2.py and stage3.py for weights, gradients and their buffers. All sizes are in bytes.
Not in it: the process itself, CUDA and NCCL, what an allocator holds and does not use.

Symbols: B micro-batch, P prefix positions, N grid tokens, L = P + N - 1 sequence, C width, A axes, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from t2i.config import Recipe
from t2i.costs import Parameter, blocks, fused_width, parameter_list, prefix_length

LOSS_ROWS = 512
"""Of `t2i.heads`, which cannot be imported without torch."""

KINDS = ("weights", "gradients", "buffers", "master", "moments", "average", "activations", "logits", "working")
"""Kinds of memory. `buffers`: DeepSpeed's, to reduce gradients and gather weights; `master`: the fp32 weights that the
optimizer steps over; `moments`: Adam's; `average`: of the weights; `logits`: what the loss holds of them at once; `working`:
what a block's backward pass and a step hold in passing."""


@dataclass(frozen=True)
class Arrangement:
    """What of a DeepSpeed JSON decides on memory; sizes of buffers are in numbers, not bytes."""

    stage: int
    micro_batch: int
    accumulation: int
    half: bool
    """Whether weights and activations are bf16 or fp16."""
    offload_optimizer: bool
    offload_parameters: bool
    overlap: bool
    reduce_bucket: int
    prefetch_bucket: int
    reuse_distance: int
    persistence: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Arrangement":
        """That of a DeepSpeed JSON, with DeepSpeed's own values where it has none."""
        zero = config["zero_optimization"]

        def offloads(name: str) -> bool:
            return (zero.get(name) or {}).get("device", "none") != "none"

        return cls(
            stage=zero["stage"],
            micro_batch=config["train_micro_batch_size_per_gpu"],
            accumulation=config.get("gradient_accumulation_steps", 1),
            half=any(config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")),
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
            overlap=zero.get("overlap_comm", zero["stage"] == 3),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        )

    @property
    def item(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.half else 4


@dataclass(frozen=True)
class Memory:
    """What one rank holds at most: by moment of a step and kind, and what it holds in the processor's memory for offload."""

    moments: dict[str, dict[str, int]]
    offloaded: int

    @property
    def peak_moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """The most that is held at one moment."""
        return sum(self.moments[self.peak_moment].values())

    def largest(self, kind: str) -> int:
        """The most that is held of a kind, at any moment."""
        return max(moment.get(kind, 0) for moment in self.moments.values())


@dataclass(frozen=True)
class Activations:
    """What a micro-batch's forward pass keeps for the backward pass, and what both hold in passing."""

    prefix: int
    """Of the caption map, the text encoder, the token dropout and the attention mask, which all blocks share."""
    block: int
    """Of one block."""
    block_input: int
    """Of one block that is computed again."""
    block_working: int
    """While one block's backward pass runs."""
    heads: int
    """Of the heads, their input included."""
    heads_working: int
    logits: int
    head_gradient: int
    """Of the heads' weights, which the loss makes."""


def activations(recipe: Recipe, arrangement: Arrangement, caption_tokens: int, processor: bool = False) -> Activations:
    """Activations of one micro-batch. `processor`: as on a CPU, where norms and dropout keep other things than on a GPU."""
    model, item, batch = recipe.model, arrangement.item, arrangement.micro_batch
    width, hidden, fused = model.width, model.hidden, fused_width(model)
    grid = math.prod(model.grid)
    prefix = prefix_length(model, caption_tokens)
    length = prefix + grid - 1
    drops = model.dropout > 0
    # A GPU's norm keeps its input in fp32, its dropout a byte for each number; a processor's both as they are.
    kept, dropped = (item, item * drops) if processor else (4, drops)
    turned = 0 if processor or item == 4 or model.positions == "learned" else (fused + width) // 2
    per_token = (
        2 * width * kept  # inputs of the norms
        + (3 * width + fused + turned + 2 * hidden) * item  # what they make, queries to values, their mixture; gate, up
        + 2 * width * dropped
        + 4 * (model.n_head + 2)  # of the softmax and the norms, a number each
    )
    masked = model.order == "neighbor" or model.condition == "text"
    mask = length**2 * item * (batch if model.condition == "text" else 1) if masked else 0
    # Rows that do not begin at a multiple of 16 numbers are copied by a GPU's attention, for each block anew.
    padded = 0 if processor or length % 16 == 0 else mask
    before = batch * length * width * dropped + mask
    if model.condition == "text":
        before += batch * prefix * (model.condition_dim + 3 * width) * item
    if (encoder := recipe.text_encoder) is not None:
        scores = 3 * encoder.n_head * caption_tokens
        before += batch * caption_tokens * item * encoder.n_layer * (12 * encoder.dim + 2 * encoder.ffn_dim + scores)
    tokens = batch * length
    read = batch * grid * model.n_axes * width
    rows = min(LOSS_ROWS, batch * grid)
    return Activations(
        prefix=before,
        block=tokens * per_token + padded,
        block_input=tokens * width * item,
        block_working=tokens * item * (3 * width + max(4 * hidden, 4 * fused)),
        heads=tokens * width * item + read * (kept + item),
        heads_working=2 * read * item,
        # A part's logits and their exponentials, beside those of the part before.
        logits=rows * model.vocab_size * (12 if batch * grid > rows or arrangement.half else 8),
        head_gradient=4 * model.vocab_size * model.n_axes * width,
    )


def memory(
    recipe: Recipe, arrangement: Arrangement, ranks: int, caption_tokens: int, processor: bool = False
) -> Memory:
    """What each of `ranks` ranks needs. `processor`: as on a CPU, where buffers count as far as they are written to."""
    zero, item = arrangement, arrangement.item
    tensors = parameter_list(recipe)
    count = sum(p.size for p in tensors)
    share = math.ceil(count / ranks)
    decaying = sum(p.size for p in tensors if p.decays)
    largest_group = math.ceil(max(decaying, count - decaying) / ranks)
    held = activations(recipe, arrangement, caption_tokens, processor)
    whole = zero.stage == 3
    averaged = recipe.train.ema_decay > 0

    optimizer = {"master": 4 * share, "moments": 8 * share, "average": 4 * share * averaged}
    base = {"weights": item * (share if whole else count)} | optimizer
    own_gradients = item * (share if whole else _partition(tensors, ranks))
    offloaded = 0
    if zero.offload_optimizer:
        base |= dict.fromkeys(optimizer, 0)
        # There with fp32 gradients, and 16-bit weights or gradients on their way.
        offloaded += sum(optimizer.values()) + (4 + item) * share
        own_gradients = 0
    if whole:
        small = sum(p.size for p in tensors if p.size < zero.persistence)
        base["weights"] += item * small
        if zero.offload_parameters:
            offloaded += item * share
            base["weights"] -= item * share
        base["gradients"] = own_gradients
    gathers = whole and (ranks > 1 or zero.offload_parameters)
    # Weights stay until they are used again if that is not further away than the reuse distance, there and back.
    live = item * min(count, zero.reuse_distance // 2 + zero.prefetch_bucket) if gathers else 0
    on_the_way = item * min(count, zero.prefetch_bucket) if gathers else 0
    bucket, copies = item * zero.reduce_bucket, 2 if zero.overlap and not whole else 1
    waits = zero.stage == 1 and (not zero.overlap or zero.accumulation > 1)

    def moment(**kinds: int) -> dict[str, int]:
        found = {kind: base.get(kind, 0) + kinds.get(kind, 0) for kind in KINDS}
        return found | {"weights": found["weights"] + live}

    def buffers(done: float) -> int:
        """DeepSpeed's buffers once this share of the gradients is there: the buckets, and a copy that is being reduced."""
        filled = int(min(bucket, item * count * done))
        reduces = filled if not waits or done == 1 else 0
        if not processor:
            return reduces + copies * bucket
        return reduces + (min(bucket, item * count) if whole else filled)

    kept = held.prefix + blocks(recipe.model) * (
        held.block_input if recipe.train.activation_checkpointing else held.block
    )
    resident = buffers(0) if whole or zero.accumulation > 1 else 0
    accumulated = _accumulated(zero, item * count, own_gradients)
    moments = {
        "forward": moment(activations=kept, buffers=resident + on_the_way, gradients=accumulated),
        "loss": moment(
            activations=kept + held.heads, logits=held.logits, working=held.heads_working,
            gradients=held.head_gradient + accumulated, buffers=resident,
        ),
    }  # fmt: skip
    # The heads' gradient is turned into 16-bit numbers, and for a moment there in both.
    twice = held.head_gradient * (item + 4) // 4 if arrangement.half else held.head_gradient
    moments["heads"] = moment(activations=kept + held.heads, gradients=twice + accumulated, buffers=resident)
    walk = []
    for left, done in _backward(recipe, tensors):
        recomputed = held.block if recipe.train.activation_checkpointing and left else 0
        if waits:
            gradients = int(item * count * (1 if zero.accumulation > 1 else done))
        else:
            gradients = 0 if whole else accumulated + int(own_gradients * (done if processor else 1))
        remaining = kept - held.prefix if left else 0
        walk.append(
            moment(
                activations=held.prefix + int(remaining * left) + recomputed,
                working=held.block_working if left else 0,
                gradients=gradients,
                buffers=buffers(done),
            )
        )
    moments["backward"] = max(walk, key=lambda kinds: sum(kinds.values()))
    if waits:
        moments["reduction"] = moment(gradients=item * count, buffers=buffers(1))
    flat = 0 if zero.offload_optimizer else largest_group * (4 if item == 4 else item + 4)
    live = 0
    moments["step"] = moment(gradients=0 if whole else own_gradients, working=flat, buffers=buffers(0) if whole else 0)
    return Memory(moments, offloaded)


def _accumulated(zero: Arrangement, all_gradients: int, own_gradients: int) -> int:
    """Gradients of the micro-batches before."""
    if zero.accumulation == 1 or zero.stage == 3:
        return 0
    return all_gradients if zero.stage == 1 else own_gradients


def _partition(tensors: list[Parameter], ranks: int) -> int:
    """Numbers of the parameters that a rank has a part of, at most: they keep whole gradients at ZeRO 1 and 2."""
    held = [0] * ranks
    for decays in (True, False):
        group = [p.size for p in tensors if p.decays == decays]
        part, start = math.ceil(sum(group) / ranks), 0
        for size in group:
            for rank in range(start // part, min(ranks - 1, (start + size - 1) // part) + 1):
                held[rank] += size
            start += size
    return max(held)


def _backward(recipe: Recipe, tensors: list[Parameter]) -> Iterator[tuple[float, float]]:
    """As the backward pass goes from block to block: the share of blocks that are left, and of gradients that are there."""
    count = sum(p.size for p in tensors)
    heads = sum(p.size for p in tensors if p.part == "heads")
    trunk = sum(p.size for p in tensors if p.part == "blocks")
    number = blocks(recipe.model)
    for left in range(number, 0, -1):
        yield left / number, (heads + trunk * (number - left) / number) / count
    yield 0.0, 1.0
