"""The page in a real browser: pictures, detections, filters, search and enlarging, from a file and without a server."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eval.geneval.results import Results

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome"),
]

STEPS = """
const log = {}, all = selector => [...document.querySelectorAll(selector)];
const press = (group, text) => all(`#${group} button`).find(button => button.textContent === text).click();
const state = () => ({
  count: document.getElementById("count").textContent, pictures: all(".pictures figure").length,
  wrong: all(".pictures figure.wrong").length, sections: all(".task h3").map(title => title.textContent),
  prompts: all(".card h4").map(title => title.textContent),
  pressed: all("[aria-pressed=true]").map(button => button.textContent),
  columns: all(".task:first-child .card:first-child .columns > section").length, hash: location.hash});
const steps = async () => {
  log.start = state();
  log.sizes = await Promise.all(all(".view img").map(async image => {
    image.loading = "eager"; await image.decode(); return [image.naturalWidth, image.clientWidth > 20]; }));
  log.boxes = all(".boxes text").map(label => label.textContent);
  log.display = getComputedStyle(document.querySelector(".boxes")).display;
  document.getElementById("boxes").click();
  log.hidden = getComputedStyle(document.querySelector(".boxes")).display;
  press("tasks", "counting"); log.counting = state();
  press("verdicts", "wrong"); log.wrong = state();
  press("tasks", "all tasks"); press("verdicts", "all verdicts");
  press("differing", "differ only"); log.differ = state();
  press("who", "second"); log.second = state();
  press("who", "all models"); press("differing", "differ only");
  const words = document.getElementById("words");
  words.value = " STAR expected"; words.dispatchEvent(new Event("input")); log.words = state();
  words.value = "no such word"; words.dispatchEvent(new Event("input")); log.none = state();
  log.nothing = document.querySelector("#gallery .none").textContent;
  words.value = ""; words.dispatchEvent(new Event("input")); log.end = state();
  document.querySelector(".view").click();
  const large = document.getElementById("large");
  log.large = {open: large.open, title: document.getElementById("large-title").textContent,
    objects: all("#large tbody tr").length, focus: large.contains(document.activeElement)};
  document.getElementById("close").click(); log.closed = !large.open;
  log.fits = document.documentElement.scrollWidth <= innerWidth; log.unnamed = all("button").filter(
    button => !(button.getAttribute("aria-label") ?? button.textContent).trim()).length;
};
steps().catch(error => { log.error = String(error); }).finally(() => {
  const made = document.createElement("pre"); made.id = "log"; made.textContent = JSON.stringify(log);
  document.body.append(made); });
"""


def opened(html: str, folder: Path, width: int, fragment: str = "") -> dict[str, Any]:
    """What `STEPS` saw in the page, opened as a file."""
    assert BROWSER is not None
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"<script>{{ {STEPS} }}</script></body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", f"{page.as_uri()}{fragment}",
    ]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="log">(.*?)</pre>', dumped, re.DOTALL)
    assert match is not None, dumped[-2000:]
    log: dict[str, Any] = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "error" not in log, log["error"]
    return log


def test_pictures_detections_filters_search_and_enlarging(models: list[Results], both: str, tmp_path: Path) -> None:
    log = opened(both, tmp_path, 1280)
    judged = [one for results in models for one in results.pictures]
    assert log["start"]["count"] == "48 pictures of 12 prompts"
    assert log["start"]["pictures"] == 48
    assert log["start"]["wrong"] == sum(not one.correct for one in judged)
    assert log["start"]["columns"] == 2
    assert log["sizes"] == [[64, True]] * 48
    named = [f for one in judged for f in one.found if f.class_name in one.asked]
    assert sorted(log["boxes"]) == sorted(f"{f.color} {f.class_name} {f.score:.2f}" for f in named)
    assert (log["display"], log["hidden"]) == ("block", "none")

    assert log["counting"]["sections"] == ["counting"]
    assert log["counting"]["pictures"] == 8
    wrong = [one for one in judged if one.tag == "counting" and not one.correct]
    assert log["wrong"]["pictures"] == log["wrong"]["wrong"] == len(wrong) > 0
    assert log["wrong"]["hash"] == "#task=counting&verdict=wrong"
    assert {"counting", "wrong", "all models"} == set(log["wrong"]["pressed"])

    def right(results: Results, prompt: str) -> int:
        return sum(one.correct for one in results.pictures if one.metadata == prompt)

    prompts = {one.metadata: one.prompt for one in judged}
    differing = [text for key, text in prompts.items() if right(models[0], key) != right(models[1], key)]
    assert sorted(log["differ"]["prompts"]) == sorted(differing)
    assert 0 < len(differing) < 12
    assert log["differ"]["pictures"] == 4 * len(differing)
    assert (log["second"]["pictures"], log["second"]["columns"]) == (2 * len(differing), 1)

    fitting = [one for one in judged if "star" in one.prompt + "\n".join(one.reasons) and one.reasons]
    assert log["words"]["pictures"] == len(fitting) > 0
    assert (log["none"]["pictures"], log["nothing"]) == (0, "No picture fits these filters.")
    assert log["end"] == log["start"] | {"pressed": log["end"]["pressed"]}

    assert log["large"]["open"]
    assert log["large"]["focus"]
    first = next(one for one in judged if one.prompt == log["large"]["title"])
    assert log["large"]["objects"] == len(first.found)
    assert log["closed"]
    assert log["fits"]
    assert log["unnamed"] == 0


def test_a_narrow_window_and_a_view_kept_in_the_address(both: str, tmp_path: Path) -> None:
    log = opened(both, tmp_path, 360, "#task=position&verdict=right&model=1&words=photo")
    assert log["start"]["sections"] == ["position"]
    assert log["start"]["columns"] == 1
    assert log["start"]["wrong"] == 0
    assert set(log["start"]["pressed"]) == {"position", "right", "second"}
    assert log["fits"]
