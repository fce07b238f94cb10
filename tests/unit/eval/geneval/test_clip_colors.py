"""The very pixels and sentences that reach CLIP, batches, and which weights are taken for what."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file

from eval.geneval.clip_colors import ClipColors, find_clip, object_crop
from eval.geneval.detections import Box, Detection
from eval.geneval.prompts import COLORS

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (48, 60, 3), dtype=np.uint8)


def seen(name: str, box: Box, masked: bool = True) -> Detection:
    """An object whose mask is a disc in its box."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:48, :60] + 0.5
    mask = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25
    return Detection(name, box, 0.9, mask if masked else None)


@pytest.fixture(scope="module")
def colors(small_clip: Path) -> ClipColors:
    return ClipColors(find_clip(f"local-dir:{small_clip}", "openai"), batch_size=2)


@pytest.fixture
def images(colors: ClipColors) -> Any:
    """Collects what goes into CLIP's image side."""
    batches: list[torch.Tensor] = []
    hook = colors._model.visual.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    yield batches
    hook.remove()


def test_a_crop_is_the_box_and_grey_outside_the_mask() -> None:
    found = seen("cow", (10.0, 5.0, 41.0, 30.0))
    crop = np.asarray(object_crop(PICTURE, found))
    assert crop.shape == (25, 31, 3)
    assert found.mask is not None
    for y in range(25):
        for x in range(31):
            expected = PICTURE[5 + y, 10 + x] if found.mask[5 + y, 10 + x] else (153, 153, 153)
            assert (crop[y, x] == expected).all(), (x, y)
    assert (crop != 153).any()
    assert (crop == 153).all(axis=2).any()


def test_a_crop_is_what_the_published_evaluation_cuts() -> None:
    for box in ((0.0, 0.0, 60.0, 48.0), (3.0, 7.0, 4.0, 9.0), (12.0, 1.0, 58.0, 47.0)):
        found = seen("cow", box)
        assert found.mask is not None
        whole = PillowImage.fromarray(PICTURE)
        grey = PillowImage.new("RGB", whole.size, color="#999")
        published = PillowImage.composite(whole, grey, PillowImage.fromarray(found.mask)).crop(box)
        np.testing.assert_array_equal(np.asarray(object_crop(PICTURE, found)), np.asarray(published))


def test_without_a_mask_surroundings_stay() -> None:
    crop = object_crop(PICTURE, seen("cow", (10.0, 5.0, 41.0, 30.0), masked=False))
    np.testing.assert_array_equal(np.asarray(crop), PICTURE[5:30, 10:41])


def test_the_very_pixels_reach_clip(colors: ClipColors, images: list[torch.Tensor]) -> None:
    """A crop of CLIP's own size is not scaled, so that every pixel can be compared."""
    found = seen("cow", (20.0, 8.0, 52.0, 40.0))
    colors.classify([(PICTURE, found)])
    (batch,) = images
    assert batch.shape == (1, 3, 32, 32)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    pixels = ((batch[0] * std + mean) * 255).round().permute(1, 2, 0).numpy()
    assert found.mask is not None
    mask = found.mask[8:40, 20:52]
    np.testing.assert_array_equal(pixels[mask], PICTURE[8:40, 20:52][mask])
    assert (pixels[~mask] == 153).all()
    assert 0.7 < mask.mean() < 0.85


