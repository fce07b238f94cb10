"""The geneval commands as they are typed: exact prompts, shares of ranks, resuming, both judges from export to report."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.files import read_jsonl
from eval.geneval.prompts import read_prompts
from t2i import cli
from t2i.pipeline import TextToImagePipeline

PUBLISHED = {
    "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    "generation_prompts.txt": "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
}
Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """call("prompts", "--out", folder, rank=(0, 3)) -> exit code of `t2i geneval prompts ...` on that rank."""

    def run(*arguments: str | Path, rank: tuple[int, int] | None = None) -> int:
        with monkeypatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                patch.delenv(name, raising=False)
            launched = []
            if rank is not None:
                patch.setenv("RANK", str(rank[0]))
                patch.setenv("WORLD_SIZE", str(rank[1]))
                patch.setenv("LOCAL_RANK", str(rank[0]))
                launched = [f"--local_rank={rank[0]}"]  # which DeepSpeed's launcher puts first
            patch.setattr("sys.argv", ["t2i", *launched, "geneval", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as exit:
                return exit.code if isinstance(exit.code, int) else 1
        return 0

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_prompts_writes_the_published_files(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prompts", "--out", tmp_path) == 0
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files(tmp_path).items()} == PUBLISHED
    assert f"553 prompts in {tmp_path}" in capsys.readouterr().out
    assert call("prompts", "--seed", "43", "--per-task", "100", "--out", tmp_path / "again") == 0
    assert files(tmp_path / "again") == {name: (tmp_path / name).read_bytes() for name in PUBLISHED}
    assert call("prompts", "--seed", "44", "--per-task", "3", "--out", tmp_path / "other") == 0
    assert len(read_prompts(tmp_path / "other")) == 80 + 5 * 3
    assert call("prompts", "--classes", "shapes", "--per-task", "2", "--out", tmp_path / "shapes") == 0
    assert len(read_prompts(tmp_path / "shapes")) == 12
    assert call("prompts", "--per-task", "0", "--out", tmp_path) == 2


@pytest.fixture(scope="module")
def export(make_export: Callable[..., Path]) -> Path:
    return make_export()


@pytest.fixture
def prompts(call: Call, tmp_path: Path) -> Path:
    assert call("prompts", "--classes", "shapes", "--per-task", "2", "--out", tmp_path / "prompts") == 0
    return tmp_path / "prompts"


def test_one_rank_and_three_draw_the_same_files(call: Call, export: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["generate", export, "--prompts", prompts, "--images-per-prompt", "3"]
    assert call(*arguments, "--out", tmp_path / "one") == 0
    for rank in (1, 2, 0):
        assert call(*arguments, "--out", tmp_path / "three", "--batch-size", "5", rank=(rank, 3)) == 0
        assert len(list((tmp_path / "three").glob("*/samples/*.png"))) % 12 == 0
    one = files(tmp_path / "one")
    assert files(tmp_path / "three") == one
    assert sum(name.endswith(".png") for name in one) == 12 * 4  # with the grids
    assert len({content for name, content in one.items() if "samples" in name}) == 36


def test_deleted_pictures_are_drawn_again_and_no_others(
    call: Call, export: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = TextToImagePipeline.tokens

    def counted(self: TextToImagePipeline, items: list[str], *args: object, **options: object) -> object:
        drawn.append(len(items))
        return draw(self, items, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TextToImagePipeline, "tokens", counted)
    arguments = ["generate", export, "--prompts", prompts, "--out", tmp_path / "images", "--images-per-prompt", "2"]
    assert call(*arguments, "--batch-size", "100") == 0
    assert drawn == [24]  # a batch is as large as was asked for, across prompts
    whole = files(tmp_path / "images")
    for name in ("00003/samples/0001.png", "00007/samples/0000.png", "00008/grid.png"):
        (tmp_path / "images" / name).unlink()
    (tmp_path / "images/00003/samples/.0001.png.partial").touch()  # left by a kill
    for rank in range(3):
        assert call(*arguments, rank=(rank, 3)) == 0
    assert drawn == [24, 1, 1]
    (tmp_path / "images/00003/samples/.0001.png.partial").unlink()
    assert files(tmp_path / "images") == whole


def test_sampling_options_reach_the_pictures_and_are_not_mixed(
    call: Call, export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", export, "--prompts", prompts, "--images-per-prompt", "1"]
    assert call(*arguments, "--out", tmp_path / "plain") == 0
    greedy = ["--temperature", "0", "--guidance-scale", "2.5", "--guidance-share", "0.5"]
    assert call(*arguments, *greedy, "--out", tmp_path / "greedy") == 0
    settings = json.loads((tmp_path / "greedy/generation.json").read_text())
    assert settings["sampling"] == {"temperature": 0.0, "guidance_scale": 2.5, "guidance_share": 0.5}
    assert json.loads((tmp_path / "plain/generation.json").read_text())["sampling"] == {}
    name = "00000/samples/0000.png"
    assert (tmp_path / "plain" / name).read_bytes() != (tmp_path / "greedy" / name).read_bytes()
    assert call(*arguments, "--out", tmp_path / "greedy") == 2
    assert "another model, seed or sampling setting" in capsys.readouterr().err
    assert call(*arguments, "--seed", "5", "--out", tmp_path / "seeded") == 0
    assert (tmp_path / "plain" / name).read_bytes() != (tmp_path / "seeded" / name).read_bytes()


@pytest.fixture
def images(call: Call, export: Path, prompts: Path, tmp_path: Path) -> Path:
    assert call("generate", export, "--prompts", prompts, "--out", tmp_path / "images", "--images-per-prompt", "2") == 0
    return tmp_path / "images"


def test_score_prints_a_table_or_json(
    call: Call, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("score", images, "--judge", "shapes", "--out", tmp_path / "results") == 0
    out = capsys.readouterr().out
    for word in ("single_object", "color_attr", "overall", "0/24", "0.000 [0.000, 0.", "results.jsonl"):
        assert word in out
    assert call("score", images, "--judge", "shapes", "--out", tmp_path / "results", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "results/summary.json").read_text())
    overall = document["scores"]["overall"]
    for name in ("per_image", "per_prompt"):
        assert set(overall[name]) == {"value", "low", "high"}
    assert document["images"] == str(images)


def test_ranks_score_their_shares_and_the_last_one_reports(
    call: Call, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    for rank, missing in ((2, 8), (0, 4)):
        capsys.readouterr()
        assert call("score", images, "--judge", "shapes", "--out", out, rank=(rank, 3)) == 0
        assert capsys.readouterr().out == (
            f"rank {rank} of 3 has finished its share; {missing} prompts have no verdicts yet: the last rank to finish "
            f"writes {out}\n"
        )
        assert not (out / "results.jsonl").exists()
    assert call("score", images, "--judge", "shapes", "--out", out, rank=(1, 3)) == 0
    assert "overall" in capsys.readouterr().out
    assert len(read_jsonl(out / "results.jsonl")) == 24


def neural(small_detector: Path, small_clip: Path) -> list[str | Path]:
    return [
        "--judge", "mask2former", "--detector", small_detector, "--detector-size", "64", "64", "--clip",
        f"local-dir:{small_clip}", "--threshold", "0.02", "--counting-threshold", "0.02", "--max-overlap", "0.9",
    ]  # fmt: skip


def test_run_with_mask2former_from_export_to_report(
    call: Call, export: Path, small_detector: Path, small_clip: Path, tmp_path: Path
) -> None:
    arguments = [
        "run", export, "--per-task", "1", "--images-per-prompt", "1", *neural(small_detector, small_clip),
    ]  # fmt: skip
    out = tmp_path / "out"
    for rank in (1, 0):
        assert call(*arguments, "--out", out, rank=(rank, 2)) == 0
        assert (out / "report.html").exists() == (rank == 0)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["judge"], summary["ceilings"], summary["model"]["step"]) == ("mask2former", {}, 30)
    assert summary["made_from"]["scoring"]["max_overlap"] == 0.9
    assert summary["scores"]["overall"]["images"] == 85
    rows = read_jsonl(out / "results.jsonl")
    assert len(rows) == 85
    assert all((out / row["filename"]).is_file() for row in rows)
    assert "a photo of" in (out / "report.html").read_text()


def test_run_on_ranks_with_the_shapes_judge_and_options(
    call: Call, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", export, "--per-task", "1", "--images-per-prompt", "2", "--temperature", "0.5", "--seed", "3"]
    assert call(*arguments, "--out", tmp_path / "out", rank=(0, 2)) == 0
    assert "rank 0 of 2 has finished its share; 3 prompts have no verdicts yet" in capsys.readouterr().out
    assert call(*arguments, "--out", tmp_path / "out", rank=(1, 2)) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["judge"], summary["seed"], summary["sampling"]) == ("shapes", 3, {"temperature": 0.5})
    assert summary["ceilings"]["ground truth"]["overall"]["per_image"]["value"] == 1.0
    first = [row["filename"] for row in read_jsonl(tmp_path / "out/results.jsonl")]
    # A call with other options that has not finished leaves nothing that looks like its results.
    capsys.readouterr()
    assert call(*arguments[:-4], "--out", tmp_path / "out", rank=(0, 2)) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.*") if path.suffix in (".html", ".json")] == []
    assert not (tmp_path / "out/results.jsonl").exists()
    assert "results.jsonl, summary.json, report.html in" in capsys.readouterr().err
    assert call(*arguments[:-4], "--out", tmp_path / "out") == 0
    second = [row["filename"] for row in read_jsonl(tmp_path / "out/results.jsonl")]
    assert len(first) == len(second) == 12
    assert not set(first) & set(second)  # drawn in another way, so in another folder


def test_the_judge_is_chosen_by_the_size_of_pictures(
    call: Call, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    large = tmp_path / "export"
    shutil.copytree(export, large)
    description = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**description, "image_size": 256}))
    assert call("run", large) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "detector facebook/mask2former-swin-small-coco-instance is not on this machine" in line
    assert "hf download facebook/mask2former-swin-small-coco-instance --local-dir DIR" in line
    assert not (large / "geneval").exists()


def test_mistakes_are_one_line(
    call: Call, export: Path, images: Path, small_detector: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    out = ["--out", tmp_path / "results"]
    clip_only = ["score", images, *out, "--detector", small_detector]
    cases: list[tuple[list[str | Path], str]] = [
        (["generate", tmp_path, "--prompts", tmp_path, *out], "is no export"),
        (["generate", export, "--prompts", tmp_path / "nothing", *out], "nothing does not exist"),
        (["generate", export, "--prompts", tmp_path / "prompts", *out, "--batch-size", "0"], "batch size 0"),
        (["score", tmp_path / "nothing", *out], "has no folders 00000, 00001"),
        (["score", images, *out], "run `hf download facebook/mask2former-swin-small-coco-instance --local-dir DIR`"),
        (clip_only, "run `hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safetensors --local-dir DIR`"),
        ([*clip_only, "--clip-pretrained", tmp_path / "no.pt"], "is no file and no tag of ViT-L-14"),
        (["score", images, *out, "--judge", "shapes", "--threshold", "1.5"], "threshold is 1.5"),
        (["score", images, *out, "--judge", "shapes", "--clip", "ViT-B-32"], "--clip is not for the judge 'shapes'"),
        (["run", export, "--judge", "shapes", "--batch-size", "0"], "batch size (0)"),
    ]  # fmt: skip
    capsys.readouterr()
    for arguments, message in cases:
        assert call(*arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
    assert call("score", images, *out, "--judge", "shapes", rank=(3, 3)) == 2
    assert "RANK is 3 and WORLD_SIZE 3" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_pictures_about_something_else_than_the_judge_knows_are_refused(
    call: Call, images: Path, small_detector: Path, small_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("score", images, "--out", tmp_path / "results", *neural(small_detector, small_clip)) == 2
    assert "which the judge 'mask2former' does not know; choose the other judge" in capsys.readouterr().err
