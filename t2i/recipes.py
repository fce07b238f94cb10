"""Named runs. A recipe is a function, and another run is that one with the fields that differ.

deepspeed t2i/train.py nar-xl-256 --deepspeed_config deepspeed_configs/zero2.json
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.clips import CLASSES, DIRECTIONS, clip_class
from data_pipeline.shapes import SHAPES
from t2i.config import DataConfig, ModelConfig, Recipe, SampleConfig, TrainConfig, from_json
from t2i.text_encoder_config import TextEncoderConfig

SHAPES_PROMPTS = (
    "a photo of a circle",
    "a photo of a red star",
    "a photo of three hearts",
    "a photo of a square left of a hexagon",
    "a photo of a green cross and a purple diamond",
    "a photo of a blue triangle and an orange circle",
    "a photo of a red circle left of a blue star",
    "a photo of four crosses",
)


def nar_b() -> ModelConfig:
    """NAR-B: 12 layers, 12 heads, width 768 (131M parameters with 1000 classes)."""
    return ModelConfig(n_layer=12, n_head=12, width=768)


def nar_m() -> ModelConfig:
    """NAR-M: 18 layers, 16 heads, width 1024 (295M)."""
    return ModelConfig(n_layer=18, n_head=16, width=1024)


def nar_l() -> ModelConfig:
    """NAR-L: 24 layers, 16 heads, width 1024 (373M)."""
    return ModelConfig(n_layer=24, n_head=16, width=1024)


def nar_xl() -> ModelConfig:
    """NAR-XL: 36 layers, 20 heads, width 1280 (816M), the headline model."""
    return ModelConfig(n_layer=36, n_head=20, width=1280)


def nar_xxl() -> ModelConfig:
    """NAR-XXL: 48 layers, 24 heads, width 1536 (1.46B)."""
    return ModelConfig(n_layer=48, n_head=24, width=1536)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "B": nar_b, "M": nar_m, "L": nar_l, "XL": nar_xl, "XXL": nar_xxl,
}  # fmt: skip


VIDEO_SAMPLE = SampleConfig(guidance_scale=1.25)
"""How the paper's video models are drawn from (arXiv 2503.10696, UCF-101)."""


def nar_video(size: str) -> ModelConfig:
    """A video model of a named size for 4x16x16 tokens, in the paper's way: learned positions, all heads start at zero.

    Conditions are the 101 classes of UCF-101 (arXiv 2503.10696, section 4). It takes the third axis as one more block and
    one more head, and 34 passes a clip. `VIDEO_SAMPLE` has its guidance. Raises ValueError for a size that there is not.
    """
    if size not in PRESETS:
        raise ValueError(f"no model size {size!r}; sizes are {', '.join(PRESETS)}")
    return replace(
        PRESETS[size](),
        grid=(4, 16, 16),
        positions="learned",
        condition="class",
        num_classes=101,
        zero_init_heads="all",
    )


def nar_xl_256() -> Recipe:
    """The paper's first stage: 4M image-text pairs at 256x256, 60 epochs (arXiv 2503.10696).

    Its steps are of 512 pictures: micro-batch times accumulation in the DeepSpeed JSON, times ranks.
    """
    return Recipe(
        name="nar-xl-256",
        model=nar_xl(),
        tokenizer="tokenizers/vq-16",
        image_size=256,
        frozen_text_encoder="google/flan-t5-xl",
        data=DataConfig(path=Path("data/encoded-256"), validation=2048),
        train=TrainConfig(
            steps=468_750, lr=1e-4, warmup_steps=2000, ema_decay=0.9999, save_every=2000, validate_every=2000
        ),
        run_dir=Path("runs/nar-xl-256"),
    )


def nar_xl_512() -> Recipe:
    """The paper's second stage: 2M pairs at 512x512, 40 epochs of batch 512, from the weights of the first stage."""
    first = nar_xl_256()
    return replace(
        first,
        name="nar-xl-512",
        model=replace(first.model, grid=(32, 32)),
        image_size=512,
        data=replace(first.data, path=Path("data/encoded-512")),
        train=replace(first.train, steps=156_250, init_from=str(first.run_dir)),
        run_dir=Path("runs/nar-xl-512"),
    )