def test_crops_go_through_in_batches_and_sentences_once_a_class(
    colors: ClipColors, images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    colors._texts.clear()
    sentences: list[str] = []
    tokenize = colors._tokenizer

    def listening(texts: list[str]) -> torch.Tensor:
        sentences.extend(texts)
        result: torch.Tensor = tokenize(texts)
        return result

    monkeypatch.setattr(colors, "_tokenizer", listening)
    objects = [
        (PICTURE, seen(name, (5.0, 5.0, 9.0 + n, 30.0))) for n, name in enumerate(["cow", "tv", "cow", "tv", "cow"])
    ]
    assert len(colors.classify(objects)) == 5
    assert [len(batch) for batch in images] == [2, 2, 1]
    assert colors.classify([]) == []
    expected = [
        sentence
        for name in ("cow", "tv")
        for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
        for sentence in (
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        )
    ]
    assert sentences == expected


def test_colors_are_those_of_the_slow_way(colors: ClipColors, small_clip: Path) -> None:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{small_clip}")
    rng = np.random.default_rng(1)
    objects = []
    for n in range(24):
        picture = np.full((48, 60, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        objects.append((picture, seen("cow" if n % 2 else "wine glass", (4.0, 3.0, 20.0 + n, 40.0), masked=n % 3 > 0)))
    expected = []
    with torch.no_grad():
        for picture, found in objects:
            image = model.encode_image(preprocess(object_crop(picture, found))[None])[0]
            scores = []
            for color in COLORS:
                texts = []
                for text in (
                    f"a photo of a {color} {found.class_name}",
                    f"a photo of a {color}-colored {found.class_name}",
                    f"a photo of a {color} object",
                ):
                    one = model.encode_text(tokenizer([text]))[0]
                    texts.append(one / one.norm())
                mean = torch.stack(texts).mean(0)
                scores.append(float((mean / mean.norm()) @ (image / image.norm())))
            expected.append(COLORS[int(np.argmax(scores))])
    assert colors.classify(objects) == expected
    assert len(set(expected)) > 1


def quick(colors: ClipColors) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in colors._model.modules())


@pytest.fixture
def tiny_arch(small_clip: Path, tmp_path: Path) -> Any:
    """The small model's configuration as one that open_clip knows by name."""
    folder = tmp_path / "configs"
    folder.mkdir()
    config = json.loads((small_clip / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "tiny-test.json").write_text(json.dumps(config))
    (folder / "tiny-test-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    yield "tiny-test"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in ("tiny-test", "tiny-test-quickgelu"):
        open_clip.factory._MODEL_CONFIGS.pop(name)


def test_a_file_of_weights_and_its_activation(tiny_arch: str, small_clip: Path) -> None:
    file = small_clip / "open_clip_model.safetensors"
    for arch, asked, has in (
        (tiny_arch, None, False), (tiny_arch, True, True), (tiny_arch, False, False),
        (f"{tiny_arch}-quickgelu", None, True), (f"{tiny_arch}-quickgelu", False, False),
    ):  # fmt: skip
        weights = find_clip(arch, str(file), asked)
        assert weights.files == (file,)
        assert quick(ClipColors(weights)) == has, (arch, asked)


def test_a_file_is_taken_for_openais_where_there_are_such(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    assert find_clip("ViT-L-14", str(tmp_path / "weights.pt")).quick_gelu is True
    assert find_clip("ViT-L-14", str(tmp_path / "weights.pt"), False).quick_gelu is False
    assert find_clip("ViT-H-14", str(tmp_path / "weights.pt")).quick_gelu is None  # OpenAI has none


def test_tags_bring_their_activation_and_preprocessing(
    tiny_arch: str, small_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(repository: str, *patterns: Any) -> Path:
        asked.append(repository)
        return small_clip

    monkeypatch.setattr("eval.geneval.clip_colors.snapshot", snapshot)
    openai, laion = find_clip("ViT-L-14", "openai"), find_clip("ViT-L-14", "laion2b_s32b_b82k")
    assert asked == ["timm/vit_large_patch14_clip_224.openai", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"]
    assert (openai.quick_gelu, laion.quick_gelu) == (True, False)
    assert openai.preprocessing["image_mean"] == OPENAI_DATASET_MEAN
    assert laion.preprocessing["image_mean"] == (0.5, 0.5, 0.5)
    assert find_clip("ViT-L-14", "openai", False).quick_gelu is False

    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_arch, {"openai": open_clip.pretrained._pcfg(
        hf_hub="owner/name/", quick_gelu=True, mean=(0.1, 0.2, 0.3),
    )})  # fmt: skip
    colors = ClipColors(find_clip(tiny_arch, "openai"))
    assert quick(colors)
    pixels = colors._preprocess(PillowImage.new("RGB", (32, 32)))
    expected = -torch.tensor([0.1, 0.2, 0.3]) / torch.tensor(OPENAI_DATASET_STD)
    torch.testing.assert_close(pixels.amax((1, 2)), expected)


def test_the_checksum_is_of_weights_and_configuration(small_clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_clip, copy)
    (copy / "README.md").write_text("not part of it")
    first = find_clip(f"local-dir:{small_clip}", "openai").sha256()
    assert find_clip(f"local-dir:{copy}", "openai").sha256() == first
    weights = load_file(copy / "open_clip_model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, copy / "open_clip_model.safetensors")
    assert find_clip(f"local-dir:{copy}", "openai").sha256() != first


@pytest.mark.parametrize(
    ("arch", "pretrained", "message"),
    [
        ("ViT-Z-99", "openai", "--clip ViT-Z-99 is no architecture of open_clip"),
        ("hf-hub:owner/name", "openai", "is no architecture of open_clip"),
        ("local-dir:FOLDER", "openai", "lacks open_clip_config.json or weights"),
        ("ViT-L-14", "no-such-tag", r"no-such-tag is no file and no tag of ViT-L-14 \(it has openai, "),
    ],
)
def test_models_that_do_not_exist_are_refused(arch: str, pretrained: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_clip(arch.replace("FOLDER", str(tmp_path)), pretrained)


def test_files_of_something_else_are_refused(tiny_arch: str, small_clip: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("broken.safetensors", "other.pt"):
        with pytest.raises(
            ValueError, match=r"CLIP tiny-test cannot be loaded from .*; fetch its weights again"
        ) as caught:
            ClipColors(find_clip(tiny_arch, str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_what_is_not_here_is_one_line_with_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="CLIP ViT-L-14 openai is not on this machine") as caught:
        find_clip("ViT-L-14", "openai")
    assert "\n" not in str(caught.value)
    for part in (
        "hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safetensors --local-dir DIR",
        "give --clip-pretrained DIR/open_clip_model.safetensors",
    ):
        assert part in str(caught.value)
