"""Verdicts on a folder of pictures in GenEval's published layout, whoever made them.

    t2i geneval score IMAGES --out RESULTS

fills the folder RESULTS:

    results.jsonl     one line per picture, with the published fields; filenames are relative to this folder
    summary.json      scores with their intervals, counts, and what the verdicts depend on
    parts/JUDGE/      the lines of each prompt as they come, JUDGE a checksum of the judge and its settings

Several ranks share the prompts and talk through these parts alone; the one that finishes last puts the whole together. Run
again, only prompts are judged that have no part yet, or one of other pictures: files are told by their size and time.

results.jsonl and summary.json are always of the last call: one with another judge or other pictures removes them when it
starts. Nothing is lost by that, since the parts stay.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.atomic import remove_leftovers, write_bytes
from data_pipeline.images import IMAGE_SUFFIXES
from eval.files import write_text
from eval.geneval.judges import Judge
from eval.geneval.judging import Picture, judged, read_pictures
from eval.geneval.parts import PARTS, Parts, PromptPictures, Rows
from eval.geneval.prompts import check_metadata
from eval.geneval.statistics import Summary, summarize
from eval.layout import METADATA_FILE, SAMPLES, prompt_folders, read_metadata, samples_of, some
from eval.ranks import Ranks

__all__ = [
    "PromptPictures", "Scores", "drop_outdated", "list_pictures", "missing_prompts", "score_pictures", "unfinished",
    "write_summary",
]  # fmt: skip

RESULTS_FILE, SUMMARY_FILE = "results.jsonl", "summary.json"


@dataclass(frozen=True)
class Scores:
    """All verdicts on a folder.

    Attributes:
        rows: Lines of results.jsonl.
        summary: The scores.
        judged_at: When the last verdict was made.
        document: What summary.json says.
    """

    rows: Rows
    summary: Summary
    judged_at: datetime
    document: dict[str, Any]

    @property
    def remarks(self) -> list[str]:
        """A line each about what is not as it is in the published evaluation, where every prompt has as many pictures."""
        lines = []
        if tags := self.summary.missing:
            lines.append(f"{self.summary.overall_name}: the mean of what is there, without {', '.join(tags)}")
        if numbers := self.document["prompts_without_pictures"]:
            lines.append(f"{len(numbers)} prompts have no pictures and are not in the scores: {_some(numbers)}")
        if len(counts := self.document["prompts_by_pictures"]) > 1:
            lines.append(
                "prompts differ in pictures: " + ", ".join(f"{prompts} have {n}" for n, prompts in counts.items())
            )
        if names := self.document["ignored_files"]:
            lines.append(
                f"{len(names)} files under {SAMPLES}/ are no numbered pictures ({', '.join(IMAGE_SUFFIXES)}) and are left out: "
                f"{_some(names)}"
            )
        if names := self.document["unreadable"]:
            lines.append(f"{len(names)} pictures could not be read and count as wrong: {_some(names)}")
        return lines


def _some(names: Sequence[object]) -> str:
    return some(names, more=f" (in {SUMMARY_FILE})")


def list_pictures(images: Path, images_per_prompt: int | None = None) -> list[PromptPictures]:
    """The prompts of a folder in the published layout, by number, with their pictures.

    A prompt is a folder with a number for a name, with a metadata.jsonl (one entry) and pictures that have numbers for
    names under samples/; they may differ in how many, or have none. At most `images_per_prompt` of each, the first ones by
    number. See `eval.layout`, which `t2i evaluate` reads such folders by as well.

    Raises ValueError where there is no such folder, for metadata that are none, and for two pictures of one number.
    """
    if images_per_prompt is not None and images_per_prompt < 1:
        raise ValueError(f"images per prompt is {images_per_prompt}; give at least 1, or leave it out for all")
    folders = prompt_folders(images)
    if not folders:
        raise ValueError(
            f"{images} has no folders 00000, 00001 ... of prompts; give a folder in GenEval's layout, as "
            "`t2i geneval generate` makes it"
        )
    return [_prompt(folder, images_per_prompt) for folder in folders]


def _prompt(folder: Path, images_per_prompt: int | None) -> PromptPictures:
    metadata, found = read_metadata(folder), samples_of(folder)
    check_metadata(metadata, str(folder / METADATA_FILE))
    return PromptPictures(int(folder.name), metadata, found.files[:images_per_prompt], found.ignored)


def missing_prompts(prompts: Sequence[PromptPictures], out: Path, judge: Judge) -> int:
    """How many of the prompts that have pictures still have no verdicts of this judge on these pictures."""
    parts = Parts(out, judge.made_from)
    return sum(parts.load(prompt) is None for prompt in prompts if prompt.files)


def drop_outdated(prompts: Sequence[PromptPictures], out: Path, judge: Judge, *also: Path) -> None:
    """Remove results and summary, and the files in `also`, where they cannot be of this judge and these pictures.

    So that nobody takes them for those of a call that has not finished. Their verdicts stay among the parts.
    """
    stale = [path for path in (out / RESULTS_FILE, out / SUMMARY_FILE, *also) if path.is_file()]
    if stale and missing_prompts(prompts, out, judge):
        for path in stale:
            path.unlink(missing_ok=True)  # by another rank, just now
        print(
            f"{', '.join(path.name for path in stale)} in {out} were of another judge or other pictures and are removed; "
            f"their verdicts stay in {PARTS}/",
            file=sys.stderr,
        )


def score_pictures(
    prompts: Sequence[PromptPictures],
    out: Path,
    judge: Judge,
    *,
    ranks: Ranks | None = None,
    batch_size: int | None = None,
    more: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Scores | None:
    """Judge this rank's share of the pictures and, once every share is judged, write results.jsonl and summary.json.

    Args:
        prompts: All prompts and their pictures, the same ones on every rank; a picture that is missing cannot be read.
        out: The folder to fill.
        judge: Who looks at them.
        ranks: This process's share.
        batch_size: Pictures that the judge gets at once; what suits it when None.
        more: Further entries of summary.json, which come first.
        progress: Show a progress bar, on the first rank.

    Returns the scores, or None where other ranks have not finished theirs: the last one gets and writes them.

    Raises ValueError for no pictures at all, prompts or pictures that the judge does not know, and a batch size below 1.
    """
    ranks = ranks or Ranks()
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; give at least 1")
    if len({prompt.number for prompt in prompts}) < len(prompts):
        numbers = Counter(prompt.number for prompt in prompts)
        raise ValueError(f"there are two folders of prompt {numbers.most_common(1)[0][0]}; remove one")
    shown = [prompt for prompt in prompts if prompt.files]
    if not shown:
        raise ValueError(f"none of the {len(prompts)} prompts has a picture; generate some first")
    judge.check_prompts([prompt.metadata for prompt in shown])

    drop_outdated(shown, out, judge)
    parts = Parts(out, judge.made_from)
    remove_leftovers(out / PARTS)
    mine = [prompt for prompt in shown if ranks.owns(prompt.number)]
    missing = [prompt for prompt in mine if parts.load(prompt) is None]
    total = sum(len(prompt.files) for prompt in mine)
    with tqdm(
        total=total, initial=total - sum(len(prompt.files) for prompt in missing), unit="picture", desc="judge",
        disable=not progress or ranks.rank != 0,
    ) as bar:  # fmt: skip
        if missing:
            # Before the pictures are read: one that is replaced meanwhile is judged again the next time.
            stamps = [parts.stamp(prompt) for prompt in missing]
            size = batch_size or judge.batch_size
            files = ((path, parts.filename(path), prompt.metadata) for prompt in missing for path in prompt.files)
            pictures = _of_known_size(read_pictures(files, ahead=2 * size), judge)
            rows = judged(judge.detector, pictures, size, judge.colors)
            for prompt, stamp in zip(missing, stamps, strict=True):
                parts.save(prompt, stamp, list(islice(rows, len(prompt.files))))
                bar.update(len(prompt.files))
    ignored = [parts.filename(path) for prompt in prompts for path in prompt.ignored]
    return _gathered(prompts, shown, parts, out, judge, {**(more or {}), "ignored_files": ignored})


def _of_known_size(pictures: Iterator[Picture], judge: Judge) -> Iterator[Picture]:
    """The pictures; ValueError for one of a size that the judge does not know."""
    side = judge.image_size
    for picture in pictures:
        if side is not None and picture.image is not None and picture.image.shape[:2] != (side, side):
            height, width = picture.image.shape[:2]
            raise ValueError(
                f"{picture.filename} is {width}x{height}; the judge {judge.name!r} sees only {side}x{side}, the size of the "
                "embedded data set: choose the other judge"
            )
        yield picture


def _gathered(
    prompts: Sequence[PromptPictures],
    shown: Sequence[PromptPictures],
    parts: Parts,
    out: Path,
    judge: Judge,
    more: Mapping[str, Any],
) -> Scores | None:
    rows: Rows = []
    for prompt in shown:
        part = parts.load(prompt)
        if part is None:
            return None
        rows += part
    summary = summarize(rows)
    results, lines = out / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode()
    if not results.is_file() or results.read_bytes() != lines:  # else its time stays that of the last change
        (out / SUMMARY_FILE).unlink(missing_ok=True)
        write_bytes(results, lines)
    judged_at = datetime.fromtimestamp(results.stat().st_mtime, UTC)
    document = {
        **more,
        "judge": judge.name,
        "judged_at": judged_at.isoformat(timespec="seconds"),
        "made_from": dict(judge.made_from),
        "judge_files": dict(judge.files),
        "prompts": len(shown),
        "prompts_without_pictures": [prompt.number for prompt in prompts if not prompt.files],
        "prompts_by_pictures": {str(n): count for n, count in sorted(Counter(len(p.files) for p in shown).items())},
        "tasks_missing": list(summary.missing),
        "unreadable": [row["filename"] for row in rows if row.get("unreadable")],
        "results_sha256": hashlib.sha256(lines).hexdigest(),
        "scores": summary.to_json(),
    }
    return Scores(rows, summary, judged_at, document)


def unfinished(ranks: Ranks, out: Path, missing: int) -> str:
    """What a rank says that has finished while `missing` prompts have no verdicts yet.

    Raises ValueError where there is no other rank that could judge them.
    """
    if ranks.ranks == 1:
        raise ValueError(f"pictures of {missing} prompts changed while they were judged; run the same command again")
    return (
        f"rank {ranks.rank} of {ranks.ranks} has finished its share; {missing} prompts have no verdicts yet: the last rank to "
        f"finish writes {out}"
    )


def write_summary(scores: Scores, out: Path) -> None:
    """Write summary.json."""
    write_text(out / SUMMARY_FILE, json.dumps(scores.document, indent=2) + "\n")
