"""GenEval in one go: prompts, pictures, scores, ceilings and report of an export.

    t2i geneval run EXPORT --judge shapes --run-dir RUN

fills a folder (EXPORT/geneval by default):

    report.html                         everything to look at, in one file
    summary.json                        scores with their intervals, ceilings, where the model comes from
    results.jsonl                       one line per picture, with the published fields
    evaluation_metadata.jsonl, generation_prompts.txt      the prompts
    pictures/MODEL-PROMPTS/00000/...    the pictures, in the published layout
    ceiling/*.jsonl                     the judge on correct pictures and on their reconstructions

Run again, it goes on where it stopped, and on an unchanged export only renders the report again. MODEL and PROMPTS are
checksums of the export's files and of the prompts, so pictures of another export (a later step, say) or of other
prompts get a folder of their own: they are never mixed, and what took long to draw is not thrown away. results.jsonl,
summary.json and the report are of the last call; folders under pictures/ that are no longer wanted may be deleted.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from data_pipeline import shapes
from eval.files import read_jsonl, write_jsonl, write_text
from eval.generate import generate
from eval.geneval import scoring
from eval.geneval.ceiling import ground_truth_pictures, reconstructed_pictures
from eval.geneval.detectors import Detector, load_detector
from eval.geneval.judging import Picture, judge_pictures, pictures_of
from eval.geneval.prompts import Metadata, shapes_prompts, write_prompts
from eval.geneval.report import read_losses, write_report
from eval.geneval.results import read_results
from eval.geneval.statistics import Summary, score_table, summarize
from t2i.devices import choose_device
from t2i.pipeline import ExportDescription, TextToImagePipeline, read_description

__all__ = ["run_geneval"]

GROUND_TRUTH, RECONSTRUCTION = "ground truth", "reconstruction"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class _Export:
    """An export's folder; its models are loaded when the first picture is wanted, which may be never."""

    folder: Path

    @cached_property
    def description(self) -> ExportDescription:
        return read_description(self.folder)

    @cached_property
    def pipe(self) -> TextToImagePipeline:
        return TextToImagePipeline.from_pretrained(self.folder, choose_device())

    def __call__(self, prompts: list[str], *, seeds: list[int], **sampling: Any) -> list[Image.Image]:
        return self.pipe(prompts, seeds=seeds, **sampling)

    def checksum(self, *patterns: str) -> str:
        """SHA-256 over names and contents of the files that match, in hexadecimal."""
        digest = hashlib.sha256()
        for path in sorted(path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()):
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    @cached_property
    def sha256(self) -> str:
        """Of everything that a picture depends on; the output folder may lie inside the export, so not of all."""
        return self.checksum("config.json", "model.safetensors", "text_encoder/*", "tokenizer/*")


def _check(export: _Export, judge: str, images_per_prompt: int, batch_size: int) -> None:
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"images per prompt ({images_per_prompt}) and batch size ({batch_size}) must be at least 1")
    if export.description.model.condition != "text":
        raise ValueError(f"{export.folder} draws classes, not captions; GenEval needs a text-to-image export")
    if not export.description.tokenizer:
        raise ValueError(f"{export.folder} has no image tokenizer and draws no pictures; make it again with one")
    size = export.description.image_size
    if judge == "shapes" and size != shapes.IMAGE_SIZE:
        raise ValueError(
            f"{export.folder} draws pictures of {size}x{size}; the shapes judge sees only {shapes.IMAGE_SIZE}x"
            f"{shapes.IMAGE_SIZE}, the size of the embedded data set"
        )


def _sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _code(detector: Detector) -> str:
    """SHA-256 of the code that verdicts depend on: those of an older judge must not stand beside a newer one's."""
    names = (type(detector).__module__, scoring.__name__, shapes.__name__)
    return _sha256([inspect.getsource(sys.modules[name]) for name in names])


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
    export: _Export,
    out: Path,
    prompts: Sequence[Metadata],
    images_per_prompt: int,
    batch_size: int,
    judging: Callable[[Iterator[Picture], str], Rows],
    made_from: dict[str, Any],
) -> dict[str, Summary]:
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
    judge: str = "shapes",
    per_task: int = 100,
    images_per_prompt: int = 4,
    batch_size: int = 64,
    run_dir: Path | None = None,
    progress: bool = True,
) -> Summary:
    """Score an export and write its report; prints the table of scores and the report's path.

    Args:
        export: What `t2i export` wrote.
        out: Folder for everything that the module's description lists.
        judge: Name of the detector; "shapes" brings its own prompts.
        per_task: Prompts of each task, at most.
        images_per_prompt: Pictures of each prompt.
        batch_size: Pictures drawn, reconstructed or judged at once.
        run_dir: Training run whose metrics.jsonl gives the loss curve.
        progress: Show progress bars.

    Raises:
        ValueError: no export of a text model there, an image size that the judge cannot see, no such judge, numbers
            below one, or a `run_dir` without metrics.
    """
    source = _Export(export)
    _check(source, judge, images_per_prompt, batch_size)
    detector: Detector = load_detector(judge)
    losses = None if run_dir is None else read_losses(run_dir)
    prompts = shapes_prompts(per_task)
    write_prompts(prompts, out)

    folder = out / "pictures" / f"{source.sha256[:12]}-{_sha256(prompts)[:12]}"
    made = generate(source, prompts, folder, images_per_prompt, batch_size, model=source.sha256, progress=progress)

    def judging(pictures: Iterator[Picture], what: str) -> Rows:
        total = len(prompts) * images_per_prompt
        return judge_pictures(detector, pictures, total, batch_size, f"judge {what}", progress)

    made_from = {
        "prompts": _sha256(prompts),
        "images_per_prompt": images_per_prompt,
        "judge": judge,
        "scoring": asdict(detector.scoring),
        "code": _code(detector),
    }
    results = out / "results.jsonl"
    if made:
        results.with_suffix(".made_from.json").unlink(missing_ok=True)
    rows = _kept(
        results,
        {**made_from, "model": source.sha256},
        lambda: judging(pictures_of(folder, prompts, images_per_prompt, out), "pictures"),
    )
    ceilings = _ceilings(source, out, prompts, images_per_prompt, batch_size, judging, made_from)
    summary = summarize(rows)

    provenance = source.description.provenance
    judged_at = datetime.fromtimestamp(results.stat().st_mtime, UTC)
    document = {
        "model": {**asdict(provenance), "sha256": source.sha256},
        "judge": judge,
        "judged_at": judged_at.isoformat(timespec="seconds"),
        "images_per_prompt": images_per_prompt,
        "scores": summary.to_json(),
        "ceilings": {name: ceiling.to_json() for name, ceiling in ceilings.items()},
    }
    write_text(out / "summary.json", json.dumps(document, indent=2) + "\n")
    write_report([read_results(out)], out / "report.html", losses)
    console = Console()
    console.print(
        score_table(summary, ceilings, f"GenEval, judge {judge}: {provenance.recipe}, step {provenance.step}")
    )
    print(f"report: {out / 'report.html'}")
    return summary
