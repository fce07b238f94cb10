"""`t2i geneval prompts`, `generate`, `score`, `report`, `run`. Handlers import what they need when they run: help is quick."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from eval.geneval.options import JudgeOptions, SamplingOptions
from eval.ranks import launched

geneval = SubcommandApp()

Judging = Annotated[JudgeOptions, tyro.conf.arg(name="")]
Sampling = Annotated[SamplingOptions, tyro.conf.arg(name="")]


@geneval.command(name="prompts")
def geneval_prompts(
    out: Path, seed: int | None = None, per_task: int = 100, classes: Literal["coco", "shapes"] = "coco"
) -> None:
    """Write GenEval's prompts: with the defaults the two published files, byte for byte.

    Args:
        out: Folder for evaluation_metadata.jsonl and generation_prompts.txt.
        seed: Of the draw; when not given 43, the published one, and 0 for shapes.
        per_task: Prompts of each task, at most; single_object has one for each class.
        classes: What they are about: COCO's 80 classes, or the eight shapes of the embedded data set.
    """
    from eval.geneval.prompts import coco_prompts, shapes_prompts, write_prompts

    make, published = (coco_prompts, 43) if classes == "coco" else (shapes_prompts, 0)
    prompts = make(per_task=per_task, seed=published if seed is None else seed)
    write_prompts(prompts, out)
    print(f"{len(prompts)} prompts in {out}; next: t2i geneval generate EXPORT --prompts {out} --out IMAGES")


@geneval.command(name="generate")
def geneval_generate(
    export: Positional[Path],
    prompts: Path,
    out: Path,
    sampling: Sampling,
    images_per_prompt: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Draw pictures of prompts in GenEval's folder layout; run again, it draws those that are missing.

    Under a launcher the ranks share the prompts: torchrun --nproc-per-node 8 -m t2i.cli geneval generate ...

    Args:
        export: An export of a text-to-image model.
        prompts: Folder with an evaluation_metadata.jsonl, or such a file.
        out: Folder for the pictures.
        sampling: How they are drawn.
        images_per_prompt: Pictures of each prompt.
        batch_size: Pictures drawn at once, across prompts.
        seed: Another seed draws other pictures.
        device: Where models run; the GPU of this rank or the processor when not given.
    """
    from eval.exports import Export
    from eval.generate import generate
    from eval.geneval.prompts import read_prompts

    ranks = launched()
    source = Export(export, device)
    source.check_draws_captions()
    entries = read_prompts(prompts)
    made = generate(
        source, entries, out, images_per_prompt, batch_size, ranks.rank, ranks.ranks, seed=seed, model=source.sha256,
        sampling=sampling.given,
    )  # fmt: skip
    mine = sum(ranks.owns(index) for index in range(len(entries))) * images_per_prompt
    who = f"rank {ranks.rank} of {ranks.ranks}: " if ranks.ranks > 1 else ""
    print(f"{who}{mine} pictures in {out}, {made} of them new; next: t2i geneval score {out} --out RESULTS")


