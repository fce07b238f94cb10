from collections.abc import Callable
from typing import Any

import pytest
import torch

from t2i.convert import load_official_nar


def test_sizes_and_published_options_are_read_off_the_weights(reference: Callable[[str], Any]) -> None:
    text = load_official_nar(reference("nar_t2i").weights, grid=(5, 5), n_head=4).config
    assert (text.condition, text.width, text.n_layer, text.vocab_size) == ("text", 64, 3, 96)
    assert (text.condition_dim, text.max_condition, text.uncond_tokens) == (24, 120, 120)
    assert (text.prefix_rotary, text.uncond_embedding, text.uncond_mask) == ("zero", "frozen", "caption")
    classes = load_official_nar(reference("nar_c2i").weights, grid=(4, 4), n_head=4).config
    assert (classes.condition, classes.num_classes, classes.n_layer) == ("class", 10, 2)
    video = load_official_nar(reference("nar_video").weights, grid=(2, 3, 4), n_head=4).config
    assert (video.positions, video.zero_init_heads, video.num_classes, video.n_layer) == ("learned", "all", 6, 2)


def test_model_comes_in_evaluation_mode_and_float32(reference: Callable[[str], Any]) -> None:
    weights = {key: tensor.half() for key, tensor in reference("nar_c2i").weights.items()}
    model = load_official_nar(weights, grid=(4, 4), n_head=4)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_key_that_does_not_fit_is_listed(reference: Callable[[str], Any]) -> None:
    weights = reference("nar_c2i").weights
    del weights["layers.1.ffn_norm.weight"], weights["norm.weight"]
    weights["layers.0.attention.wq.weight"] = torch.zeros(3)
    weights["head_of_another_model"] = torch.zeros(1)
    weights["layers.2.feed_forward.w2.weight"] = torch.zeros(7, 5)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_nar(weights, grid=(4, 4), n_head=4)
    for part in (
        "missing what becomes blocks.1.ffn_norm.weight",
        "missing what becomes heads.norms.1.weight",
        "unexpected layers.0.attention.wq.weight",
        "unexpected head_of_another_model",
        "blocks.2.feed_forward.w2.weight is (7, 5), expected (48, 256)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["output.weight", "medusa_output.weight"])
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_head_that_does_not_fit_is_named(reference: Callable[[str], Any], key: str, fault: str) -> None:
    weights = reference("nar_t2i").weights
    if fault == "missing":
        del weights[key]
        expected = "raster" if key == "medusa_output.weight" else "missing what becomes heads.weight"
    else:
        weights[key] = weights[key][:-1]
        expected = f"{key} is "
    with pytest.raises(ValueError, match=expected):
        load_official_nar(weights, grid=(5, 5), n_head=4)


@pytest.mark.parametrize("key", ["cls_embedding.uncond_embedding", "cls_embedding.embedding_table.weight"])
def test_a_missing_condition_embedding_is_named(reference: Callable[[str], Any], key: str) -> None:
    name, grid = ("nar_t2i", (5, 5)) if "uncond" in key else ("nar_c2i", (4, 4))
    weights = reference(name).weights
    del weights[key]
    with pytest.raises(ValueError, match=f"no {key}"):
        load_official_nar(weights, grid=grid, n_head=4)


def test_weights_of_a_raster_model_are_recognised(reference: Callable[[str], Any]) -> None:
    weights = {key: t for key, t in reference("nar_t2i").weights.items() if not key.startswith("medusa")}
    with pytest.raises(ValueError, match="raster autoregressive model"):
        load_official_nar(weights, grid=(5, 5), n_head=4)


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no tok_embeddings.weight; the first keys are conv.bias"):
        load_official_nar({"conv.bias": torch.zeros(2)}, grid=(4, 4), n_head=4)


def test_a_grid_of_another_number_of_axes_is_refused(reference: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="missing what becomes"):
        load_official_nar(reference("nar_c2i").weights, grid=(2, 2, 4), n_head=4)
    with pytest.raises(ValueError, match="two axes for images or three for video"):
        load_official_nar(reference("nar_c2i").weights, grid=(16,), n_head=4)
