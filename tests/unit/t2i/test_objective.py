from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.index import ShardSet
from data_pipeline.loader import collate_codes
from t2i.config import Recipe
from t2i.costs import training_flops_per_sample
from t2i.objective import build_model, condition_tensors, parameter_groups, training_flops
from t2i.recipes import nar_xl_256, shapes_classes, shapes_tiny
from t2i.text_encoder import train_sentencepiece


@pytest.fixture(scope="module")
def recipe(encoded_shapes: Path) -> Recipe:
    tiny = shapes_tiny()
    assert tiny.text_encoder is not None
    return replace(
        tiny,
        model=replace(tiny.model, n_layer=1, width=32, condition_dim=32),
        text_encoder=replace(tiny.text_encoder, dim=32, n_layer=1, ffn_dim=32),
        data=replace(tiny.data, path=encoded_shapes),
    )


@pytest.fixture(scope="module")
def batch(encoded_shapes: Path) -> dict[str, Any]:
    shards = ShardSet(encoded_shapes)
    return collate_codes([shards.read_encoded(i) for i in range(6)])


@pytest.fixture(scope="module")
def vocabulary(encoded_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    shards = ShardSet(encoded_shapes)
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece([shards.read_encoded(i).caption for i in range(len(shards))], 320, path)
    return path.read_bytes()


def test_loss_of_captions_is_that_of_their_states(recipe: Recipe, batch: dict[str, Any], vocabulary: bytes) -> None:
    model = build_model(recipe, vocabulary).eval()
    assert model.text_encoder is not None
    ids, mask = condition_tensors(batch, recipe, model.text_encoder)
    assert ids.shape == mask.shape
    states, state_mask = model.text_encoder.encode(batch["captions"])
    with torch.no_grad():
        loss = model(batch["codes"], ids, mask, None)
        torch.testing.assert_close(loss, model.nar(batch["codes"], states, state_mask))


def test_gradients_reach_the_text_encoder(recipe: Recipe, batch: dict[str, Any], vocabulary: bytes) -> None:
    model = build_model(recipe, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or name == "nar.heads.weight":  # what starts at zero holds gradients back for a step
                parameter.normal_()
    ids, mask = condition_tensors(batch, recipe, model.text_encoder)
    model(batch["codes"], ids, mask, torch.tensor([True] + 5 * [False])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_is_in_one_group_and_only_matrices_decay(recipe: Recipe, vocabulary: bytes) -> None:
    model = build_model(recipe, vocabulary)
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    grouped = [id(p) for p in decayed["params"] + kept["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    without_decay = {names[id(p)] for p in kept["params"]}
    assert {"nar.tokens.weight", "nar.prefix.uncond", "nar.blocks.0.attention_norm.weight"} <= without_decay
    assert "text_encoder.encoder.final_layer_norm.weight" in without_decay
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {"nar.heads.weight", "nar.blocks.0.attention.wqkv.weight"} <= {names[id(p)] for p in decayed["params"]}


def class_recipe(recipe: Recipe, classes: int) -> Recipe:
    model = replace(recipe.model, condition="class", num_classes=classes)
    train = replace(recipe.train, sample_prompts=())
    return replace(recipe, model=model, text_encoder=None, train=train)


def test_class_labels_are_the_condition_of_a_class_model(recipe: Recipe, batch: dict[str, Any]) -> None:
    labels, mask = condition_tensors(batch, class_recipe(recipe, 8), None)
    assert mask is None
    assert torch.equal(labels, batch["labels"])
    model = build_model(class_recipe(recipe, 8), None)
    assert model.text_encoder is None
    assert float(model(batch["codes"], labels, None, None)) > 0


def test_shards_without_what_the_recipe_needs_are_refused(recipe: Recipe, batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no .cls members"):
        condition_tensors(batch | {"labels": None}, class_recipe(recipe, 8), None)
    for label in (8, -1):
        labels = torch.tensor([0, label])
        with pytest.raises(ValueError, match=rf"holds class {label}, and recipe shapes-tiny has 8 classes \(0 to 7\)"):
            condition_tensors(batch | {"labels": labels}, class_recipe(recipe, 8), None)
    stored = replace(recipe, text_encoder=None, frozen_text_encoder="somewhere")
    with pytest.raises(ValueError, match="encode it with --text-encoder"):
        condition_tensors(batch, stored, None)


def test_flops_of_a_micro_batch_are_those_of_its_samples() -> None:
    recipe = nar_xl_256()
    tokens, mask = torch.zeros(3, 16, 16, dtype=torch.int64), torch.ones(3, 17, dtype=torch.bool)
    expected = 3 * training_flops_per_sample(recipe, 17)
    assert training_flops(recipe, tokens, torch.zeros(3, 17, 2048), mask) == expected
    assert training_flops(shapes_classes(), tokens[:, :8, :8], torch.zeros(3, dtype=torch.int64), None) > 0
