"""`t2i plan`. What it needs is imported when it runs, so that help is quick; none of it takes torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class PlanOptions:
    """Tell what a run will take of a cluster, on paper: memory, traffic, time, disk, and the DeepSpeed JSON for it.

    Every field of the recipe is an option as for training (`python t2i/train.py RECIPE --help` lists them).
    """

    recipe: Positional[str]
    """A recipe's name, or the recipe.json of a run."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each."""
    gpu: str = "h100"
    """Which: h100, h200, b200, a100-80, a100-40, l40s, rtx4090, v100 and others."""
    mfu: float = 0.4
    """Share of the GPUs' peak that the model's FLOPs make use of."""
    gpu_memory: float | None = None
    """Of each GPU, in GB; the data sheet's when not given."""
    global_batch: int = 512
    """Samples of a step."""
    micro_batch: int | None = None
    """For which memory is told; the recommended one when not given."""
    caption: int | None = None
    """Tokens of the longest caption of a micro-batch, as it usually is, for FLOPs and time; 40 when not given."""
    samples: int | None = None
    """Of the data set; those of the recipe's folder, if it is there, when not given."""
    fp32: bool = False
    """Train in fp32 in place of 16-bit numbers."""
    out: Path | None = None
    """Where to write the recommended DeepSpeed JSON."""
    json: bool = False
    """Print JSON in place of the tables."""


def plan(args: Sequence[str]) -> None:
    """Parse what follows `t2i plan` and print. Raises ValueError for a mistake in `args`."""
    import tyro

    options, fields = tyro.cli(PlanOptions, args=list(args), return_unknown_args=True, prog="t2i plan")
    from data_pipeline.atomic import write_bytes
    from t2i.plan import Cluster, config_json, make_plan
    from t2i.plan_report import plan_json, print_plan
    from t2i.recipes import changed_recipe

    cluster = Cluster(options.nodes, options.gpus_per_node, options.gpu, options.mfu, options.gpu_memory)
    made = make_plan(
        changed_recipe(options.recipe, fields, f"t2i plan {options.recipe}"), cluster,
        global_batch=options.global_batch, micro_batch=options.micro_batch, caption_tokens=options.caption,
        samples=options.samples, fp32=options.fp32,
    )  # fmt: skip
    if options.out is not None:
        if made.config is None:
            raise ValueError(
                f"no micro-batch of {options.recipe} fits a {options.gpu}, so there is nothing to write to {options.out}"
            )
        write_bytes(options.out, config_json(made.config))
    if options.json:
        print(plan_json(made))
    else:
        print_plan(made, str(options.out or "plan.json"), options.recipe, fields)
