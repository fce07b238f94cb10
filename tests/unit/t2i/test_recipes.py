from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline import clips
from data_pipeline.shapes import SHAPES
from t2i.config import to_json
from t2i.model import parameter_count
from t2i.recipes import (
    PRESETS,
    RECIPES,
    VIDEO_SAMPLE,
    find_recipe,
    nar_video,
    nar_xl_256,
    nar_xl_512,
    shapes_classes,
    shapes_clips,
    shapes_small,
    shapes_tiny,
)
from t2i.vq import load_vq


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    found = find_recipe(name)
    assert found == RECIPES[name]()
    assert found.name == name
    assert found.run_dir == Path("runs") / name


def test_a_recipe_is_found_in_the_file_that_a_run_wrote(tmp_path: Path) -> None:
    changed = replace(shapes_tiny(), name="mine", run_dir=tmp_path)
    (tmp_path / "recipe.json").write_text(to_json(changed))
    assert find_recipe(str(tmp_path / "recipe.json")) == changed


def test_what_is_neither_is_refused_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="no recipe or file 'shapes-big'; recipes are nar-xl-256, nar-xl-512, shapes-tiny"
    ):
        find_recipe("shapes-big")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no Recipe: Invalid JSON"):
        find_recipe(str(tmp_path / "broken.json"))


def test_presets_have_the_published_sizes() -> None:
    sizes = {name: (c.n_layer, c.n_head, c.width) for name, c in ((name, make()) for name, make in PRESETS.items())}
    assert sizes == {
        "B": (12, 12, 768), "M": (18, 16, 1024), "L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536),
    }  # fmt: skip


def test_the_published_stages() -> None:
    first, second = nar_xl_256(), nar_xl_512()
    assert first.model == PRESETS["XL"]()
    assert first.train.steps * 512 == 4_000_000 * 60
    assert second.train.steps * 512 == 2_000_000 * 40
    for recipe in (first, second):
        assert recipe.model.grid == (recipe.image_size // 16,) * 2
        assert (recipe.train.lr, recipe.train.beta1, recipe.train.beta2) == (1e-4, 0.9, 0.95)
        assert recipe.train.weight_decay == 0.05
        assert (recipe.model.dropout, recipe.model.condition_dropout) == (0.1, 0.1)
        assert recipe.sample.guidance_scale == 7.5
        assert (recipe.model.condition_dim, recipe.model.max_condition) == (2048, 120)
    # The second stage is the first one with other pictures.
    differs = {key for key, value in asdict(second).items() if value != asdict(first)[key]}
    assert differs >= {"name", "model", "image_size", "data", "run_dir"}
    assert replace(second.model, grid=(16, 16)) == first.model


@pytest.mark.parametrize("size", PRESETS)
def test_a_video_model_has_one_more_axis_than_the_image_model_of_its_size(size: str) -> None:
    video, image = nar_video(size), PRESETS[size]()
    assert (video.n_layer, video.n_head, video.width) == (image.n_layer, image.n_head, image.width)
    assert (video.grid, video.positions, video.zero_init_heads) == ((4, 16, 16), "learned", "all")
    assert (video.condition, video.num_classes) == ("class", 101)
    assert sum(video.grid) - 3 + 1 == 34  # passes
    width = video.width
    more = {
        "block": 4 * width**2 + 3 * width * video.hidden + 2 * width,
        "head": width + width * video.vocab_size,
        "positions": (1 + 4 * 16 * 16) * width,
        "classes": (101 - 1000) * width,
    }
    assert parameter_count(video) == parameter_count(replace(image, condition="class")) + sum(more.values())


def test_video_models_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="no model size 'S'; sizes are B, M, L, XL, XXL"):
        nar_video("S")


def test_shapes_recipes_of_classes_and_clips() -> None:
    pictures, moving = shapes_classes(), shapes_clips()
    assert pictures.model.condition == moving.model.condition == "class"
    assert pictures.model.num_classes == len(SHAPES)
    assert len(pictures.train.sample_prompts) == 8
    assert (moving.model.grid, moving.model.positions, moving.model.zero_init_heads) == ((4, 8, 8), "learned", "all")
    assert moving.model.num_classes == clips.CLASSES
    assert {clips.clip_meaning(int(prompt))[1] for prompt in moving.train.sample_prompts} == set(clips.DIRECTIONS)
    assert moving.sample.guidance_scale == VIDEO_SAMPLE.guidance_scale == 1.25


@pytest.mark.parametrize(
    "recipe", [shapes_tiny(), shapes_small(), shapes_classes(), shapes_clips()], ids=lambda recipe: recipe.name
)
def test_shapes_recipes_fit_the_shipped_tokenizer(recipe) -> None:  # type: ignore[no-untyped-def]
    vq = load_vq(recipe.tokenizer)
    assert recipe.model.vocab_size == vq.config.codebook_size
    assert recipe.model.grid[-2:] == (recipe.image_size // vq.config.stride,) * 2
