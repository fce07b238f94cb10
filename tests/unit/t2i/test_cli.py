import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_models import small_config, small_model

from data_pipeline.images import open_frames
from data_pipeline.index import load_manifest
from t2i import cli
from t2i.config import SampleConfig
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.vq import VQConfig, VQModel, vq_folder

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "data": "--help",
    "data shapes": "--samples",
    "data index": "--min-size",
    "data ingest": "--caption-field",
    "tokenizer": "train",
    "tokenizer train": "--unquantized-steps",
    "encode": "--image-size",
    "plan": "--gpus-per-node",
    "export": "--step",
    "convert": "--n-kv-head",
    "sample": "--guidance-scale",
    "doctor": "--hostfile",
    "geneval": "run",
    "geneval prompts": "--per-task",
    "geneval generate": "--guidance-scale",
    "geneval score": "--counting-threshold",
    "geneval run": "--images-per-prompt",
    "geneval report": "--thumbnail",
    "score-classes": "--samples",
    "evaluate": "--reference",
}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["t2i", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *command.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: t2i {command} " in out
    assert COMMANDS[command] in out
    assert "MISSING" not in out


def test_help_names_all_commands_and_loads_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['t2i', '--help']\n"
        "from t2i.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "slow = {'torch', 'deepspeed', 'transformers', 'wandb'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("data", "tokenizer", "encode", "plan", "export", "convert", "sample", "bench", "doctor", "geneval"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "shapes", "--out", "OUT", "--samples", "0"], "samples (0)"),
        (["data", "shapes", "--out", "/dev/null"], "/dev/null"),
        (["data", "index", "OUT"], "is not a folder"),
        (["data", "ingest", "OUT/none.csv", "--out", "OUT"], "none.csv"),
        (["tokenizer", "train", "--data", "OUT", "--out", "OUT", "--image-size", "30"], "not a multiple of the stride"),
        (["tokenizer", "train", "--data", "OUT", "--out", "OUT/vq"], "has no manifest.json"),
        (["encode", "OUT", "--out", "OUT/encoded", "--image-size", "60"], "do not divide into tokens"),
        (["encode", "OUT", "--out", "OUT/encoded", "--image-size", "64"], "has no manifest.json"),
        (["export", "OUT", "--out", "OUT/export"], "has no whole checkpoint"),
        (["convert", "OUT/a.pt", "--out", "OUT/export"], "is no file; give a file of weights"),
        (["sample", "OUT", "a star"], "is no export"),
        (["sample", "OUT", "a star", "--images", "0"], "0 images of each"),
        (["geneval", "run", "OUT"], "is no export"),
        (["geneval", "report", "OUT"], "does not exist"),
        (["geneval", "report"], "no results to report"),
        (["score-classes", "OUT"], "is no export"),
        (["evaluate", "OUT"], "is no folder"),
        (["data", "shapes", "--out", "OUT", "--frames", "2"], "clips of 2 frames cannot be made"),
        (["data", "shapes", "--out", "OUT", "--frames", "4", "--single-object"], "not both"),
        (["bench", "decode", "--sizes", "Q"], "no size 'Q'"),
        (["sample", "OUT", "3", "--frame-ms", "5"], "frames of 5 ms are too short"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder with späces"
    assert call(monkeypatch, *(part.replace("OUT", str(folder)) for part in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_folder_of_the_wrong_kind_is_one_line_and_exit_code_2(
    raw_shapes: Path,
    encoded_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vq, out = vq_folder("shapes"), tmp_path / "out"
    file = tmp_path / "file"
    file.touch()
    encode = ("encode", raw_shapes, "--out", out, "--image-size")
    for arguments, message in (
        (("tokenizer", "train", "--data", encoded_shapes, "--out", out, "--validation", "16"), "holds no pictures"),
        (("tokenizer", "train", "--data", raw_shapes, "--out", out, "--image-size", "0"), "image_size is 0"),
        ((*encode, "64", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        ((*encode, "64", "--batch-size", "0"), "batch size 0"),
        ((*encode, "0"), "0 pixels do not divide into tokens"),
        ((*encode, "64", "--tokenizer", encoded_shapes), "has no config.json"),
        (("encode", file, "--out", out, "--image-size", "64"), "is not a folder"),
        (("data", "shapes", "--out", encoded_shapes), "was not made by this command"),
        (("sample", vq, "a star"), "no export: its config.json describes something else"),
        (("geneval", "run", vq), "no export: its config.json describes something else"),
        (("evaluate", vq), "no export: its config.json describes something else"),
    ):
        assert call(monkeypatch, *arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert not out.exists()


def class_export(folder: Path, grid: tuple[int, ...]) -> Path:
    """An untrained model of four classes for 16x16 pixels."""
    vq = VQModel(VQConfig(base_channels=32, channel_multipliers=(1, 1, 1), codebook_size=11))
    model = small_model(small_config(grid, condition="class"))
    TextToImagePipeline(model, vq, None, SampleConfig(), 16, Provenance("test", 1)).save_pretrained(folder)
    return folder


def test_classes_of_a_video_model_are_sampled_as_an_animation_or_as_film_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_export(tmp_path / "video", (3, 4, 4))
    ask = ("sample", folder, "3", "1", "--images", "2", "--out")
    assert call(monkeypatch, *ask, tmp_path / "new" / "clips.webp", "--frame-ms", "90") == 0
    assert f"4 clips in {tmp_path / 'new' / 'clips.webp'}" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "clips.webp") as image:
        assert (image.n_frames, image.size) == (3, (2 * 18 - 2, 2 * 18 - 2))
        image.load()
        assert image.info["duration"] == 90
    assert call(monkeypatch, *ask, tmp_path / "clips.png") == 0
    assert Image.open(tmp_path / "clips.png").size == (2 * (3 * 18 - 2) + 8, 2 * 16 + 8)
    frames = open_frames((tmp_path / "new" / "clips.webp").read_bytes())
    strips = Image.open(tmp_path / "clips.png")
    for t, frame in enumerate(frames):  # the same clips either way: here the second one of the first class
        assert strips.crop((60 + 18 * t, 0, 76 + 18 * t, 16)).tobytes() == frame.crop((18, 0, 34, 16)).tobytes()


def test_a_class_model_of_pictures_is_sampled_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_export(tmp_path / "pictures", (4, 4))
    for name in ("a.png", "a.webp", "a.gif"):
        assert call(monkeypatch, "sample", folder, "0", "3", "--images", "3", "--out", tmp_path / name) == 0
        with Image.open(tmp_path / name) as image:
            assert (image.size, getattr(image, "n_frames", 1)) == ((3 * 18 - 2, 2 * 18 - 2), 1)
    capsys.readouterr()
    for arguments, message in (
        (("0", "--out", tmp_path / "a.webp", "--frame-ms", "100"), "draws still pictures; leave it out"),
        (("star",), "draws classes; give whole numbers, not 'star'"),
        (("4",), "4 is no class of this model; give whole numbers from 0 to 3"),
    ):
        assert call(monkeypatch, "sample", folder, *arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("grid", "size", "passes"), [((4, 4), (34, 16), 7), ((3, 4, 4), (2 * 52 + 8, 16), 9)])
def test_samples_are_watched_as_they_come_into_being(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...], size: tuple[int, int], passes: int
) -> None:
    folder = class_export(tmp_path / "export", grid)
    ask = ("sample", folder, "0", "--images", "2", "--out", tmp_path / "a.png", "--watch")
    assert call(monkeypatch, *ask, tmp_path / "new" / "a.webp") == 0
    with Image.open(tmp_path / "new" / "a.webp") as image:
        assert (image.n_frames, image.size) == (passes, size)
    assert call(monkeypatch, *ask, tmp_path / "a.png") == 2


def test_a_pace_for_film_strips_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_export(tmp_path / "video", (3, 4, 4))
    assert call(monkeypatch, "sample", folder, "0", "--out", tmp_path / "a.png", "--frame-ms", "100") == 2
    assert (
        "a.png is a still picture; leave it out, or write clips of a video model to a .webp" in capsys.readouterr().err
    )
    assert not (tmp_path / "a.png").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t2i.cli", "sample", str(tmp_path), "a photo of a star"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["encode"], ["sample"], ["data", "shapes"], ["nothing"], ["export", "a", "b"], ["convert", "a.pt"]]
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_data_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    made = ("data", "shapes", "--out", out, "--samples", "12", "--shard-size", "6", "--workers", "1")
    assert call(monkeypatch, *made) == 0
    assert f"12 samples in {out}; next: t2i data index {out}" in capsys.readouterr().out
    assert call(monkeypatch, "--local_rank=0", "data", "index", out) == 0  # as the launcher calls it
    assert load_manifest(out).samples == 12
    assert "12" in capsys.readouterr().out
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for n in range(3):
        Image.new("RGB", (20, 20), (n, 0, 0)).save(pairs / f"{n}.png")
        (pairs / f"{n}.txt").write_text(f"Picture {n}")
    assert call(monkeypatch, "data", "ingest", pairs, "--out", tmp_path / "ingested", "--lowercase") == 0
    assert call(monkeypatch, "data", "index", tmp_path / "ingested") == 0
    assert load_manifest(tmp_path / "ingested").samples == 3


def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.shapes_set.write_shards", interrupted)
    assert call(monkeypatch, "data", "shapes", "--out", tmp_path / "set") == 130
    assert capsys.readouterr().err == "interrupted; nothing half written will be used, run the same command again\n"
