"""Mask2Former's instance head against a slow one written by hand, drawn pictures whose boxes are known, and folders."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eval.geneval.mask2former import (
    PREPROCESSOR,
    Mask2FormerDetector,
    find_detector,
    geneval_classes,
    instances,
    mask_box,
)
from eval.geneval.prompts import COCO_CLASSES
from eval.geneval.scoring import ScoringOptions

EVERYTHING = ScoringOptions(threshold=0.0, counting_threshold=0.0)


def enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear scaling of one mask, pixel centres at halves, written out; [h, w] -> [height, width]."""
    rows, columns = values.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = values[top, left] * (1 - (u - left)) + values[top, right] * (u - left)
            lower = values[bottom, left] * (1 - (u - left)) + values[bottom, right] * (u - left)
            out[y, x] = upper * (1 - (v - top)) + lower * (v - top)
    return out


def slow_instances(
    classes: np.ndarray, masks: np.ndarray, padded: Any, scaled: Any, original: Any, limit: int
) -> list[tuple[int, int, float, np.ndarray]]:
    """(query, label, score, mask) of the `limit` likeliest pairs, the likeliest first."""
    pairs = []
    for query in range(len(classes)):
        raised = np.exp(classes[query] - classes[query].max())
        pairs += [(float(p), query, label) for label, p in enumerate((raised / raised.sum())[:-1])]
    found = []
    for probability, query, label in sorted(pairs, key=lambda pair: -pair[0])[:limit]:
        whole = enlarged(masks[query], *padded)[: scaled[0], : scaled[1]]
        logits = enlarged(whole, *original)
        inside = logits[logits > 0]
        if inside.size:
            quality = float((1 / (1 + np.exp(-inside))).sum() / (inside.size + 1e-6))
            found.append((query, label, probability * quality, logits > 0))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.2]))
def test_instances_are_those_of_the_slow_way(seed: int, limit: int, floor: float) -> None:
    rng = np.random.default_rng(seed)
    classes, masks = rng.normal(size=(4, 6)) * 2, rng.normal(size=(4, 3, 5)) * 3
    padded, scaled, original = (6, 10), (int(rng.integers(4, 7)), int(rng.integers(7, 11))), (5, 8)
    expected = [
        one for one in slow_instances(classes, masks, padded, scaled, original, limit) if one[2] > floor
    ]  # a floor only leaves out
    found = instances(torch.tensor(classes), torch.tensor(masks), padded, scaled, original, floor, limit)
    assert [label for label, _, _ in found] == [label for _, label, _, _ in expected]
    for (_, score, mask), (_, _, expected_score, expected_mask) in zip(found, expected, strict=True):
        assert score == pytest.approx(expected_score, rel=1e-4)
        assert mask.shape == original
        assert (mask != expected_mask).sum() <= 1  # a logit of nearly 0 may fall on either side


def test_known_logits_give_known_masks_boxes_and_scores() -> None:
    masks = torch.full((3, 8, 10), -4.0)
    masks[0, 2:5, 1:7] = 4.0
    masks[1, 3:8, 4:10] = 2.0
    masks[1, 3, 4] = 1.0
    classes = torch.full((3, 4), -50.0)  # three classes and "nothing"
    classes[0, :2] = torch.tensor([0.6, 0.4]).log()  # one query, two classes
    classes[1, [1, 3]] = torch.tensor([0.7, 0.3]).log()
    classes[2, 3] = 0.0  # nothing
    found = instances(classes, masks, (8, 10), (8, 10), (8, 10), floor=0.01)
    sure, mixed = torch.tensor(4.0).sigmoid().item(), torch.tensor([2.0, 1.0]).sigmoid()
    second = (29 * mixed[0].item() + mixed[1].item()) / 30
    assert [(label, mask_box(mask)) for label, _, mask in found] == [
        (1, (4.0, 3.0, 10.0, 8.0)), (0, (1.0, 2.0, 7.0, 5.0)), (1, (1.0, 2.0, 7.0, 5.0)),
    ]  # fmt: skip
    assert [score for _, score, _ in found] == pytest.approx([0.7 * second, 0.6 * sure, 0.4 * sure], rel=1e-5)
    np.testing.assert_array_equal(found[0][2], masks[1].numpy() > 0)
    np.testing.assert_array_equal(found[1][2], masks[0].numpy() > 0)
    assert (found[0][2] & found[1][2]).any()  # overlapping pixels belong to both


def test_an_empty_mask_is_no_object() -> None:
    assert instances(torch.tensor([[9.0, 0.0]]), torch.full((1, 4, 4), -1.0), (4, 4), (4, 4), (4, 4)) == []


