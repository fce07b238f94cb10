import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import call
from test_convert import GRIDS, raster_weights
from torch import Tensor

from t2i.convert import load_official_llamagen, load_official_nar
from t2i.convert_files import convert, read_checkpoint
from t2i.pipeline import TextToImagePipeline
from t2i.sampling import generate
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import VQConfig, VQModel

PROMPTS = ["a photo of a red circle", "a photo of a blue star above a heart"]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose states have the width that the text fixture takes."""
    folder = tmp_path_factory.mktemp("t5")
    train_sentencepiece(PROMPTS, 285, folder / "words.model")
    torch.manual_seed(0)
    config = TextEncoderConfig(vocab_size=285, dim=24, n_layer=1, n_head=2, ffn_dim=16, max_length=120)
    TextEncoder.from_config(config, folder / "words.model").save_pretrained(folder / "t5")
    return folder / "t5"


@pytest.fixture
def vq_file(tmp_path: Path) -> Callable[[int], Path]:
    """vq_file(96) -> a published tokenizer file of that many codes, of stride 4."""

    def write(codes: int) -> Path:
        torch.manual_seed(0)
        vq = VQModel(VQConfig(32, (1, 1, 2), 1, 32, codebook_size=codes))
        torch.save({"model": vq.state_dict(), "optimizer": {}}, tmp_path / f"vq{codes}.pt")
        return tmp_path / f"vq{codes}.pt"

    return write


def write_weights(path: Path, weights: dict[str, Tensor], entry: str | None = "model", **others: Any) -> Path:
    torch.save(weights | others if entry is None else {entry: weights, **others}, path)
    return path


# Files


@pytest.mark.parametrize("entry", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_weights_are_found_at_the_top_level_or_in_an_entry(tmp_path: Path, entry: str | None, suffix: str) -> None:
    weights = {"norm.weight": torch.rand(3), "layers.0.ffn_norm.weight": torch.rand(2).bfloat16()}
    read = read_checkpoint(write_weights(tmp_path / f"0005{suffix}", weights, entry))
    assert read.step == 0
    assert list(read.weights) == list(weights)
    assert all(torch.equal(read.weights[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_names_is_taken_off(tmp_path: Path, prefix: str) -> None:
    weights = {f"{prefix}norm.weight": torch.rand(3), f"{prefix}layers.0.module.weight": torch.rand(3)}
    read = read_checkpoint(write_weights(tmp_path / "a.pt", weights))
    assert list(read.weights) == ["norm.weight", "layers.0.module.weight"]
    weights["norm.weight"] = torch.rand(3)
    with pytest.raises(ValueError, match=r"a\.pt holds the same weights with and without module\. or _orig_mod\."):
        read_checkpoint(write_weights(tmp_path / "a.pt", weights))


def test_a_training_checkpoint_with_its_arguments_opens_and_tells_its_step(tmp_path: Path) -> None:
    arguments = argparse.Namespace(gpt_model="GPT-L", betas=(0.9, 0.95), gpu=torch.device("cpu"), dtype=torch.bfloat16)
    others = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "steps": 7000, "args": arguments}
    read = read_checkpoint(write_weights(tmp_path / "0007000.pt", {"norm.weight": torch.rand(3)}, **others))
    assert (read.step, list(read.weights)) == (7000, ["norm.weight"])


def test_the_video_trainers_nesting_and_files_of_old_versions_of_torch_open(tmp_path: Path) -> None:
    weights = {"norm_R.weight": torch.rand(3)}
    nested = {"model": {"name": "larp_ar", "args": {"dim": 3}, "sd": weights}, "epoch": 3}
    torch.save(nested, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "a.pth").weights["norm_R.weight"], weights["norm_R.weight"])


def test_safetensors_open(tmp_path: Path) -> None:
    save_file({"module.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "model.safetensors").weights["norm.weight"], torch.ones(3))


class Runs:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("new", [True, False])
def test_no_code_of_a_file_is_run(tmp_path: Path, new: bool) -> None:
    content = {"model": {"norm.weight": torch.ones(3)}, "args": Runs(tmp_path / "made")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(
        ValueError, match=r"a\.pt holds a Python object, (posix|nt)\.mkdir, which could run code"
    ) as error:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def test_objects_other_than_a_namespace_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": {}, "loss": np.float32(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds a Python object, numpy\.\w+\.multiarray\.scalar"):
        read_checkpoint(tmp_path / "a.pt")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", lambda p: None, "is no file; give a file of weights that ends in one of .pt .pth"),
        ("a.pt", lambda p: p.mkdir(), "is a folder; give"),
        ("a.txt", lambda p: p.write_text("x"), "is no file of weights; give"),
        ("a.pt", lambda p: p.write_text("\n<!DOCTYPE html><html>"), "is a web page in place of the weights"),
        ("a.pt", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        ("a.pt", lambda p: p.write_bytes(b""), "is damaged or no file of torch.save"),
        ("a.pt", lambda p: p.write_bytes(b"GIF89a" * 50), "is damaged or no file of torch.save"),
        ("a.pt", lambda p: (torch.save({"a": torch.ones(9)}, p), cut(p)), "is damaged or no file of torch.save"),
        ("a.safetensors", lambda p: p.write_text("<html>" * 9), r"is damaged or no safetensors file \(Error"),
        ("a.safetensors", lambda p: (save_file({"a": torch.ones(99)}, p), cut(p)), "is damaged or no safetensors file"),
        ("a.pt", lambda p: torch.save(torch.ones(3), p), "holds no weights, but a Tensor"),
        ("a.pt", lambda p: torch.save([torch.ones(3)], p), "holds no weights, but a list"),
        ("a.pt", lambda p: torch.save({}, p), "holds no weights, but a dict of 0 entries"),
        ("a.pt", lambda p: torch.save({"model": 3}, p), "holds no weights, but a int"),
        (
            "a.pt",
            lambda p: torch.save({"ema": {"a": torch.ones(1)}, "epoch": 3}, p),
            r"holds no weights under ema, epoch, but a dict of 1 entries; give a file whose top level, or its entry model",
        ),
        ("a.pt", lambda p: torch.save({3: torch.ones(1)}, p), "holds no weights under 3, but a Tensor"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_refused_in_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


# Exports


def published(reference: Callable[[str], Any], kind: str) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    name = {"text": "nar_t2i", "class": "nar_c2i", "video": "nar_video", "raster": "nar_t2i", "warm-start": "nar_c2i"}[
        kind
    ]
    weights = reference(name).weights
    return raster_weights(weights) if kind in ("raster", "warm-start") else weights, GRIDS[name]


@pytest.mark.parametrize("kind", ["text", "class", "video", "raster", "warm-start"])
def test_published_files_become_an_export_that_draws_the_models_tokens(
    reference: Callable[[str], Any],
    vq_file: Callable[[int], Path],
    text_encoder: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, grid = published(reference, kind)
    checkpoint = write_weights(tmp_path / "0000300.pt", weights, steps=300, args=argparse.Namespace(lr=1e-4))
    codes = len(weights["tok_embeddings.weight"])
    text = kind in ("text", "raster")
    arguments: list[str | Path] = ["convert", checkpoint, "--out", tmp_path / "export", "--n-head", "4"]
    arguments += ["--grid", *map(str, grid), "--vq", vq_file(codes)]
    arguments += ["--kind", kind] if kind in ("raster", "warm-start") else []
    arguments += ["--text-encoder", text_encoder] if text else []
    assert call(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert f"grid {'x'.join(map(str, grid))}, 4 heads" in printed
    assert printed.startswith("raster model of " if kind == "raster" else "NAR model of ")

    pipe = TextToImagePipeline.from_pretrained(tmp_path / "export")
    assert (pipe.provenance.recipe, pipe.provenance.step) == ("0000300.pt", 300)
    assert pipe.sample.guidance_scale == {"text": 7.5, "raster": 7.5, "video": 1.25}.get(kind, 2.0)
    assert pipe.image_size == grid[-1] * 4
    load = load_official_llamagen if kind == "raster" else load_official_nar
    options = {"warm_start": True} if kind == "warm-start" else {}
    model = load(weights, grid=grid, n_head=4, **options)
    prompts: Any = PROMPTS if text else [0, 3]
    condition, mask = (
        TextEncoder.from_pretrained(text_encoder).encode(PROMPTS) if text else (torch.tensor([0, 3]), None)
    )
    expected = generate(model, condition, mask, guidance_scale=pipe.sample.guidance_scale, temperature=0)
    assert torch.equal(pipe.tokens(prompts, temperature=0.0), expected)
    if kind != "video":
        assert [image.size for image in pipe(prompts, seed=0)] == [(grid[-1] * 4, grid[-2] * 4)] * 2


def test_without_a_tokenizer_an_export_gives_tokens_and_says_how_to_get_pictures(
    reference: Callable[[str], Any],
    text_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(reference("nar_t2i").weights, tmp_path / "nar.safetensors")
    out = tmp_path / "export"
    convert(tmp_path / "nar.safetensors", out, grid=(5, 5), n_head=4, text_encoder=str(text_encoder))
    pipe = TextToImagePipeline.from_pretrained(out)
    assert (pipe.vq, pipe.image_size, pipe.provenance.step) == (None, 5 * 16, 0)
    assert not (out / "tokenizer").exists()
    assert pipe.tokens(PROMPTS, seed=0).shape == (2, 5, 5)
    for draw in (
        lambda: pipe(PROMPTS),
        lambda: pipe.decode(torch.zeros(1, 5, 5, dtype=torch.int64)),
        lambda: pipe.encode_decode(np.zeros((1, 64, 64, 3), np.uint8)),
    ):
        with pytest.raises(
            ValueError, match=r"nar\.safetensors has no image tokenizer: .*`t2i convert \.\.\. --vq TOK"
        ):
            draw()
    for arguments in (("sample", out, "a star", "--out", tmp_path / "a.png"), ("geneval", "run", out)):
        assert call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "has no image tokenizer" in error
    assert not (tmp_path / "a.png").exists()
    assert not (out / "geneval").exists()


@pytest.mark.parametrize("width", [768, 1024, 1280, 1536, 2048, 3200, 128])
def test_heads_and_grid_are_the_published_ones_unless_given(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(weights: dict[str, Tensor], **sizes: Any) -> None:
        asked.update(sizes)
        raise ValueError("seen")

    monkeypatch.setattr("t2i.convert_files.load_official_nar", load)
    weights = {"tok_embeddings.weight": torch.zeros(1, width)}
    with pytest.raises(ValueError, match="seen"):
        convert(write_weights(tmp_path / "a.pt", weights), tmp_path / "out")
    heads = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 3200: 32, 128: 2}[width]
    assert asked == {"grid": (16, 16), "n_head": heads, "n_kv_head": None}
    weights["abs_pe"] = torch.zeros(1, 1 + 4 * 16 * 16, 1)
    with pytest.raises(ValueError, match="seen"):
        convert(write_weights(tmp_path / "a.pt", weights), tmp_path / "out", n_head=4, n_kv_head=2)
    assert asked == {"grid": (4, 16, 16), "n_head": 4, "n_kv_head": 2}


def test_the_sampling_options_of_an_export_may_be_given(reference: Callable[[str], Any], tmp_path: Path) -> None:
    checkpoint = write_weights(tmp_path / "c2i.pt", reference("nar_c2i").weights)
    options: dict[str, Any] = {"guidance_scale": 1.5, "temperature": 0.9, "top_k": 7, "top_p": 0.95}
    convert(checkpoint, tmp_path / "out", grid=(4, 4), n_head=4, **options)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sample"] == options


def test_a_tokenizers_folder_will_do(reference: Callable[[str], Any], tmp_path: Path) -> None:
    VQModel(VQConfig(32, (1, 2), 1, 8, codebook_size=64)).save(tmp_path / "vq.pt")  # named like a file
    checkpoint = write_weights(tmp_path / "c2i.pt", reference("nar_c2i").weights)
    pipe = convert(checkpoint, tmp_path / "out", grid=(4, 4), n_head=4, vq=str(tmp_path / "vq.pt"))
    assert pipe.image_size == 8
    assert len(TextToImagePipeline.from_pretrained(tmp_path / "out")([1], seed=0)) == 1


def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    reference: Callable[[str], Any],
    vq_file: Callable[[int], Path],
    text_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        name: write_weights(tmp_path / f"{name}.pt", reference(f"nar_{name}").weights)
        for name in ("t2i", "c2i", "video")
    }
    files["raster"] = write_weights(tmp_path / "raster.pt", raster_weights(reference("nar_c2i").weights))
    files["other"] = write_weights(tmp_path / "other.pt", {"conv.weight": torch.ones(1)})
    four, square = ("--n-head", "4"), ("--grid", "4", "4")
    narrow = text_encoder.parent / "narrow"
    torch.manual_seed(0)
    config = TextEncoderConfig(vocab_size=285, dim=8, n_layer=1, n_head=2, ffn_dim=16)
    TextEncoder.from_config(config, text_encoder.parent / "words.model").save_pretrained(narrow)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path / "none.pt",), "none.pt is no file; give"),
        ((files["other"],), "other.pt has no tok_embeddings.weight of two axes"),
        ((files["other"], *four), "other.pt: not the weights of a NAR model"),
        ((files["c2i"],), "c2i.pt is 48 wide, like no published model; give its heads with --n-head"),
        ((files["raster"], *four), "raster.pt: these are the weights of a raster autoregressive model"),
        ((files["c2i"], *four, "--kind", "raster"), "c2i.pt: these are the weights of a NAR model"),
        ((files["c2i"], *four, "--n-kv-head", "2"), "give n_kv_head 4"),
        ((files["video"], *four), "video.pt has positions for clips of 24 tokens, not of the published 4x16x16; give --grid"),
        ((files["c2i"], *four, *square, "--text-encoder", text_encoder), "c2i.pt is a class-conditional model, which"),
        ((files["c2i"], *four, *square, "--vq", vq_file(65)), "vq65.pt has 65 codes and "),
        ((files["c2i"], *four, *square, "--vq", "shapes"), "the tokenizer shapes has 512 codes and "),
        ((files["c2i"], *four, *square, "--vq", files["c2i"]), "c2i.pt: not the weights of a VQ tokenizer"),
        ((files["c2i"], *four, *square, "--vq", tmp_path / "none"), "has no config.json"),
        ((files["c2i"], *four, *square, "--vq", tmp_path / "none.pt"), "none.pt is no file"),
        ((files["c2i"], *four, *square, "--top-p", "2"), "top_p is 2.0"),
        ((files["t2i"], *four, "--grid", "5", "5", "--text-encoder", narrow), "narrow has states of 8 channels and "),
        ((files["t2i"], *four, "--grid", "5", "5", "--text-encoder", tmp_path), "lacks config.json"),
    ]  # fmt: skip
    for arguments, message in cases:
        assert call(monkeypatch, "convert", *arguments, "--out", tmp_path / "out") == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0], lines[0]
    assert not (tmp_path / "out").exists()


def test_a_text_model_takes_the_published_encoder_unless_told_otherwise(
    reference: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def from_pretrained(source: str) -> None:
        asked.append(source)
        raise ValueError("not here")

    monkeypatch.setattr("t2i.convert_files.TextEncoder.from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="not here"):
        convert(write_weights(tmp_path / "a.pt", reference("nar_t2i").weights), tmp_path / "out", grid=(5, 5), n_head=4)
    assert asked == ["google/flan-t5-xl"]
