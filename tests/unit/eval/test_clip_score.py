"""CLIPScore: cosines as the slow way gives them, the two scales, the interval over prompts, and long prompts."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval import clip_score
from eval.clip_score import Clip, clip_scores, mean_over_prompts
from eval.geneval.clip_colors import find_clip
from eval.geneval.intervals import Interval, bootstrap_means

TEXTS = ["a photo of a cow", "two stars", "", "a red circle left of a blue star " * 3]


@pytest.fixture(scope="module")
def clip(small_clip: Path) -> Clip:
    return Clip(find_clip(f"local-dir:{small_clip}", "openai"))


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("prefix", ["", "A photo depicts "])
def test_embeddings_are_those_of_the_model(small_clip: Path, prefix: str) -> None:
    clip = Clip(find_clip(f"local-dir:{small_clip}", "openai"), prefix=prefix)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{small_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{small_clip}")
    with torch.inference_mode():
        images = clip.embed(torch.stack([clip.prepare(picture(seed)) for seed in range(3)])).numpy()
        for seed, image in enumerate(images):
            slow = model.encode_image(preprocess(picture(seed))[None])[0]
            np.testing.assert_allclose(image, slow / slow.norm(), atol=1e-6)
        for size in (1, 3):
            texts = clip.embed_texts(TEXTS, size, progress=False)
            for text, one in zip(TEXTS, texts, strict=True):
                slow = model.encode_text(tokenizer([prefix + text]))[0]
                np.testing.assert_allclose(one, slow / slow.norm(), atol=1e-6)
    assert texts.dtype == np.float32


def test_prompts_that_are_cut_are_told(clip: Clip, small_clip: Path) -> None:
    # The start and the end take two of 77 places, and each of these words one.
    texts = [" ".join(["cow"] * number) for number in (75, 76, 200, 1)]
    assert clip.cut(texts) == [1, 2]
    full, cut = clip.embed_texts([texts[0], texts[2]], progress=False)
    np.testing.assert_allclose(full, cut, atol=1e-6)
    assert Clip(find_clip(f"local-dir:{small_clip}", "openai"), prefix="A photo depicts ").cut(texts) == [0, 1, 2]


def test_both_scales() -> None:
    found = clip_scores(np.array([0.3, -0.2, 0.1, 0.4]), [0, 0, 1, 2])
    assert found.clip_score.value == pytest.approx(2.5 * (0.3 + 0 + 0.1 + 0.4) / 4)  # below zero is zero
    assert found.cosine_x100.value == pytest.approx(100 * (0.3 - 0.2 + 0.1 + 0.4) / 4)
    assert (found.prompts, found.pictures) == (3, 4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 4))
def test_intervals_hold_the_mean_and_move_with_it(seed: int, prompts: int, pictures: int) -> None:
    values = np.random.default_rng(seed).normal(size=prompts * pictures)
    prompt_of = [index for index in range(prompts) for _ in range(pictures)]
    found = mean_over_prompts(values, prompt_of, replicates=500)
    assert found.low <= found.value + 1e-9
    assert found.high >= found.value - 1e-9
    assert found.value == pytest.approx(values.mean())
    moved = mean_over_prompts(10 * values + 3, prompt_of, replicates=500)
    assert moved.low == pytest.approx(10 * found.low + 3)
    assert moved.high == pytest.approx(10 * found.high + 3)


def test_the_interval_is_over_prompts_and_not_over_pictures() -> None:
    rng = np.random.default_rng(0)
    of_prompt = rng.normal(size=400)
    values = np.repeat(of_prompt, 4)  # four pictures that say the same are no four observations
    found = mean_over_prompts(values, [index for index in range(400) for _ in range(4)], replicates=2000)
    expected = 2 * 1.96 * of_prompt.std() / 400**0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    wrong = mean_over_prompts(values, range(1600), replicates=1000)
    assert wrong.high - wrong.low == pytest.approx(expected / 2, rel=0.1)


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, prompt_of = rng.normal(size=60), [number % 23 for number in range(60)]
    at_once = mean_over_prompts(values, prompt_of)
    sizes: list[int] = []

    def noting(totals: object, weights: object, rng: np.random.Generator, replicates: int) -> object:
        sizes.append(replicates)
        return bootstrap_means(totals, weights, rng, replicates)  # type: ignore[arg-type]

    monkeypatch.setattr(clip_score, "_COUNTS", 23 * 3000)
    monkeypatch.setattr(clip_score, "bootstrap_means", noting)
    assert mean_over_prompts(values, prompt_of) == at_once
    assert sizes == [3000, 3000, 3000, 1000]


def test_one_prompt_has_no_interval() -> None:
    assert mean_over_prompts(np.array([1.0, 2.0]), [5, 5]) == Interval(1.5, 1.5, 1.5)
