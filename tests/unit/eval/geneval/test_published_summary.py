"""results.jsonl in the hands of the published summary script, which reads it with pandas and groups it."""

import json
from pathlib import Path

import pandas
import pytest
from PIL import Image

from data_pipeline import shapes
from eval.geneval.prompts import shapes_prompts
from t2i import cli

PROMPTS = shapes_prompts(per_task=3)
PICTURES = 3
WRONG = {0: (0,), 4: (0, 1, 2), 5: (1,), 8: (0, 1, 2), 9: (2,), 17: (0, 1)}
"""Prompt -> which of its pictures show nothing."""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `t2i geneval score` leaves of pictures that are right, wrong, unreadable (of prompt 12), or fewer (of prompt 2)."""
    for number, metadata in enumerate(PROMPTS):
        samples = tmp_path / f"images/{number:05d}/samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        for picture in range(PICTURES):
            image = Image.fromarray(shapes.ground_truth(metadata, PICTURES * number + picture).image)
            if picture in WRONG.get(number, ()):
                image = Image.new("RGB", image.size, "#888888")
            image.save(samples / f"{picture:04d}.png")
    (tmp_path / "images/00012/samples/0001.png").write_bytes(b"no picture")
    (tmp_path / "images/00002/samples/0002.png").unlink()
    out = tmp_path / "results"
    monkeypatch.setattr(
        "sys.argv", ["t2i", "geneval", "score", f"{tmp_path}/images", "--judge", "shapes", "--out", f"{out}"]
    )
    cli.main()
    return out


def test_pandas_finds_the_scores_that_the_summary_tells(results: Path) -> None:
    table = pandas.read_json(results / "results.jsonl", lines=True, orient="records")
    assert len(table) == PICTURES * len(PROMPTS) - 1
    assert table["correct"].dtype == bool
    # Pictures of a prompt are those with the same metadata, letter by letter.
    assert [json.loads(metadata) for metadata in table["metadata"].unique()] == PROMPTS
    by_task = table.groupby("tag", sort=False)["correct"]
    right_prompts = table.groupby("metadata")["correct"].any()

    scores = json.loads((results / "summary.json").read_text())["scores"]
    assert list(by_task.groups) == [task["tag"] for task in scores["tasks"]]
    for task in scores["tasks"]:
        of_task = by_task.get_group(task["tag"])
        assert (task["correct"], task["images"]) == (of_task.sum(), len(of_task))
        assert task["per_image"]["value"] == pytest.approx(of_task.mean())
    assert scores["overall"]["per_image"]["value"] == pytest.approx(by_task.mean().mean())
    right = sum(task["per_prompt"]["value"] * task["prompts"] for task in scores["tasks"])
    assert right == pytest.approx(right_prompts.sum())
    # And what was made wrong above, no more and no less, is wrong.
    wrong = sum(map(len, WRONG.values())) + 1
    assert (~table["correct"]).sum() == wrong
    assert len(right_prompts) - right_prompts.sum() == sum(len(one) == PICTURES for one in WRONG.values())