def shapes_tiny() -> Recipe:
    """The embedded data set in minutes on two cores: an image model and a text encoder, trained together."""
    return Recipe(
        name="shapes-tiny",
        model=ModelConfig(
            grid=(8, 8), vocab_size=512, n_layer=2, n_head=4, width=128, ffn_multiple=32, init_std=0.08,
            residual_init="zero", prefix_rotary="sequence", condition_dim=128, max_condition=32, dropout=0.0,
        ),
        tokenizer="shapes",
        image_size=64,
        text_encoder=TextEncoderConfig(vocab_size=320, dim=128, n_layer=2, n_head=4, ffn_dim=256, max_length=32),
        data=DataConfig(path=Path("data/shapes-encoded"), lanes=16, workers=1, validation=256),
        train=TrainConfig(
            steps=3500, lr=2e-3, beta2=0.98, warmup_steps=100, head_init="codebook", log_every=20, validate_every=250,
            sample_every=750, sample_prompts=SHAPES_PROMPTS, save_every=500,
        ),
        sample=SampleConfig(guidance_scale=1.3, temperature=0.85),
        run_dir=Path("runs/shapes-tiny"),
    )  # fmt: skip


def shapes_small() -> Recipe:
    """A model of about twice the size on three times as many pictures, about an hour on two cores."""
    tiny = shapes_tiny()
    assert tiny.text_encoder is not None
    return replace(
        tiny,
        name="shapes-small",
        model=replace(tiny.model, n_layer=3, n_head=6, width=192, init_std=0.065, condition_dim=192),
        text_encoder=replace(tiny.text_encoder, dim=192, n_head=6, ffn_dim=384),
        data=replace(tiny.data, path=Path("data/shapes-large-encoded")),
        train=replace(tiny.train, steps=4500, lr=1.5e-3),
        run_dir=Path("runs/shapes-small"),
    )


def shapes_classes() -> Recipe:
    """A class-conditional model of the embedded data set's pictures of one shape, in minutes on one core."""
    tiny = shapes_tiny()
    return replace(
        tiny,
        name="shapes-classes",
        model=replace(tiny.model, condition="class", num_classes=len(SHAPES)),
        text_encoder=None,
        data=replace(tiny.data, path=Path("data/shapes-classes-encoded")),
        train=replace(tiny.train, steps=2000, sample_every=500, sample_prompts=tuple(map(str, range(len(SHAPES))))),
        run_dir=Path("runs/shapes-classes"),
    )


def shapes_clips() -> Recipe:
    """A video model of the embedded data set's clips of four frames, in about three quarters of an hour on one core.

    Positions, conditions and guidance as in the paper's video models (`nar_video`). The heads start from the codebook, as in
    the other shapes recipes, with which `zero_init_heads` has no say: after 60 steps the loss is 1.6 nats a token, and 4.0
    where all heads start at zero as published.
    """
    classes = shapes_classes()
    eight = tuple(str(clip_class(shape, direction)) for shape in ("heart", "star") for direction in DIRECTIONS)
    return replace(
        classes,
        name="shapes-clips",
        model=replace(
            classes.model, grid=(4, 8, 8), positions="learned", num_classes=CLASSES, zero_init_heads="all",
        ),
        data=replace(classes.data, path=Path("data/shapes-clips-encoded")),
        train=replace(classes.train, steps=4000, sample_every=1000, sample_prompts=eight),
        sample=replace(VIDEO_SAMPLE, temperature=classes.sample.temperature),
        run_dir=Path("runs/shapes-clips"),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    "nar-xl-256": nar_xl_256,
    "nar-xl-512": nar_xl_512,
    "shapes-tiny": shapes_tiny,
    "shapes-small": shapes_small,
    "shapes-classes": shapes_classes,
    "shapes-clips": shapes_clips,
}


def find_recipe(name_or_file: str) -> Recipe:
    """A recipe by name, or the one that a run wrote to its `recipe.json`. Raises ValueError for neither."""
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]()
    if Path(name_or_file).is_file():
        return from_json(Recipe, Path(name_or_file).read_bytes(), name_or_file)
    raise ValueError(f"no recipe or file {name_or_file!r}; recipes are {', '.join(RECIPES)}")


def changed_recipe(name_or_file: str, fields: Sequence[str], prog: str) -> Recipe:
    """A recipe with other values of some fields, given as options: --train.steps 100. Raises ValueError as `find_recipe`
    and a recipe do; ends the process with code 2, and a message of the command `prog`, for options that there are not."""
    import tyro

    return tyro.cli(tyro.conf.AvoidSubcommands[Recipe], default=find_recipe(name_or_file), args=list(fields), prog=prog)
