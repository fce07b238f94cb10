import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.index import load_manifest
from t2i import cli
from t2i.vq import vq_folder

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "data": "--help",
    "data shapes": "--samples",
    "data index": "--min-size",
    "data ingest": "--caption-field",
    "tokenizer": "train",
    "tokenizer train": "--unquantized-steps",
    "encode": "--image-size",
    "export": "--step",
    "sample": "--guidance-scale",
    "geneval": "run",
    "geneval run": "--images-per-prompt",
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
    for command in ("data", "tokenizer", "encode", "export", "sample", "geneval"):
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
        (["sample", "OUT", "a star"], "is no export"),
        (["sample", "OUT", "a star", "--images", "0"], "0 images of each"),
        (["geneval", "run", "OUT"], "is no export"),
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
    ):
        assert call(monkeypatch, *arguments) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert not out.exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t2i.cli", "sample", str(tmp_path), "a photo of a star"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["encode"], ["sample"], ["data", "shapes"], ["nothing"], ["export", "a", "b"]])
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
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.shapes_set.write_shards", interrupted)
    assert call(monkeypatch, "data", "shapes", "--out", tmp_path / "set") == 130
    assert capsys.readouterr().err == "interrupted; nothing half written will be used, run the same command again\n"