@geneval.command(name="score")
def geneval_score(
    images: Positional[Path],
    out: Path,
    options: Judging,
    judge: Literal["mask2former", "shapes"] = "mask2former",
    images_per_prompt: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Judge pictures in GenEval's folder layout, whoever made them; run again, it goes on where it stopped.

    Under a launcher the ranks share the prompts: torchrun --nproc-per-node 8 -m t2i.cli geneval score ...

    Args:
        images: Folder of prompts' folders, as `t2i geneval generate` makes it.
        out: Folder for results.jsonl, with the published fields, and summary.json.
        options: The judge's models and thresholds.
        judge: Who looks at the pictures: "mask2former", with CLIP for colours, as GenEval is published; or "shapes", the exact
            judge of the embedded data set.
        images_per_prompt: Judge the first so many of each prompt; all of them when not given.
        batch_size: Pictures that the judge gets at once; 8 or, for shapes, 64 when not given.
        device: Where models run; the GPU of this rank or the processor when not given.
        json: Print summary.json in place of the table.
    """
    from rich.console import Console

    from eval.geneval.judges import load_judge
    from eval.geneval.score import list_pictures, missing_prompts, score_pictures, unfinished, write_summary
    from eval.geneval.statistics import score_table

    ranks = launched()
    prompts = list_pictures(images, images_per_prompt)
    needs_colors = any("color" in clause for prompt in prompts for clause in prompt.metadata["include"])
    judging = load_judge(judge, options, needs_colors, device)
    scores = score_pictures(
        prompts, out, judging, ranks=ranks, batch_size=batch_size, more={"images": str(images)}
    )  # fmt: skip
    if scores is None:
        print(unfinished(ranks, out, missing_prompts(prompts, out, judging)), file=sys.stderr if json else sys.stdout)
        return
    write_summary(scores, out)
    if json:
        print(json_module.dumps(scores.document, indent=2))
        return
    Console().print(score_table(scores.summary, title=f"GenEval, judge {judge}: {images}"))
    for line in scores.remarks:
        print(line)
    print(f"results: {out / 'results.jsonl'}")


@geneval.command(name="report")
def geneval_report(
    results: Positional[tuple[str, ...]],
    out: Path = Path("report.html"),
    images: tuple[Path, ...] = (),
    run_dir: Path | None = None,
    thumbnail: int = 160,
) -> None:
    """One HTML page of the results of one model, or of several side by side: scores, differences, every picture.

    Args:
        results: Of each model a results.jsonl, ours or of GenEval's own script, or a folder that holds one; NAME=PATH names
            it. The others are compared with the first.
        out: The page; it needs neither a server nor a network.
        images: Folders that hold the pictures, where they have moved: one for each of the results, in order.
        run_dir: The training run of the (one) model, whose loss curve goes into the page.
        thumbnail: Pixels of the longer side of the pictures' copies in the page; smaller pictures go in as they are.
    """
    from eval.geneval.report import make_report

    make_report(results, out, images=images, run_dir=run_dir, side=thumbnail)


@geneval.command(name="run")
def geneval_run(
    export: Positional[Path],
    options: Judging,
    sampling: Sampling,
    out: Path | None = None,
    judge: Literal["mask2former", "shapes"] | None = None,
    per_task: int = 100,
    images_per_prompt: int = 4,
    batch_size: int = 64,
    judge_batch_size: int | None = None,
    run_dir: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Prompts, pictures, scores and report in one go; run again, it goes on where it stopped.

    Args:
        export: An export.
        options: The judge's models and thresholds.
        sampling: How pictures are drawn.
        out: Folder for pictures, results and report; EXPORT/geneval when not given.
        judge: Who looks at the pictures, and so what the prompts are about: "mask2former" with CLIP on COCO's classes, as
            GenEval is published; or "shapes", the exact judge of the embedded data set. When not given: shapes for exports
            that draw 64x64, the size of that data set, else mask2former.
        per_task: Prompts of each task, at most.
        images_per_prompt: Pictures of each prompt.
        batch_size: Pictures drawn at once.
        judge_batch_size: Pictures that the judge gets at once; 8 or, for shapes, 64 when not given.
        run_dir: The training run, whose loss curve goes into the report.
        seed: Another seed draws other pictures.
        device: Where models run; the GPU of this rank or the processor when not given.
    """
    from eval.geneval.run import run_geneval

    ranks, folder = launched(), out or export / "geneval"
    run_geneval(
        export, folder, judge=judge, per_task=per_task, images_per_prompt=images_per_prompt, batch_size=batch_size,
        judge_batch_size=judge_batch_size, run_dir=run_dir, seed=seed, judge_options=options, sampling=sampling,
        device=device, ranks=ranks,
    )  # fmt: skip
