from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2i.config import ModelConfig, Recipe, TrainConfig
from t2i.costs import (
    GPUS,
    computed_flops_per_sample,
    forward_flops,
    parameter_list,
    parameters,
    peak_of,
    training_flops_per_sample,
)
from t2i.objective import TrainingModel, build_model, parameter_groups
from t2i.recipes import PRESETS, RECIPES, nar_video
from t2i.text_encoder import train_sentencepiece
from t2i.text_encoder_config import TextEncoderConfig

BATCH, CAPTION = 3, 5
CAPTIONS = ["a red circle", "two blue stars", "a photo of a cross", "three green hearts left of a square"] * 20


def recipe_of(model: ModelConfig, encoder: TextEncoderConfig | None = None, **train: Any) -> Recipe:
    frozen = "some T5" if model.condition == "text" and encoder is None else None
    return Recipe("small", model, "shapes", 64, encoder, frozen, train=TrainConfig(**train))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece(CAPTIONS, 290, path)
    return path.read_bytes()


ENCODER = TextEncoderConfig(vocab_size=290, dim=12, n_layer=2, n_head=2, ffn_dim=20, max_length=8)
WIDE: dict[str, Any] = {"width": 32, "n_head": 4, "vocab_size": 70, "max_condition": 8, "ffn_multiple": 8}
FIXED: dict[str, Any] = WIDE | {
    "condition_dim": 400
}  # wide enough for the gradient of the states to count, if there were one
RECIPE_OF: dict[str, Recipe] = {
    "text": recipe_of(small_config((4, 5), **WIDE)),
    "text, nothing learned before it": recipe_of(small_config((4, 5), uncond_embedding="frozen", **FIXED)),
    "no captions dropped": recipe_of(small_config((3, 3), condition_dropout=0.0, **FIXED)),
    "long unconditional prefix": recipe_of(small_config((3, 3), uncond_tokens=8, **WIDE)),
    "grouped": recipe_of(small_config((4, 4), n_kv_head=2, **WIDE)),
    "class": recipe_of(small_config((4, 4), condition="class", **WIDE)),
    "video": recipe_of(small_config((2, 3, 4), condition="class", **WIDE)),
    "raster": recipe_of(small_config((4, 4), condition="class", order="raster", **WIDE)),
    "dropout": recipe_of(small_config((4, 4), condition="class", **WIDE | {"dropout": 0.1})),
    "trained text encoder": recipe_of(small_config((4, 4), **WIDE | {"condition_dim": 12}), ENCODER),
}


def _addmm_flops(added: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


IN_PLACE: Any = {torch.ops.aten.addmm_: _addmm_flops}
"""What torch's counter leaves out, though it counts the same product where it is not in place."""


def inputs_of(recipe: Recipe) -> tuple[torch.Tensor | None, ...]:
    model = recipe.model
    tokens = torch.randint(model.vocab_size, (BATCH, *model.grid))
    dropped = torch.arange(BATCH) == 1 if model.condition_dropout else None
    if model.condition == "class":
        return tokens, torch.randint(model.num_classes, (BATCH,)), None, dropped
    mask = torch.ones(BATCH, CAPTION, dtype=torch.bool)
    if recipe.text_encoder is not None:
        return tokens, torch.randint(290, (BATCH, CAPTION)), mask, dropped
    return tokens, torch.randn(BATCH, CAPTION, model.condition_dim), mask, dropped


def built(recipe: Recipe, vocabulary: bytes) -> TrainingModel:
    return build_model(recipe, vocabulary if recipe.text_encoder else None).train()


@pytest.mark.parametrize("name", RECIPE_OF)
def test_parameters_are_those_of_the_model(name: str, vocabulary: bytes) -> None:
    recipe = RECIPE_OF[name]
    model = built(recipe, vocabulary)
    decays = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    expected = [(p.numel(), id(p) in decays) for p in model.parameters()]
    assert [(p.size, p.decays) for p in parameter_list(recipe)] == expected


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("kind", ["text", "video"])
def test_parameters_of_the_presets(size: str, kind: str) -> None:
    recipe = recipe_of(PRESETS[size]() if kind == "text" else nar_video(size))
    with torch.device("meta"):
        expected = sum(p.numel() for p in build_model(recipe, None).parameters())
    assert sum(parameters(recipe).values()) == expected


def test_every_recipe_has_costs() -> None:
    for make in RECIPES.values():
        assert training_flops_per_sample(make(), 20) > 6 * parameters(make())["blocks"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", RECIPE_OF)
def test_flops_are_those_that_torch_counts(name: str, checkpointing: bool, vocabulary: bytes) -> None:
    recipe = RECIPE_OF[name]
    recipe = replace(recipe, train=replace(recipe.train, activation_checkpointing=checkpointing))
    model, inputs = built(recipe, vocabulary), inputs_of(recipe)
    # As plain products, for torch counts none of those that its attention for processors is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        loss = model(*inputs)
        forward = counter.get_total_flops()
        loss.backward()
    of_loss = 2 * forward_flops(recipe, CAPTION)["heads"]  # whose gradients come with it
    assert forward / BATCH - of_loss == pytest.approx(sum(forward_flops(recipe, CAPTION).values()), rel=0.01)
    assert counter.get_total_flops() / BATCH == pytest.approx(computed_flops_per_sample(recipe, CAPTION), rel=0.01)


def test_model_flops_do_not_count_what_is_computed_twice() -> None:
    recipe = RECIPE_OF["text"]
    again = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    assert training_flops_per_sample(again, 5) == training_flops_per_sample(recipe, 5)
    assert computed_flops_per_sample(again, 5) > computed_flops_per_sample(recipe, 5)


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD EPYC", None),
    ],
)
def test_peak_of_a_device_by_its_name(device: str, gpu: str | None) -> None:
    assert peak_of(device) == (None if gpu is None else GPUS[gpu].flops)


def test_costs_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, t2i.costs; sys.exit(bool({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
