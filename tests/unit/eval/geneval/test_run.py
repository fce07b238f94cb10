"""The whole evaluation of a small random export: files, counts, resuming, and that nothing stale is ever reused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import shapes
from eval.files import read_jsonl
from eval.geneval import run
from eval.geneval.run import run_geneval
from t2i.pipeline import TextToImagePipeline

SMALL = {"per_task": 2, "images_per_prompt": 2, "batch_size": 8, "progress": False}
PICTURES = 6 * 2 * 2
PUBLISHED_FIELDS = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}


@pytest.fixture(scope="module")
def finished(make_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export and the folder of its evaluation."""
    export, out = make_export(), tmp_path_factory.mktemp("out") / "geneval"
    metrics = out.parent / "metrics.jsonl"
    metrics.write_text('{"step": 10, "loss": 6.9}\n{"step": 20, "loss": 6.5}\n{"step": 20, "val_loss": 6.6}\n')
    run_geneval(export, out, run_dir=out.parent, **SMALL)
    return export, out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many pictures each call of a pipeline draws."""
    calls: list[int] = []
    draw = TextToImagePipeline.tokens

    def counting(self: TextToImagePipeline, prompts: list[str], *args: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return draw(self, prompts, *args, **options)

    monkeypatch.setattr(TextToImagePipeline, "tokens", counting)
    return calls


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_counts_add_up(finished: tuple[Path, Path]) -> None:
    _, out = finished
    rows = read_jsonl(out / "results.jsonl")
    prompts = read_jsonl(out / "evaluation_metadata.jsonl")
    assert len(prompts) == 12
    assert (out / "generation_prompts.txt").read_text().splitlines() == [p["prompt"] for p in prompts]
    assert len(rows) == len({row["filename"] for row in rows}) == PICTURES
    assert len(list(out.glob("pictures/*/*/samples/*.png"))) == PICTURES
    for row in rows:
        assert set(row) >= PUBLISHED_FIELDS
        assert (out / row["filename"]).is_file()
        assert bool(row["reason"]) != row["correct"]
    for name in ("ground_truth", "reconstruction"):
        assert len(read_jsonl(out / f"ceiling/{name}.jsonl")) == PICTURES


def test_summary_agrees_with_results(finished: tuple[Path, Path]) -> None:
    _, out = finished
    rows, summary = read_jsonl(out / "results.jsonl"), json.loads((out / "summary.json").read_text())
    assert summary["model"]["step"] == 30
    assert [task["tag"] for task in summary["scores"]["tasks"]] == list(shapes.TASKS)
    for task in summary["scores"]["tasks"]:
        mine = [row for row in rows if row["tag"] == task["tag"]]
        assert (task["images"], task["prompts"], task["correct"]) == (4, 2, sum(row["correct"] for row in mine))
        assert task["per_image"]["low"] <= task["per_image"]["value"] <= task["per_image"]["high"]
    assert summary["ceilings"]["ground truth"]["overall"]["per_image"]["value"] == 1.0


def test_prints_the_table_and_last_the_report(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, out = finished
    shutil.copytree(out, tmp_path / "out")
    run_geneval(export, tmp_path / "out", **SMALL)
    printed = capsys.readouterr().out
    for word in (*shapes.TASKS, "overall", "ground", "reconstruction", "step 30"):
        assert word in printed
    assert printed.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"


def test_a_second_call_only_renders(finished: tuple[Path, Path], drawn: list[int], monkeypatch: Any) -> None:
    export, out = finished
    before = files(out)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("judged again")

    monkeypatch.setattr(run, "judge_pictures", refuse)
    monkeypatch.setattr("eval.geneval.score.judged", refuse)
    monkeypatch.setattr(TextToImagePipeline, "from_pretrained", refuse)
    run_geneval(export, out, run_dir=out.parent, **SMALL)
    assert drawn == []
    assert files(out) == before


def test_an_interrupted_run_resumes(
    finished: tuple[Path, Path], tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    export, out = finished
    real = TextToImagePipeline.tokens

    def interrupted(self: TextToImagePipeline, *args: Any, **options: Any) -> Any:
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_geneval(export, tmp_path / "cut", **SMALL)
    run_geneval(export, tmp_path / "cut", run_dir=out.parent, **SMALL)
    assert sum(drawn) == PICTURES
    whole, cut = files(out), files(tmp_path / "cut")

    def lasting(found: dict[str, bytes]) -> dict[str, bytes]:  # the others say when pictures were made or judged
        return {k: v for k, v in found.items() if k not in ("summary.json", "report.html") and "parts" not in k}

    assert lasting(cut) == lasting(whole)
    assert {k for k in cut if "parts" in k} == {k for k in whole if "parts" in k}


def test_another_model_gets_pictures_of_its_own(
    make_export: Callable[..., Path], tmp_path: Path, drawn: list[int]
) -> None:
    export = make_export(tmp_path / "export", seed=0)
    run_geneval(export, export / "geneval", **SMALL)
    first = read_jsonl(export / "geneval/results.jsonl")
    make_export(export, seed=1, step=60)
    run_geneval(export, export / "geneval", **SMALL)
    second = read_jsonl(export / "geneval/results.jsonl")
    assert sum(drawn) == 2 * PICTURES
    assert not {row["filename"] for row in first} & {row["filename"] for row in second}
    assert "step 60" in (export / "geneval/report.html").read_text()
    # And back again: the first model's pictures are still there, and it is its results that are shown.
    make_export(export, seed=0)
    run_geneval(export, export / "geneval", **SMALL)
    assert sum(drawn) == 2 * PICTURES
    assert read_jsonl(export / "geneval/results.jsonl") == first


def test_other_prompts_and_more_pictures(finished: tuple[Path, Path], tmp_path: Path, drawn: list[int]) -> None:
    export, out = finished
    shutil.copytree(out, tmp_path / "out")
    run_geneval(export, tmp_path / "out", **{**SMALL, "images_per_prompt": 3})
    assert sum(drawn) == 12
    assert len(read_jsonl(tmp_path / "out/results.jsonl")) == 36
    assert len(read_jsonl(tmp_path / "out/ceiling/ground_truth.jsonl")) == 36
    run_geneval(export, tmp_path / "out", **{**SMALL, "per_task": 1})
    assert sum(drawn) == 24
    assert len(read_jsonl(tmp_path / "out/results.jsonl")) == 12


def test_a_damaged_picture_is_named_and_counted(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, out = finished
    shutil.copytree(out, tmp_path / "out")
    name = read_jsonl(out / "results.jsonl")[5]["filename"]
    (tmp_path / "out" / name).write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    (tmp_path / "out/results.jsonl").unlink()
    run_geneval(export, tmp_path / "out", **SMALL)
    unreadable = [row for row in read_jsonl(tmp_path / "out/results.jsonl") if row.get("unreadable")]
    assert [row["filename"] for row in unreadable] == [name]
    assert "1 pictures could not be read" in capsys.readouterr().out


def test_mistakes_are_one_sentence(finished: tuple[Path, Path], tmp_path: Path) -> None:
    export, _ = finished
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "nowhere", {}, "nowhere is no export"),
        (export, {"judge": "owl"}, "unknown judge 'owl'"),
        (export, {"per_task": 0}, "per task is 0"),
        (export, {"images_per_prompt": 0}, r"images per prompt \(0\)"),
        (export, {"run_dir": tmp_path}, "has no metrics.jsonl"),
    ]
    for folder, options, message in cases:
        with pytest.raises(ValueError, match=message):
            run_geneval(folder, tmp_path / "out", **{**SMALL, **options})
    assert not list(tmp_path.rglob("*.png"))


def test_exports_that_the_judge_cannot_see_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    export, _ = finished
    for key, value, message in (("image_size", 256, "256x256"), ("model", {"condition": "class"}, "draws classes")):
        description = json.loads((export / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**description, key: value}))
        with pytest.raises(ValueError, match=message):
            run_geneval(tmp_path, tmp_path / "out", judge="shapes", **SMALL)
