"""GenEval of a model while it is trained: few pictures, judged at once, nothing written."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from data_pipeline.geneval_text import TAGS
from eval.generate import picture_seed
from eval.geneval.judges import load_judge
from eval.geneval.judging import Picture, judge_pictures
from eval.geneval.options import JudgeOptions
from eval.geneval.prompts import Metadata, coco_prompts, shapes_prompts
from eval.geneval.statistics import summarize
from t2i.config import EvalConfig
from t2i.pipeline import TextToImagePipeline


def geneval_judge(
    config: EvalConfig, seed: int, device: str | None = None
) -> Callable[[TextToImagePipeline], dict[str, float]]:
    """What scores the pictures of a pipeline: one for each of a few prompts, always the same.

    Scores are called "geneval/TASK", and "geneval_shapes/TASK" with the judge of the embedded data, which has other prompts.
    The judge's models are loaded for each call, and not kept: between two of them a GPU is the training's alone.

    Args:
        config: Who judges, and how many prompts.
        seed: Another one draws other pictures.
        device: Where the judge's models run.

    Raises ValueError where the judge's weights are not here.
    """
    given = {name: getattr(config, name) for name in ("detector", "clip", "clip_pretrained")}
    options = JudgeOptions(**{name: value for name, value in given.items() if value is not None})
    judge = load_judge(config.judge, options, device=device)
    shapes = config.judge == "shapes"
    prompts = shapes_prompts(config.per_task) if shapes else first_of_each_task(coco_prompts(), config.per_task)

    def score(pipe: TextToImagePipeline) -> dict[str, float]:
        loaded = replace(judge)  # keeps models as long as it lives itself
        seeds = [picture_seed(number, 0, seed) for number in range(len(prompts))]
        images = pipe([prompt["prompt"] for prompt in prompts], seeds=seeds)
        pictures = (
            Picture(str(number), prompt, np.asarray(image.convert("RGB")))
            for number, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        )
        rows = judge_pictures(
            loaded.detector, pictures, len(prompts), loaded.batch_size, progress=False, colors=loaded.colors
        )
        summary = summarize(rows)
        return {f"geneval{'_shapes' * shapes}/{tag}": summary[tag].per_image.value for tag in summary.tags}

    return score


def first_of_each_task(prompts: list[Metadata], count: int) -> list[Metadata]:
    """At most `count` prompts of each task, in order."""
    return [entry for tag in TAGS for entry in [one for one in prompts if one["tag"] == tag][:count]]
