"""What the tests of the report share: reading a page back."""

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from eval.geneval.report import Losses, write_report
from eval.geneval.results import Results

LOSSES = Losses(((10, 6.5), (20, 6.0), (30, 5.5)), ((20, 6.1),))


def written(models: list[Results], folder: Path, losses: Losses | None = None, **options: Any) -> str:
    write_report(models, folder / "report.html", losses, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every address that an element names, the tags, and the rows of the tables as texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(page)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += f" {data}"


def row(page: str, first: str, number: int = 0) -> list[str]:
    """The cells of the table row that starts with this text, the n-th of them."""
    return [cells for cells in Page(page).rows if cells[0] == first][number][1:]


def text(page: str) -> str:
    """The page with all white space single."""
    return " ".join(page.split())


def gallery(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    entries: list[dict[str, Any]] = json.loads(match[1])["prompts"]
    return entries


def pictures(page: str, model: int = 0) -> Iterator[tuple[dict[str, Any], Image.Image | None]]:
    """What the page says of each picture of a model, and its copy."""
    for number, entry in enumerate(gallery(page)):
        match = re.search(rf'<script type="application/json" id="copies-{number}-{model}">(.*?)</script>', page)
        assert match is not None
        for one, copy in zip(entry["models"][model] or [], json.loads(match[1]), strict=True):
            if copy is None:
                yield one, None
            else:
                content = base64.b64decode(copy.removeprefix("data:image/webp;base64,"))
                yield one, Image.open(io.BytesIO(content)).convert("RGB")
