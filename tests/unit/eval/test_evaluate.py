"""The whole of `t2i evaluate`: an export and pictures of others, scores and what is written of them, damage and mistakes."""

import json
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from eval.distances import FeatureSet, fid, kid
from eval.evaluate import ClipOptions, evaluate, measure
from eval.evaluate_table import print_scores
from eval.files import files_sha256, read_jsonl
from eval.inception import Inception
from eval.pictures import list_pictures
from eval.reference import ReferenceOptions, crop_warning, read_reference
from t2i import cli

MakeExport = Callable[..., Path]
PROMPTS = ["a photo of a red star", "two circles", "a blue heart above a square"]


@pytest.fixture
def inception() -> Inception:
    """Inception's place taken by a few random layers: what is around it is the same."""
    torch.manual_seed(0)
    return Inception(nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(27, 5)), "clean")


def folder_of(folder: Path, number: int, seed: int = 0, brightness: int = 256) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(number):
        pixels = rng.integers(0, brightness, (4, 6, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(folder / f"{n:03d}.png")
    return folder


@pytest.fixture(scope="module")
def slow_cosine(small_clip: Path) -> Callable[[Path, str], float]:
    """The cosine of one picture with one prompt, straight from the model."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{small_clip}")

    def cosine(file: Path, prompt: str) -> float:
        with torch.inference_mode(), Image.open(file) as image:
            one = model.encode_image(preprocess(image.convert("RGB"))[None])[0]
            other = model.encode_text(tokenizer([prompt]))[0]
        return float(one @ other / one.norm() / other.norm())

    return cosine


def test_an_export_is_drawn_and_scored(
    make_export: MakeExport,
    small_clip: Path,
    slow_cosine: Callable[[Path, str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export = make_export()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    clip = ClipOptions(f"local-dir:{small_clip}")
    options = {"prompts": tmp_path / "prompts.txt", "clip": clip, "images_per_prompt": 2, "progress": False}
    found = evaluate(export, batch_size=4, **options)
    out = export / "evaluate"
    assert json.loads((out / "scores.json").read_text()) == found
    rows = read_jsonl(out / "clip_scores.jsonl")
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    (pictures,) = (out / "pictures").iterdir()
    for row in rows:
        expected = slow_cosine(pictures / row["filename"], row["prompt"])
        assert row["cosine"] == pytest.approx(expected, abs=1e-5)
    cosines = np.array([row["cosine"] for row in rows])
    assert found["clip"]["cosine_x100"]["value"] == pytest.approx(100 * cosines.mean())
    assert found["clip"]["clip_score"]["value"] == pytest.approx(2.5 * cosines.clip(min=0).mean())
    assert found["clip"]["arch"] == f"local-dir:{small_clip}"
    assert found["clip"]["pretrained"] is None
    assert len(found["clip"]["sha256"]) == len(found["model"]["sha256"]) == len(found["prompts"]["sha256"]) == 64
    assert (found["pictures"], found["unreadable"], found["prompts"]["number"]) == (6, [], 3)
    assert found["generation"]["model"] == found["model"]["sha256"]
    assert found["versions"]["torch"] == version("torch")
    assert "fid" not in found

    # Again, nothing is drawn, and what is missing is drawn as it was; in other batches everything is the same.
    missing = pictures / rows[3]["filename"]
    pixels = missing.read_bytes()
    missing.unlink()
    again = evaluate(export, batch_size=64, **options)
    assert missing.read_bytes() == pixels
    assert again["clip"]["clip_score"]["value"] == pytest.approx(found["clip"]["clip_score"]["value"], abs=1e-6)

    # Another seed would mix with these.
    with pytest.raises(ValueError, match="another model, seed or sampling setting"):
        evaluate(export, seed=1, **options)
    print_scores(found)
    shown = capsys.readouterr()
    assert f"{found['clip']['clip_score']['value']:.3f} [" in shown.out
    assert "6 pictures of 3 prompts" in shown.out
    assert shown.err == ""
    print_scores(found, as_json=True)
    assert json.loads(capsys.readouterr().out) == found


def test_pictures_of_others_and_a_damaged_one(
    small_clip: Path,
    slow_cosine: Callable[[Path, str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of(tmp_path / "pictures", 6)
    (folder / "002.png").write_bytes(b"damaged")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    clip = ClipOptions(f"local-dir:{small_clip}", prefix="A photo depicts ")
    found = evaluate(
        folder, prompts=tmp_path / "prompts.txt", images_per_prompt=2, clip=clip, out=tmp_path / "out", progress=False
    )
    assert found["pictures"] == 5
    assert [one["name"] for one in found["unreadable"]] == ["002.png"]
    assert (found["clip"]["pictures"], found["clip"]["prompts"], found["clip"]["prefix"]) == (5, 3, "A photo depicts ")
    rows = read_jsonl(tmp_path / "out/clip_scores.jsonl")
    assert [(row["filename"], row["prompt"]) for row in rows] == [
        (f"{n:03d}.png", PROMPTS[n // 2]) for n in (0, 1, 3, 4, 5)
    ]
    expected = slow_cosine(folder / "003.png", f"A photo depicts {PROMPTS[1]}")
    assert rows[2]["cosine"] == pytest.approx(expected, abs=1e-5)
    print_scores(found)
    err = capsys.readouterr().err
    assert "unreadable: 002.png: undecodable picture of 7 bytes" in err
    assert "1 of 6 pictures could not be read and are left out" in err


def test_distances_are_those_of_the_features(inception: Inception, tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one", 12), folder_of(tmp_path / "other", 9, seed=1, brightness=200)
    (other / "003.png").write_bytes(b"damaged")
    sets = []
    for folder in (one, other):
        names = [name for name in list_pictures(folder).paths if name.read_bytes() != b"damaged"]
        with torch.inference_mode():
            features = [inception.embed(inception.prepare(Image.open(name))[None])[0].numpy() for name in names]
        sets.append(FeatureSet.from_features(np.stack(features), {}))
    expected_fid, expected_kid = fid(*sets), kid(*sets)
    assert expected_fid > 0.01
    for batch_size in (1, 4, 64):
        reference, about = read_reference(inception, ReferenceOptions(other), batch_size, progress=False)
        found, rows = measure(list_pictures(one), None, inception, reference, batch_size, progress=False)
        assert found["fid"]["value"] == pytest.approx(expected_fid, rel=1e-4)
        assert found["kid"]["value"] == pytest.approx(expected_kid.value, rel=1e-4, abs=1e-9)
        assert found["kid"]["subset_size"] == 8
        assert about["pictures"] == 8
        assert [one["name"] for one in about["unreadable"]] == ["003.png"]
        assert rows == []
        (warning,) = found["warnings"]
        assert "FID of 12 pictures against 8 is too high" in warning
    itself, _ = read_reference(inception, ReferenceOptions(one), progress=False)
    found, _ = measure(list_pictures(one), None, inception, itself, progress=False)
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_reference_is_saved_and_compared_with_again(inception: Inception, tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one", 7), folder_of(tmp_path / "other", 9, seed=1)
    first, _ = read_reference(inception, ReferenceOptions(other, save=tmp_path / "new/other.npz"), progress=False)
    again, about = read_reference(inception, ReferenceOptions(tmp_path / "new/other.npz"), progress=False)
    assert about["pictures"] == 9
    scores = [measure(list_pictures(one), None, inception, each, progress=False)[0] for each in (first, again)]
    assert scores[0] == scores[1]
    np.savez(tmp_path / "plain.npz", mu=first.mu, sigma=first.sigma)
    with pytest.raises(ValueError, match=r"plain.npz holds mu and sigma only, and KID needs features; .*--no-kid"):
        read_reference(inception, ReferenceOptions(tmp_path / "plain.npz"), progress=False)
    plain, about = read_reference(inception, ReferenceOptions(tmp_path / "plain.npz", kid=False), progress=False)
    assert about["pictures"] is None
    found, _ = measure(list_pictures(one), None, inception, plain, with_kid=False, progress=False)
    assert found["fid"] == scores[0]["fid"]
    assert "kid" not in found


def test_reference_pictures_are_cropped_where_asked(inception: Inception, tmp_path: Path) -> None:
    wide = folder_of(tmp_path / "wide", 4)
    (tmp_path / "square").mkdir()
    for path in wide.iterdir():
        with Image.open(path) as image:
            assert image.size == (60, 40)
            image.crop((10, 0, 50, 40)).save(tmp_path / "square" / path.name)
    cropped, about = read_reference(inception, ReferenceOptions(wide, crop=True), progress=False)
    square, _ = read_reference(inception, ReferenceOptions(tmp_path / "square"), progress=False)
    whole, _ = read_reference(inception, ReferenceOptions(wide), progress=False)
    assert about["crop"] is True
    np.testing.assert_array_equal(cropped.mu, square.mu)
    assert np.abs(cropped.mu - whole.mu).max() > 1e-4


def test_where_a_reference_comes_from_is_kept(inception: Inception, tmp_path: Path) -> None:
    wide, saved = folder_of(tmp_path / "wide", 4), tmp_path / "wide.npz"
    (wide / "003.png").write_bytes(b"damaged")
    options = ReferenceOptions(wide, crop=True, save=saved)
    compared, about = read_reference(inception, options, progress=False)
    assert about["sha256"] == files_sha256(wide, [wide / f"{n:03d}.png" for n in range(3)])
    assert crop_warning(compared, options) is None
    loaded, of_file = read_reference(inception, ReferenceOptions(saved), progress=False)
    assert of_file["sha256"] == sha256(saved.read_bytes()).hexdigest()
    assert of_file["made"] == {"crop": True, "unreadable": 1, "pictures_sha256": about["sha256"]}
    warning = crop_warning(loaded, ReferenceOptions(saved))
    assert warning is not None
    assert "wide.npz is of the largest central square of each picture" in warning
    whole = tmp_path / "whole.npz"
    read_reference(inception, ReferenceOptions(wide, save=whole), progress=False)
    loaded, of_file = read_reference(inception, ReferenceOptions(whole), progress=False)
    assert (of_file["made"]["crop"], crop_warning(loaded, ReferenceOptions(whole))) == (False, None)
    # One of somebody else says nothing.
    np.savez(tmp_path / "plain.npz", mu=loaded.mu, sigma=loaded.sigma)
    plain = ReferenceOptions(tmp_path / "plain.npz", kid=False)
    loaded, of_file = read_reference(inception, plain, progress=False)
    assert (of_file["made"], crop_warning(loaded, plain)) == ({}, None)


def test_one_picture_has_no_fid(inception: Inception, tmp_path: Path) -> None:
    reference, _ = read_reference(inception, ReferenceOptions(folder_of(tmp_path / "many", 3)), progress=False)
    with pytest.raises(ValueError, match="1 picture has no covariance"):
        measure(list_pictures(folder_of(tmp_path / "one", 1)), None, inception, reference, progress=False)


def test_long_prompts_are_told(small_clip: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures", 2)
    (folder / "000.txt").write_text("cow " * 100)
    (folder / "001.txt").write_text("cow")
    found = evaluate(folder, clip=ClipOptions(f"local-dir:{small_clip}"), progress=False)
    assert found["clip"]["prompts_cut"] == [0]
    assert found["warnings"] == ["1 of 2 prompts are longer than CLIP takes, and scored by their beginning"]
    assert found["out"] is None
    assert not list(tmp_path.rglob("*.json"))


def test_mistakes_are_told_before_anything_is_drawn(make_export: MakeExport, tmp_path: Path) -> None:
    export = make_export()
    folder = folder_of(tmp_path / "pictures", 2)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "empty").mkdir()
    prompts, clip = tmp_path / "prompts.txt", ClipOptions("ViT-Z-99")
    for source, options, message in (
        (export, {"clip": clip}, "is an export, which draws prompts; give a file of them"),
        (export, {"prompts": prompts}, "there is nothing to measure"),
        (export, {"prompts": prompts, "clip": clip}, "ViT-Z-99 is no architecture"),
        (folder, {"clip": clip}, "there is nothing to measure .*; give prompts for CLIPScore, or a reference"),
        (folder, {"clip": clip, "prompt_field": "text"}, "there is no file of prompts"),
        (folder, {"clip": clip, "prompts": prompts, "batch_size": 0}, "batch size is 0"),
        (tmp_path / "empty", {"clip": clip}, "holds no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(source, progress=False, **options)
    assert not (export / "evaluate").exists()
    for path, options, message in (
        (tmp_path / "none", {}, "none is neither a folder of pictures nor an .npz"),
        (prompts, {}, "is neither a folder of pictures nor an .npz"),
        (folder, {"save": tmp_path / "a.pt"}, "the reference is saved to an .npz; give .*a.npz"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceOptions(path, **options)
    np.savez(tmp_path / "a.npz", mu=np.zeros(2))
    with pytest.raises(ValueError, match="is no folder; pictures of one are cropped and saved"):
        ReferenceOptions(tmp_path / "a.npz", crop=True)


@pytest.mark.slow
def test_features_of_the_true_architecture(random_inception: Path, tmp_path: Path) -> None:
    """All but FID, whose eigenvalues of 2,048 features take longer than a test should."""
    inception = Inception.open(random_inception, "clean")
    one, other = folder_of(tmp_path / "one", 3), folder_of(tmp_path / "other", 2, seed=1)
    options = ReferenceOptions(one, random_inception, save=tmp_path / "reference.npz")
    reference, about = read_reference(inception, options, progress=False)
    assert reference.features is not None
    assert reference.features.shape == (3, 2048)
    assert about["pictures"] == 3
    loaded, _ = read_reference(inception, ReferenceOptions(tmp_path / "reference.npz"), progress=False)
    compared, _ = read_reference(inception, ReferenceOptions(other, random_inception), progress=False)
    assert kid(compared, loaded) == kid(compared, reference)
    with pytest.raises(ValueError, match="made with resize 'clean', and this is 'tensorflow'"):
        FeatureSet.load(tmp_path / "reference.npz", Inception.open(random_inception, "tensorflow").about)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["t2i", "evaluate", *map(str, arguments)])
    cli.main()


def test_the_command_scores_captioned_pictures(
    small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "pictures", 3)
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text("a red star")
    out = tmp_path / "out"
    call(
        monkeypatch,
        folder,
        "--clip",
        f"local-dir:{small_clip}",
        "--out",
        out,
        "--clip-prefix",
        "A photo depicts ",
        "--json",
    )
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "scores.json").read_text())
    assert (document["clip"]["pictures"], document["clip"]["prefix"]) == (3, "A photo depicts ")
    call(monkeypatch, folder, "--clip", f"local-dir:{small_clip}", "--out", out)
    shown = capsys.readouterr().out
    assert "3 pictures of 3 prompts" in shown
    assert f"scores: {out}/scores.json" in shown


def test_ranks_share_the_drawing_and_the_last_one_measures(
    make_export: MakeExport,
    small_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export, out = make_export(), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [export, "--prompts", tmp_path / "prompts.txt", "--clip", f"local-dir:{small_clip}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    call(monkeypatch, *arguments, "--out", out)
    assert "rank 1 of 2 has drawn its share; 2 pictures are missing" in capsys.readouterr().err
    assert [path.parent.parent.name for path in out.glob("pictures/*/*/samples/*.png")] == ["00001"]
    assert not (out / "scores.json").exists()
    monkeypatch.setenv("RANK", "0")
    call(monkeypatch, *arguments, "--out", out)
    shared = json.loads((out / "scores.json").read_text())
    assert shared["pictures"] == 3
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    call(monkeypatch, *arguments, "--out", tmp_path / "alone")
    assert json.loads((tmp_path / "alone/scores.json").read_text())["clip"] == shared["clip"]
    # Nothing may be drawn before it is known that it can be measured, and pictures that are there are for one.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for given, message in (
        ([*arguments[:3], "--clip", "ViT-Z-99"], "ViT-Z-99 is no architecture"),
        ([folder_of(tmp_path / "pictures", 2), *arguments[1:]], "is no export, and 2 ranks have no drawing to share"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *given, "--out", tmp_path / "none")
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_command_says_what_it_leaves_out(
    small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    for number in range(2):
        folder_of(folder / f"{number:05d}" / "samples", 1)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": "a red star"}))
    (folder / "00001/samples/000.png").rename(folder / "00001/samples/best.png")
    call(monkeypatch, folder, "--clip", f"local-dir:{small_clip}")
    shown = capsys.readouterr()
    assert "1 pictures of 1 prompts" in shown.out
    assert [line for line in shown.err.splitlines() if line.startswith("warning")] == [
        f"warning: 1 prompts in {folder} have no pictures and are left out: 00001",
        f"warning: 1 files in {folder} are no numbered pictures of a prompt and are left out: 00001/samples/best.png",
    ]


def test_what_is_odd_about_a_reference_is_said_too(inception: Inception, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "real"
    folder_of(folder / "0" / "samples", 2)
    (folder / "0/metadata.jsonl").write_text("{}")
    folder_of(folder / "more", 1)
    options = ReferenceOptions(folder)
    compared, about = read_reference(inception, options, progress=False)
    scores, _ = measure(list_pictures(folder_of(tmp_path / "own", 3)), None, inception, compared, progress=False)
    print_scores({"source": "own", "out": None, "reference": about, **scores})
    warned = f"warning: 1 files in {folder} are no numbered pictures of a prompt and are left out: more/000.png\n"
    assert warned in capsys.readouterr().err


def test_the_command_says_how_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches `evaluate`, which has no small Inception to open."""
    folder, given = folder_of(tmp_path / "pictures", 2), list[dict[str, Any]]()

    def noting(source: Path, **options: Any) -> dict[str, Any]:
        given.append({"source": source, **options})
        raise ValueError("noted")

    monkeypatch.setattr("eval.evaluate.evaluate", noting)
    with pytest.raises(SystemExit):
        call(
            monkeypatch, folder, "--reference", folder, "--no-clip-score", "--no-kid", "--inception", "w.pth", "--resize",
            "tensorflow", "--crop-reference", "--save-reference", "new.npz", "--batch-size", "5", "--seed", "3",
        )  # fmt: skip
    expected = ReferenceOptions(folder, Path("w.pth"), "tensorflow", True, False, Path("new.npz"))
    assert given[0]["reference"] == expected
    assert given[0]["clip"] is None
    assert (given[0]["batch_size"], given[0]["seed"], given[0]["source"]) == (5, 3, folder)
    for option in (["--no-kid"], ["--inception", "w.pth"], ["--crop-reference"], ["--save-reference", "new.npz"]):
        with pytest.raises(SystemExit):
            call(monkeypatch, folder, *option)
    assert len(given) == 1  # these say nothing without a reference, and are refused


def test_without_weights_nothing_is_drawn(
    make_export: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = make_export()
    (tmp_path / "prompts.txt").write_text("a red star")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, export, "--prompts", tmp_path / "prompts.txt")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: CLIP ViT-L-14 openai is not on this machine")
    assert "--clip-pretrained DIR/open_clip_model.safetensors" in line
    assert not (export / "evaluate").exists()


@pytest.mark.slow
def test_fid_and_kid_by_the_command(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the true architecture with random weights, against a folder; FID as it follows from the features themselves."""
    one, other = folder_of(tmp_path / "one", 3), folder_of(tmp_path / "other", 4, seed=1, brightness=180)
    out, saved = tmp_path / "out", tmp_path / "other.npz"
    call(
        monkeypatch, one, "--reference", other, "--inception", random_inception, "--crop-reference", "--save-reference",
        saved, "--no-clip-score", "--out", out, "--json",
    )  # fmt: skip
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document == json.loads((out / "scores.json").read_text())
    network = Inception.open(random_inception, "clean")
    reference = FeatureSet.load(saved, network.about)
    with torch.inference_mode():
        features = [network.embed(network.prepare(Image.open(path))[None])[0].numpy() for path in sorted(one.iterdir())]
    own = FeatureSet.from_features(np.stack(features), {})
    # The eigenvalues of a product of covariances are squares of singular values of the few centred features.
    centred = [
        (each.features - each.features.mean(0)).astype(np.float64) / (len(each.features) - 1) ** 0.5
        for each in (own, reference)
        if each.features is not None
    ]
    traces = sum(float((one * one).sum()) for one in centred)
    expected = float(((own.mu - reference.mu) ** 2).sum()) + traces
    expected -= 2 * float(np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum())
    assert document["fid"]["value"] == pytest.approx(expected, rel=1e-3)
    assert document["kid"]["value"] == pytest.approx(kid(own, reference).value, rel=1e-3)
    assert document["kid"]["subset_size"] == 3
    assert document["fid"]["features"] == 2048
    assert document["inception"]["inception_sha256"] == sha256(random_inception.read_bytes()).hexdigest()
    assert (document["pictures"], document["reference"]["pictures"], document["reference"]["crop"]) == (3, 4, True)
    assert "warning: FID of 3 pictures against 4 is too high" in shown.err
    call(monkeypatch, one, "--reference", saved, "--inception", random_inception, "--no-clip-score", "--no-kid")
    shown = capsys.readouterr()
    assert f"{document['fid']['value']:.2f}" in shown.out
    assert "KID" not in shown.out
    assert "other.npz is of the largest central square of each picture" in shown.err
