"""The report: one HTML file with scores, charts and every picture, which needs neither a server nor a network.

    t2i geneval report exports/mine/geneval theirs=results.jsonl --out report.html

Pictures are embedded as small copies. The page makes those of a few prompts of each task, and more on request, so that
thousands of pictures stay quick to open.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data_pipeline.geneval_text import TAGS
from eval.files import read_jsonl, write_text
from eval.geneval.charts import MODELS, loss_chart, score_chart
from eval.geneval.comparison import compare
from eval.geneval.gallery import LARGEST_SIDE, make_gallery
from eval.geneval.prompts import coco_prompts
from eval.geneval.published import PUBLISHED
from eval.geneval.results import Results, read_results
from eval.geneval.statistics import overall_name

__all__ = ["Losses", "Written", "make_report", "read_losses", "write_report"]


@dataclass(frozen=True)
class Losses:
    """The loss curves of a run: (step, cross-entropy) points."""

    training: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Written:
    """A page that was written: its bytes, the pictures in it, and those that could not be shown, each with the reason."""

    size: int
    shown: int
    missing: tuple[str, ...]


def read_losses(run_dir: Path) -> Losses:
    """The loss curves in a training run's metrics.jsonl.

    Raises:
        ValueError: no such file, a line that is no JSON object, or no losses in it.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl; give the folder of a training run, or none")
    rows = read_jsonl(path)

    def points(name: str) -> tuple[tuple[int, float], ...]:
        return tuple(sorted((int(row["step"]), float(row[name])) for row in rows if name in row))

    losses = Losses(points("loss"), points("val_loss"))
    if not losses.training:
        raise ValueError(f"{path} holds no training losses yet; let the run log its first steps")
    return losses


def _of_published(models: Sequence[Results]) -> tuple[int, int]:
    """How many of the published prompts every model has, and how many there are."""
    published = {json.dumps(entry, sort_keys=True) for entry in coco_prompts()}
    return min(len(published & {one.metadata for one in results.pictures}) for results in models), len(published)


def _images(results: Results) -> str:
    """'4', or '1 to 4': how many pictures the prompts have."""
    counts: dict[str, int] = {}
    for one in results.pictures:
        counts[one.metadata] = counts.get(one.metadata, 0) + 1
    least, most = min(counts.values()), max(counts.values())
    return str(most) if least == most else f"{least} to {most}"


def _signed(value: float) -> str:
    """With a sign and a true minus, which screen readers know: +0.120, −0.030, 0.000."""
    shown = f"{value:+.3f}"
    return "0.000" if float(shown) == 0 else shown.replace("-", "−")


def _part(name: str) -> Markup:
    """A style sheet or script of ours, which goes into the page as it is."""
    return Markup((files("eval.geneval") / "templates" / name).read_text(encoding="utf-8"))


def write_report(
    models: Sequence[Results],
    path: Path,
    losses: Losses | None = None,
    *,
    side: int = LARGEST_SIDE,
    progress: bool = False,
) -> Written:
    """Write the page, self-contained, to `path`.

    Args:
        models: The results of one model or several; the others are compared with the first.
        path: The page.
        losses: The loss curves of the (one) model's training run.
        side: Pixels of the longer side of the embedded copies.
        progress: Show a progress bar.

    Raises:
        ValueError: no models, two of the same name, one without a prompt of the first, or a `side` below 16 or over 1024.
    """
    names = [results.name for results in models]
    if not names:
        raise ValueError("there are no results to report; give the folder of at least one")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{names.count(twice[0])} results are called {twice[0]!r}; name them: one=PATH other=PATH")
    if not 16 <= side <= 1024:
        raise ValueError(f"thumbnails of {side} pixels cannot be made; give 16 to 1024")
    first, *others = models
    comparisons = [(other, compare(first.rows, other.rows, (first.name, other.name))) for other in others]
    gallery = make_gallery(models, side, progress)
    environment = Environment(
        loader=PackageLoader("eval.geneval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"signed": _signed, "images": _images, "task": lambda tag: tag.replace("_", " ")}
    summaries = [results.summary for results in models]
    page = environment.get_template("report.html.j2").render(
        models=models,
        colors=len(MODELS),
        tags=(*TAGS, "overall"),
        comparisons=comparisons,
        overall_name=overall_name,
        published=PUBLISHED,
        of_published=_of_published(models),
        gallery=gallery,
        embedded=sum(len(copy or "") for prompt in gallery.copies for model in prompt for copy in model),
        # Charts are our own markup, from numbers and task names only.
        loss_chart=None if losses is None else Markup(loss_chart(losses.training, losses.validation)),
        score_chart=Markup(score_chart(summaries, [results.ceilings for results in models])),
        style=_part("report.css"),
        script=_part("report.js"),
    )
    write_text(path, page)
    return Written(path.stat().st_size, gallery.shown, tuple(file for model in gallery.missing for file in model))


def make_report(
    results: Sequence[str],
    out: Path,
    *,
    images: Sequence[Path] = (),
    run_dir: Path | None = None,
    side: int = LARGEST_SIDE,
    progress: bool = True,
) -> Written:
    """Read results, write their report, and print where it is, how large, and which pictures it lacks.

    Args:
        results: PATH or NAME=PATH of each model's results.jsonl, or of a folder that holds one.
        out: The page.
        images: Folders of the models' pictures, where they have moved: one of each model, in order.
        run_dir: Training run whose metrics.jsonl gives the loss curve.
        side: Pixels of the longer side of the embedded copies.
        progress: Show a progress bar.

    Raises:
        ValueError: results that cannot be read or compared, or options that do not fit them.
    """
    if images and len(images) != len(results):
        raise ValueError(f"{len(images)} folders of pictures for {len(results)} results; give one for each, in order")
    if run_dir is not None and len(results) != 1:
        raise ValueError(f"{run_dir} is the training run of one model, and there are {len(results)}; leave it out")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give a file name such as {out / 'report.html'}")
    losses = None if run_dir is None else read_losses(run_dir)
    folders: Sequence[Path | None] = images or [None] * len(results)
    models = [read_results(given, folder) for given, folder in zip(results, folders, strict=True)]
    written = write_report(models, out, losses, side=side, progress=progress)
    if written.missing:
        few = ", ".join(written.missing[:3]) + (", ..." if len(written.missing) > 3 else "")
        print(f"{len(written.missing)} pictures cannot be shown: {few}")
    print(f"report: {out} ({written.size / 1e6:.1f} MB, {written.shown:,} pictures)")
    return written