def test_a_mask_of_one_pixel_is_an_object() -> None:
    logits = torch.full((1, 4, 4), -5.0)
    logits[0, 1, 2] = 5.0
    ((label, _, mask),) = instances(torch.tensor([[9.0, 0.0]]), logits, (4, 4), (4, 4), (4, 4))
    assert (label, np.argwhere(mask).tolist()) == (0, [[1, 2]])


def test_a_box_ends_one_past_its_last_pixel() -> None:
    mask = np.zeros((6, 9), dtype=bool)
    mask[2, 3] = True
    assert mask_box(mask) == (3.0, 2.0, 4.0, 3.0)
    mask[5, 8] = True
    assert mask_box(mask) == (3.0, 2.0, 9.0, 6.0)


# What the published transformers models call COCO's classes, where that is not what GenEval does.
RENAMED = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote",
    "computer keyboard": "keyboard",
}  # fmt: skip
PUBLISHED_LABELS = [RENAMED.get(name, name) for name in COCO_CLASSES]


@pytest.mark.parametrize("written", [str, str.upper, lambda name: name.replace(" ", "_")])
def test_labels_get_genevals_names(written: Any) -> None:
    labels = {number: written(name) for number, name in enumerate(PUBLISHED_LABELS)}
    assert geneval_classes(labels, "x") == list(COCO_CLASSES)
    assert geneval_classes(dict(enumerate(COCO_CLASSES)), "x") == list(COCO_CLASSES)
    assert geneval_classes({**labels, 80: "banner", 81: "wall-other-merged"}, "x")[80:] == [None, None]


def test_labels_that_are_missing_are_listed() -> None:
    labels = dict(enumerate(name for name in PUBLISHED_LABELS if name not in ("sofa", "zebra")))
    with pytest.raises(
        ValueError, match="detector some/folder has no label for zebra, couch; GenEval asks about COCO's 80"
    ):
        geneval_classes(labels, "some/folder")


class Paint:
    """In place of the network: for each paint, a query whose mask is where the picture has it, of the class with its number."""

    config = SimpleNamespace(id2label=dict(enumerate(COCO_CLASSES)))

    def __init__(self, detector: Mask2FormerDetector, paints: list[tuple[int, int, int]]) -> None:
        self.mean, self.std = detector._mean_1311, detector._std_1311
        self.paints = torch.tensor(paints, dtype=torch.float32)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        self.shapes.append(tuple(pixel_values.shape))
        pixels = (pixel_values * self.std + self.mean) * 255
        distance = (pixels[:, None] - self.paints[:, :, None, None]).square().sum(2).sqrt()  # [B, Q, H, W]
        logits = torch.nn.functional.avg_pool2d(torch.where(distance < 60, 6.0, -6.0), 4)
        classes = torch.zeros(len(pixels), len(self.paints), 81)
        for query in range(len(self.paints)):
            classes[:, query, query] = 12.0
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits)


@pytest.mark.parametrize(("size", "shape"), [((64, 128), (64, 96)), ((128, 256), (128, 160)), ((64, 65), (64, 96))])
def test_boxes_of_a_drawn_picture_are_where_it_was_drawn(
    small_detector: Path, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    picture = np.full((64, 72, 3), 90, dtype=np.uint8)
    picture[8:24, 16:40] = (250, 20, 20)
    picture[32:56, 40:72] = (20, 20, 250)
    detector = Mask2FormerDetector(small_detector, ScoringOptions(), size)
    painted = Paint(detector, [(250, 20, 20), (20, 250, 20), (20, 20, 250)])
    detector._model = painted
    found, blank = detector.detect([picture, np.full_like(picture, 90)])
    assert painted.shapes == [(2, 3, *shape)]
    assert blank == []
    boxes = {one.class_name: one.box for one in found}
    tolerance = 2.0 if size[1] == 65 else 0.0  # not scaled by a whole number
    assert set(boxes) == {"person", "car"}
    assert boxes["person"] == pytest.approx((16, 8, 40, 24), abs=tolerance)
    assert boxes["car"] == pytest.approx((40, 32, 72, 56), abs=tolerance)
    for one in found:
        assert one.mask is not None
        assert one.mask.shape == (64, 72)
        assert mask_box(one.mask) == one.box
        assert 0.9 < one.score < 1


@pytest.mark.parametrize(
    ("original", "scaled", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((64, 64), (800, 800), (800, 800)),
        ((768, 1024), (800, 1067), (800, 1088)),
        ((300, 1000), (400, 1333), (416, 1344)),
        ((2000, 500), (1333, 333), (1344, 352)),
    ],
)
def test_pictures_are_scaled_and_padded_as_in_mmdet(
    small_detector: Path, original: Any, scaled: Any, padded: Any
) -> None:
    assert Mask2FormerDetector(small_detector, ScoringOptions())._sizes(original) == (scaled, padded)


def test_the_network_gets_normalized_pixels_and_zeros_beside_them(small_detector: Path) -> None:
    detector = Mask2FormerDetector(small_detector, ScoringOptions(), (64, 128))
    seen: list[torch.Tensor] = []
    detector._model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    picture = np.random.default_rng(0).integers(0, 256, (64, 70, 3), dtype=np.uint8)
    detector.detect([picture])
    (pixels,) = seen
    assert pixels.shape == (1, 3, 64, 96)
    expected = (picture / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[0, :, :, :70].permute(1, 2, 0), expected, atol=1e-5)
    assert (pixels[..., 70:] == 0).all()


def test_pictures_of_any_size_come_back_in_order_whatever_their_batch(small_detector: Path) -> None:
    detector = Mask2FormerDetector(small_detector, EVERYTHING, (64, 128))
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (40, 80), (64, 64), (33, 31), (40, 80)]
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    together = detector.detect(pictures)
    assert detector.detect([]) == []
    for picture, found in zip(pictures, together, strict=True):
        (alone,) = detector.detect([picture])
        assert len(found) == len(alone) > 20
        assert {one.class_name for one in found} <= set(COCO_CLASSES)
        for one, other in zip(found, alone, strict=True):
            assert one.mask is not None
            assert one.mask.shape == picture.shape[:2]
            assert one.class_name == other.class_name
            assert one.score == pytest.approx(other.score, rel=1e-4)
    assert len({one.box for found in together for one in found}) > 10


