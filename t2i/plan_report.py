"""A plan as tables for people, or as plain values for machines."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from t2i.config import to_json
from t2i.costs import computed_flops_per_sample, forward_flops, parameters
from t2i.memory import KINDS
from t2i.plan import ALLOWANCE, Plan


def gigabytes(size: float) -> str:
    """Bytes as gigabytes of 10**9, as data sheets have them."""
    return f"{size / 1e9:,.2f}"


def print_plan(
    plan: Plan, config_file: str, recipe: str, fields: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print what a run takes, what it takes of each GPU, and how to start it with the recommended JSON in `config_file`;
    `recipe` and `fields` are what was given for the recipe, a name or a file and options."""
    console = console or Console()
    console.width = max(console.width, 180)  # a table in a log file is not folded
    cluster = plan.cluster
    console.print(
        f"t2i plan: {plan.recipe.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}, "
        f"{cluster.model.flops / 1e12:,.0f} TFLOP/s and {gigabytes(cluster.memory)} GB each, on paper",
        highlight=False,
    )
    console.print(_run_table(plan))
    console.print(_memory_table(plan))
    console.print(
        "GB of 10**9 bytes; kinds are each at its most, the peak is the most at one moment. Again: activations are computed "
        f"again in the backward pass. Off: in the processor's memory. Captions have {plan.recipe.model.max_condition} tokens, "
        f"the most there can be. What fits leaves {ALLOWANCE:.0%} of a GPU to CUDA, NCCL and fragments.",
        highlight=False,
    )
    _print_recommended(plan, config_file, recipe, fields, console)


def _run_table(plan: Plan) -> Table:
    recipe, cluster = plan.recipe, plan.cluster
    table = Table(title="the run", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def of_parts(parts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count / sum(parts.values()):.1%}" for name, count in parts.items())

    counts, caption = parameters(recipe), plan.caption_tokens
    forward = forward_flops(recipe, caption)
    checkpointed = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    again = computed_flops_per_sample(checkpointed, caption) / plan.flops_per_sample
    table.add_row("parameters", f"{sum(counts.values()):,}", of_parts(counts))
    table.add_row("global batch", f"{plan.global_batch:,}", f"{cluster.ranks} GPUs, {plan.lanes} lanes")
    table.add_row("steps", f"{plan.steps:,}", "" if plan.epochs is None else f"{plan.epochs:.1f} epochs")
    table.add_row("tokens", f"{plan.tokens:.3g}", f"{plan.tokens // plan.steps:,} a step")
    table.add_row(
        "FLOPs a sample", f"{plan.flops_per_sample:.3g}", f"captions of {caption} tokens; {of_parts(forward)}"
    )
    table.add_row(
        "FLOPs of the run", f"{plan.flops:.3g}", f"activation checkpointing computes {again:.2f} times as many"
    )
    table.add_row(
        "days",
        f"{plan.seconds / 86400:.2f}",
        f"at an MFU of {cluster.mfu:g}, of the peak in 16-bit numbers, if the network keeps up",
    )
    rate = plan.global_batch / plan.seconds_per_step
    table.add_row("seconds a step", f"{plan.seconds_per_step:.3f}", f"{rate:,.0f} samples/s")
    sent = [way.traffic for way in plan.ways if way.name == plan.recommended][:1]
    if sent:
        table.add_row(
            "network, GB/s",
            f"{sent[0] / plan.seconds_per_step / 1e9:,.1f}",
            f"of each GPU, which sends {gigabytes(sent[0])} GB a step; with less, steps wait for it",
        )
    table.add_row(
        "checkpoint, GB", gigabytes(plan.checkpoint_bytes), "as many in processors' memory while it is written"
    )
    if plan.samples is None or plan.shards is None:
        table.add_row("shards a node", "-", f"{recipe.data.path} is not there; give --samples")
    else:
        table.add_row(
            "shards a node", f"{plan.shards / cluster.nodes:,.1f}", f"of {plan.shards:,}; {plan.samples:,} samples"
        )
    return table


def _memory_table(plan: Plan) -> Table:
    accumulation = plan.global_batch // plan.cluster.ranks // plan.micro_batch
    title = f"GB of each GPU at micro-batch {plan.micro_batch}, accumulation {accumulation}"
    table = Table(title=title, title_justify="left")
    kinds = [kind for kind in KINDS if kind != "activations"]
    for column in ("way", "activations", *kinds, "peak", "when", "offloaded", "sent a step", "micro-batch that fits"):
        table.add_column(column, justify="left" if column in ("way", "when") else "right", no_wrap=column == "way")
    for way in plan.ways:
        memory = way.memory
        chosen = (way.name, way.checkpointing) == (plan.recommended, plan.checkpointing)
        table.add_row(
            way.name,
            gigabytes(memory.largest("activations")) + (" again" if way.checkpointing else " kept"),
            *(gigabytes(memory.largest(kind)) for kind in kinds),
            gigabytes(memory.peak),
            memory.peak_moment,
            gigabytes(memory.offloaded),
            gigabytes(way.traffic),
            f"{way.fits:,}" if way.fits else "none",
            style="bold green" if chosen else None,
        )
    return table


def _print_recommended(plan: Plan, config_file: str, recipe: str, fields: Sequence[str], console: Console) -> None:
    if plan.config is None:
        console.print(
            f"No micro-batch fits a GPU of {gigabytes(plan.cluster.memory)} GB: take one with more memory, or a smaller model."
        )
        return
    changes = [*fields]  # of two that are the same the last counts
    if plan.lanes != plan.recipe.data.lanes:
        changes += ["--data.lanes", str(plan.lanes)]
    if plan.checkpointing != plan.recipe.train.activation_checkpointing:
        changes.append(f"--train.{'' if plan.checkpointing else 'no-'}activation-checkpointing")
    start = ["deepspeed", "--hostfile", "HOSTS", "t2i/train.py", recipe, "--deepspeed_config", config_file]
    console.print(f"Recommended: {plan.recommended}, {config_file}:", highlight=False)
    console.print_json(data=plan.config)
    console.print(shlex.join([*start, *changes]), markup=False, highlight=False, soft_wrap=True)


def plan_json(plan: Plan) -> str:
    """The whole plan: counts, bytes and seconds as they are."""
    values = asdict(plan) | {"recipe": json.loads(to_json(plan.recipe)), "parameters": parameters(plan.recipe)}
    for way, row in zip(plan.ways, values["ways"], strict=True):
        row["memory"] |= {"peak": way.memory.peak, "peak_moment": way.memory.peak_moment}
    values["cluster"] |= {"ranks": plan.cluster.ranks, "usable": plan.cluster.usable}
    return json.dumps(values | {"seconds_per_step": plan.seconds_per_step}, indent=2)
