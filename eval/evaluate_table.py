"""What `t2i evaluate` prints: a table of scores, and what is the matter with some of the pictures."""

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from eval.geneval.intervals import Interval

__all__ = ["print_scores", "score_table"]

_NAMED = 8
"""Unreadable pictures that are named on the screen; scores.json names all."""


def score_table(document: dict[str, Any]) -> Table:
    """The scores of a document of `evaluate`, one a line."""
    table = Table(title=f"Evaluation: {document['source']}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("score", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("of")
    if clip := document.get("clip"):
        of = f"{clip['pictures']:,} pictures of {clip['prompts']:,} prompts"
        for key, name, digits in (("clip_score", "CLIPScore: 2.5 max(cos, 0)", 3), ("cosine_x100", "CLIP: 100 cos", 2)):
            score = Interval(**clip[key])
            ends = f"[{score.low:.{digits}f}, {score.high:.{digits}f}]"
            table.add_row(name, f"{score.value:.{digits}f} {ends}", of)
        table.caption = f"{clip['arch']} {clip['pretrained']}; 95% intervals, bootstrapped over prompts"
    if distance := document.get("fid"):
        against = document["reference"]["pictures"]
        of = f"{document['pictures']:,} pictures against {'statistics' if against is None else format(against, ',')}"
        table.add_row("FID", f"{distance['value']:.2f}", f"{of}, resize {document['inception']['resize']}")
    if distance := document.get("kid"):
        std = "" if distance["std"] is None else f" ± {distance['std']:.5f}"
        table.add_row(
            "KID", f"{distance['value']:.5f}{std}", f"{distance['subsets']} subsets of {distance['subset_size']:,}"
        )
    return table


def print_scores(document: dict[str, Any], as_json: bool = False) -> None:
    """Print the table, or the document; warnings and unreadable pictures go to the error stream."""
    for where, counted in (("pictures", document), ("reference", document.get("reference", {}))):
        bad = counted.get("unreadable", [])
        for one in bad[:_NAMED]:
            print(f"unreadable: {one['name']}: {one['reason']}", file=sys.stderr)
        if bad:
            total = counted["pictures"] + len(bad)
            print(f"warning: {len(bad):,} of {total:,} {where} could not be read and are left out", file=sys.stderr)
    for warning in [*document.get("reference", {}).get("warnings", []), *document["warnings"]]:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    Console().print(score_table(document))
    if document["out"] is not None:
        print(f"scores: {Path(document['out']) / 'scores.json'}")