def test_thresholds_only_leave_out(small_detector: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (everything,) = Mask2FormerDetector(small_detector, EVERYTHING, (64, 64)).detect([picture])
    ranked = sorted(one.score for one in everything)
    scoring = ScoringOptions(threshold=(ranked[-6] + ranked[-5]) / 2, counting_threshold=0.9)
    (some,) = Mask2FormerDetector(small_detector, scoring, (64, 64)).detect([picture])
    expected = [one for one in everything if one.score > scoring.threshold]
    assert [(one.class_name, one.box) for one in some] == [(one.class_name, one.box) for one in expected]
    assert [one.score for one in some] == pytest.approx([one.score for one in expected])
    assert len(some) == 5


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def test_folders_that_are_no_detector_are_refused(small_detector: Path, tmp_path: Path) -> None:
    assert find_detector(str(small_detector)) == small_detector
    for name in ("config.json", PREPROCESSOR):
        folder = copied(small_detector, tmp_path / f"without {name}")
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"has no {name}; fetch all of facebook"):
            find_detector(str(folder))
    other = copied(small_detector, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    with pytest.raises(ValueError, match="is of type 'detr', not 'mask2former'"):
        find_detector(str(other))
    with pytest.raises(ValueError, match="is no folder and no name on the Hugging Face hub"):
        find_detector(str(tmp_path / "nothing here"))


def test_weights_that_are_missing_or_damaged_are_refused(small_detector: Path, tmp_path: Path) -> None:
    without = copied(small_detector, tmp_path / "without")
    (without / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*\); fetch it again"):
        Mask2FormerDetector(without, ScoringOptions())
    damaged = copied(small_detector, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*\); fetch it again"):
        Mask2FormerDetector(damaged, ScoringOptions())
    partial = copied(small_detector, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["class_predictor.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack or misfit 1 parameters of its config.json, such as class_predictor"):
        Mask2FormerDetector(partial, ScoringOptions())


def test_a_preprocessor_without_means_and_absurd_sizes_are_refused(small_detector: Path, tmp_path: Path) -> None:
    folder = copied(small_detector, tmp_path / "folder")
    (folder / PREPROCESSOR).write_text('{"image_mean": [1]}')
    with pytest.raises(ValueError, match="has no image_mean and image_std of three channels"):
        Mask2FormerDetector(folder, ScoringOptions())
    with pytest.raises(ValueError, match="detector size is 1333 800; give the shorter side first"):
        Mask2FormerDetector(small_detector, ScoringOptions(), (1333, 800))


def test_what_is_not_here_is_one_line_with_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="not on this machine") as caught:
        find_detector("facebook/mask2former-swin-small-coco-instance")
    assert "\n" not in str(caught.value)
    for part in ("hf download facebook/mask2former-swin-small-coco-instance --local-dir DIR", "give --detector DIR"):
        assert part in str(caught.value)


def test_the_hubs_cache_is_used_without_a_network(
    small_detector: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    cached = copied(small_detector, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find_detector("owner/name") == cached
    (cached / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="detector owner/name is not on this machine"):
        find_detector("owner/name")
