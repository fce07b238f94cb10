"""GenEval in one go: prompts, pictures, scores, ceilings and report of an export.

    t2i geneval run EXPORT --judge shapes --run-dir RUN

fills a folder (EXPORT/geneval by default):

    report.html                         everything to look at, in one file
    summary.json                        scores with their intervals, ceilings, where the model comes from
    results.jsonl                       one line per picture, with the published fields
    parts/                              the same prompt by prompt, as they came; see `eval.geneval.score`
    evaluation_metadata.jsonl, generation_prompts.txt      the prompts
    pictures/MODEL-PROMPTS/00000/...    the pictures, in the published layout
    ceiling/*.jsonl                     the shapes judge on correct pictures and on their reconstructions

Run again, it goes on where it stopped, and on an unchanged export only renders the report again. MODEL and PROMPTS are
checksums of the export's files and of the prompts (with seed and sampling options, where those are given), so pictures of
another export (a later step, say) or of other prompts get a folder of their own: they are never mixed, and what took long to
draw is not thrown away. results.jsonl, summary.json and the report are of the last call: one with other pictures or another
judge removes them when it starts. Folders under pictures/ that are no longer wanted may be deleted.

Under a launcher each rank draws and judges its share of the prompts; the one that finishes last does the rest.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline import shapes
from eval.exports import Export
from eval.files import json_sha256, read_jsonl, write_jsonl, write_text
from eval.generate import generate, sample_path
from eval.geneval.ceiling import ground_truth_pictures, reconstructed_pictures
from eval.geneval.judges import Judge, load_judge
from eval.geneval.judging import Picture, judge_pictures
from eval.geneval.options import JudgeOptions, SamplingOptions
from eval.geneval.prompts import Metadata, coco_prompts, shapes_prompts, write_prompts
from eval.geneval.report import read_losses, write_report
from eval.geneval.results import read_results
from eval.geneval.score import PromptPictures, drop_outdated, missing_prompts, score_pictures, unfinished, write_summary
from eval.geneval.statistics import Summary, score_table, summarize
from eval.ranks import Ranks

__all__ = ["run_geneval"]

REPORT_FILE = "report.html"
GROUND_TRUTH, RECONSTRUCTION = "ground truth", "reconstruction"
Rows = list[dict[str, Any]]


def _choose_judge(export: Export, judge: str | None) -> str:
    """The judge that is asked for, else the shapes judge for pictures of its size, else Mask2Former."""
    if judge is not None:
        return judge
    return "shapes" if export.description.image_size == shapes.IMAGE_SIZE else "mask2former"


def _check_size(export: Export, judge: Judge) -> None:
    size = export.description.image_size
    if judge.image_size not in (None, size):
        raise ValueError(
            f"{export.folder} draws pictures of {size}x{size}; the shapes judge sees only {judge.image_size}x"
            f"{judge.image_size}, the size of the embedded data set"
        )


def _kept(file: Path, made_from: dict[str, Any], judge: Callable[[], Rows]) -> Rows:
    """The rows in `file` if it was made from the same things, else those of `judge`, which are written there."""
    stamp = file.with_suffix(".made_from.json")
    if file.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        return read_jsonl(file)
    rows = judge()
    stamp.unlink(missing_ok=True)  # an interruption between the two files must not pair old with new
    write_jsonl(file, rows)
    write_text(stamp, json.dumps(made_from) + "\n")
    return rows


def _ceilings(
    export: Export,
    out: Path,
    prompts: Sequence[Metadata],
    images_per_prompt: int,
    batch_size: int,
    judge: Judge,
    progress: bool,
) -> dict[str, Summary]:
    """What the judge says of correct shapes pictures, and of what the image tokenizer makes of them."""
    made_from = {**judge.made_from, "prompts": json_sha256(prompts), "images_per_prompt": images_per_prompt}

    def judging(pictures: Iterator[Picture], what: str) -> Rows:
        total = len(prompts) * images_per_prompt
        return judge_pictures(judge.detector, pictures, total, batch_size, f"judge {what}", progress)

    correct = _kept(
        out / "ceiling" / "ground_truth.jsonl",
        made_from,
        lambda: judging(ground_truth_pictures(prompts, images_per_prompt), GROUND_TRUTH),
    )
    reconstructed = _kept(
        out / "ceiling" / "reconstruction.jsonl",
        {**made_from, "tokenizer": export.checksum("tokenizer/*")},
        lambda: judging(
            reconstructed_pictures(prompts, images_per_prompt, export.pipe.encode_decode, batch_size), RECONSTRUCTION
        ),
    )
    return {GROUND_TRUTH: summarize(correct), RECONSTRUCTION: summarize(reconstructed)}


def run_geneval(
    export: Path,
    out: Path,
    *,
    judge: str | None = None,
    per_task: int = 100,
    images_per_prompt: int = 4,
    batch_size: int = 64,
    judge_batch_size: int | None = None,
    run_dir: Path | None = None,
    seed: int = 0,
    judge_options: JudgeOptions | None = None,
    sampling: SamplingOptions | None = None,
    device: str | None = None,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Summary | None:
    """Score an export and write its report; prints the table of scores and the report's path.

    Args:
        export: What `t2i export` wrote.
        out: Folder for everything that the module's description lists.
        judge: "shapes" or "mask2former", each with its own prompts; when None the one that fits the export's pictures.
        per_task: Prompts of each task, at most.
        images_per_prompt: Pictures of each prompt.
        batch_size: Pictures drawn at once, and reconstructed or judged for the ceilings.
        judge_batch_size: Pictures judged at once; what suits the judge when None.
        run_dir: Training run whose metrics.jsonl gives the loss curve.
        seed: Another seed draws other pictures.
        judge_options: The judge's models and thresholds.
        sampling: How pictures are drawn.
        device: Where models run; the GPU of this rank or the processor when None.
        ranks: This process's share of the work.
        progress: Show progress bars.

    Returns the scores, or None where other ranks have not finished their shares, and says so: the last one does the rest.

    Raises:
        ValueError: no export of a text model there, an image size that the judge cannot see, no such judge, numbers
            below one, or a `run_dir` without metrics.
    """
    ranks = ranks or Ranks()
    source = Export(export, device)
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"images per prompt ({images_per_prompt}) and batch size ({batch_size}) must be at least 1")
    source.check_draws_captions()
    judging = load_judge(_choose_judge(source, judge), judge_options or JudgeOptions(), device=device)
    _check_size(source, judging)
    losses = None if run_dir is None else read_losses(run_dir)
    on_shapes = judging.name == "shapes"
    prompts = shapes_prompts(per_task) if on_shapes else coco_prompts(per_task)
    write_prompts(prompts, out)

    given = (sampling or SamplingOptions()).given
    drawn_by = [prompts, seed, given] if seed or given else prompts
    folder = out / "pictures" / f"{source.sha256[:12]}-{json_sha256(drawn_by)[:12]}"
    pictures = [
        PromptPictures(index, metadata, tuple(sample_path(folder, index, n) for n in range(images_per_prompt)))
        for index, metadata in enumerate(prompts)
    ]
    drop_outdated(pictures, out, judging, out / REPORT_FILE)
    generate(
        source, prompts, folder, images_per_prompt, batch_size, ranks.rank, ranks.ranks, seed=seed, model=source.sha256,
        sampling=given, progress=progress,
    )  # fmt: skip
    provenance = source.description.provenance
    scores = score_pictures(
        pictures, out, judging, ranks=ranks, batch_size=judge_batch_size, progress=progress,
        more={
            "model": {**asdict(provenance), "sha256": source.sha256},
            "images_per_prompt": images_per_prompt, "seed": seed, "sampling": given,
        },
    )  # fmt: skip
    if scores is None:
        print(unfinished(ranks, out, missing_prompts(pictures, out, judging)))
        return None
    ceilings = _ceilings(source, out, prompts, images_per_prompt, batch_size, judging, progress) if on_shapes else {}
    scores.document["ceilings"] = {name: ceiling.to_json() for name, ceiling in ceilings.items()}
    write_summary(scores, out)
    write_report([read_results(out)], out / REPORT_FILE, losses)
    title = f"GenEval, judge {judging.name}: {provenance.recipe}, step {provenance.step}"
    Console().print(score_table(scores.summary, ceilings, title))
    print(f"report: {out / 'report.html'}")
    return scores.summary
