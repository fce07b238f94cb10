"""The published folder layout, seeds, resuming, and independence of ranks and batches."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval.generate import generate, picture_seed, sample_path

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": f"prompt {i}"} for i in range(5)
]


SEEDS = (759540517790923586, 5129415999244345456)


class NoisePipeline:
    """Pictures that are a function of prompt and seed, and a record of the calls."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.batches: list[int] = []
        self.fail_after = fail_after

    def __call__(self, prompts: list[str], *, seeds: list[int], **sampling: Any) -> list[Image.Image]:
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(len(prompts))
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            digest = hashlib.sha256(f"{prompt} {seed} {sampling}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            pictures.append(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)))
        return pictures


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_published_layout(tmp_path: Path) -> None:
    made = generate(NoisePipeline(), PROMPTS, tmp_path, images_per_prompt=4, batch_size=3, progress=False)
    assert made == 20
    expected = {"generation.json"}
    for i in range(5):
        expected |= {f"{i:05d}/metadata.jsonl", f"{i:05d}/grid.png"}
        expected |= {f"{i:05d}/samples/{n:04d}.png" for n in range(4)}
    assert set(content(tmp_path)) == expected
    assert json.loads((tmp_path / "00003/metadata.jsonl").read_text()) == PROMPTS[3]
    with Image.open(tmp_path / "00003/grid.png") as grid, Image.open(sample_path(tmp_path, 3, 1)) as second:
        assert grid.size == (32, 8)
        np.testing.assert_array_equal(np.asarray(grid)[:, 8:16], np.asarray(second))


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 7), (2, 64), (3, 1)])
def test_pictures_depend_neither_on_ranks_nor_batches(tmp_path: Path, ranks: int, batch_size: int) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path / "one", batch_size=20, progress=False)
    for rank in range(ranks):
        generate(NoisePipeline(), PROMPTS, tmp_path / "many", 4, batch_size, rank, ranks, progress=False)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_batches_go_across_prompts(tmp_path: Path) -> None:
    pipe = NoisePipeline()
    generate(pipe, PROMPTS, tmp_path, images_per_prompt=2, batch_size=4, progress=False)
    assert pipe.batches == [4, 4, 2]


def test_resumes_picture_by_picture(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        generate(NoisePipeline(fail_after=2), PROMPTS, tmp_path / "cut", batch_size=3, progress=False)
    assert generate(NoisePipeline(), PROMPTS, tmp_path / "cut", batch_size=3, progress=False) == 20 - 6
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    sample_path(tmp_path / "cut", 2, 3).unlink()
    assert generate(NoisePipeline(), PROMPTS, tmp_path / "cut", progress=False) == 1
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert generate(NoisePipeline(), PROMPTS, tmp_path / "cut", progress=False) == 0


def test_more_pictures_later_renew_the_grid(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS[:1], tmp_path, images_per_prompt=2, progress=False)
    assert generate(NoisePipeline(), PROMPTS[:1], tmp_path, images_per_prompt=6, progress=False) == 4
    with Image.open(tmp_path / "00000/grid.png") as grid:
        assert grid.size == (32, 16)


def test_pictures_of_other_settings_are_never_mixed(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS, tmp_path, images_per_prompt=1, model="a", progress=False)
    for changed in ({"model": "b"}, {"model": "a", "seed": 1}, {"model": "a", "sampling": {"top_k": 5}}):
        with pytest.raises(ValueError, match="another model, seed or sampling setting"):
            generate(NoisePipeline(), PROMPTS, tmp_path, images_per_prompt=1, progress=False, **changed)
    with pytest.raises(ValueError, match="another prompt"):
        generate(NoisePipeline(), PROMPTS[1:], tmp_path, images_per_prompt=1, model="a", progress=False)


def test_sampling_settings_reach_the_pipeline(tmp_path: Path) -> None:
    generate(NoisePipeline(), PROMPTS[:1], tmp_path / "a", 1, sampling={"guidance_scale": 2.0}, progress=False)
    generate(NoisePipeline(), PROMPTS[:1], tmp_path / "b", 1, progress=False)
    assert sample_path(tmp_path / "a", 0, 0).read_bytes() != sample_path(tmp_path / "b", 0, 0).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_prompt": 0}, "images per prompt is 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"rank": 2, "ranks": 2}, "rank is 2 of 2"),
    ],
)
def test_numbers_are_checked(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(NoisePipeline(), PROMPTS, tmp_path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prompts"):
        generate(NoisePipeline(), [], tmp_path)


def test_seeds_are_fixed_forever() -> None:
    # Changing these would change every published picture.
    assert picture_seed(0, 0) == SEEDS[0]
    assert picture_seed(552, 3, seed=7) == SEEDS[1]


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(0, 5))
def test_seeds_are_distinct_and_fit_a_generator(prompt_index: int, number: int, seed: int) -> None:
    value = picture_seed(prompt_index, number, seed)
    assert 0 <= value < 2**63
    others = {(prompt_index + 1, number, seed), (prompt_index, number + 1, seed), (prompt_index, number, seed + 1)}
    assert value not in {picture_seed(*other) for other in others}
