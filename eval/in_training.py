"""Scores of a model while it is trained: few pictures, judged at once, nothing written."""

from collections.abc import Callable

import numpy as np

from eval.generate import picture_seed
from eval.geneval.detectors import load_detector
from eval.geneval.judging import Picture, judge_pictures
from eval.geneval.prompts import shapes_prompts
from eval.geneval.statistics import summarize
from t2i.pipeline import TextToImagePipeline


def shapes_judge(per_task: int, seed: int) -> Callable[[TextToImagePipeline], dict[str, float]]:
    """A judge of GenEval-shapes: one picture for each of at most `per_task` prompts a task, by the exact judge of the embedded
    data; scores are called "geneval_shapes/TASK"."""
    prompts = shapes_prompts(per_task)

    def judge(pipe: TextToImagePipeline) -> dict[str, float]:
        seeds = [picture_seed(number, 0, seed) for number in range(len(prompts))]
        images = pipe([prompt["prompt"] for prompt in prompts], seeds=seeds)
        pictures = (
            Picture(str(number), prompt, np.asarray(image.convert("RGB")))
            for number, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        )
        summary = summarize(judge_pictures(load_detector("shapes"), pictures, len(prompts), progress=False))
        return {f"geneval_shapes/{tag}": summary[tag].per_image.value for tag in summary.tags}

    return judge
