import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import small_config, small_model

from data_pipeline.shapes import training_sample
from t2i import products
from t2i.config import SampleConfig
from t2i.pipeline import Provenance, TextToImagePipeline, picture_grid
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import VQConfig, VQModel, images_to_tensor, load_vq
from t2i.wavefronts import levels
from t2i.zipar import passes_needed

PROMPTS = ["a photo of a red circle", "a photo of a blue star above a heart"]
SAMPLE = SampleConfig(guidance_scale=2.0, temperature=0.9, top_k=7, top_p=0.95)
VQ = VQConfig(
    base_channels=8, channel_multipliers=(1, 2), n_res_blocks=1, z_channels=8, codebook_size=11, codebook_dim=4, norm_groups=4
)  # fmt: skip


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece(PROMPTS, 285, path)
    torch.manual_seed(0)
    config = TextEncoderConfig(vocab_size=285, dim=8, n_layer=1, n_head=2, ffn_dim=16, max_length=32)
    return TextEncoder.from_config(config, path)


@pytest.fixture
def pipe(text_encoder: TextEncoder) -> TextToImagePipeline:
    torch.manual_seed(0)
    model = small_model(small_config((4, 4), condition_dim=8, max_condition=32))
    return TextToImagePipeline(model, VQModel(VQ), text_encoder, SAMPLE, 8, Provenance("test", 3))


@pytest.fixture
def class_pipe() -> TextToImagePipeline:
    torch.manual_seed(0)
    model = small_model(small_config((4, 4), condition="class"))
    return TextToImagePipeline(model, VQModel(VQ), None, SAMPLE, 8, Provenance("test", 3))


@pytest.fixture
def video_pipe() -> TextToImagePipeline:
    torch.manual_seed(0)
    model = small_model(small_config((3, 4, 4), condition="class"))
    return TextToImagePipeline(model, VQModel(VQ), None, SAMPLE, 8, Provenance("test", 3))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_picture_for_each_prompt(pipe: TextToImagePipeline) -> None:
    images = pipe(PROMPTS, seed=0)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 2
    assert len(pipe(PROMPTS[0], seed=0)) == 1
    assert len(pipe(iter(PROMPTS), seed=0)) == 2  # type: ignore[arg-type]


def test_seeds_decide_the_pixels_whatever_the_batch(pipe: TextToImagePipeline) -> None:
    both = pixels(pipe(PROMPTS, seed=5))
    np.testing.assert_array_equal(both, pixels(pipe(PROMPTS, seeds=[5, 6])))
    np.testing.assert_array_equal(both[1:], pixels(pipe(PROMPTS[1], seed=6)))
    np.testing.assert_array_equal(both, pixels(pipe(PROMPTS, seed=5, batch_size=1)))
    assert (pixels(pipe(PROMPTS, seed=6)) != both).any()


def test_the_exports_sampling_options_hold_unless_given(pipe: TextToImagePipeline) -> None:
    own = pixels(pipe(PROMPTS, seed=1))
    options: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 7, "top_p": 0.95}
    np.testing.assert_array_equal(own, pixels(pipe(PROMPTS, seed=1, **options)))
    greedy = pixels(pipe(PROMPTS, seed=1, temperature=0.0))
    np.testing.assert_array_equal(greedy, pixels(pipe(PROMPTS, seed=2, temperature=0.0)))
    np.testing.assert_array_equal(
        pixels(pipe(PROMPTS, seed=1, guidance_scale=0.0))[0], pixels(pipe(PROMPTS[1], seed=1, guidance_scale=0.0))[0]
    )


@pytest.mark.parametrize("kind", ["pipe", "class_pipe"])
def test_saving_and_loading_gives_the_same_pixels(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pipe: TextToImagePipeline = request.getfixturevalue(kind)
    prompts: list[Any] = PROMPTS if kind == "pipe" else [0, 3]
    pipe.save_pretrained(tmp_path / "export")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "export")
    np.testing.assert_array_equal(pixels(pipe(prompts, seed=0)), pixels(loaded(prompts, seed=0)))
    assert (loaded.provenance, loaded.sample, loaded.image_size) == (pipe.provenance, pipe.sample, pipe.image_size)
    for path in (tmp_path / "export").rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH, path  # not only for whoever exported it
        assert not path.name.endswith(".partial")


def test_tokens_are_those_that_a_call_makes_pictures_of(pipe: TextToImagePipeline) -> None:
    tokens = pipe.tokens(PROMPTS, seed=5, batch_size=1)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (2, 4, 4))
    np.testing.assert_array_equal(pipe.decode(tokens), pixels(pipe(PROMPTS, seed=5)))
    assert torch.equal(tokens[1:], pipe.tokens(PROMPTS[1], seeds=[6]))


def test_pixels_do_not_depend_on_batch_and_threads(pipe: TextToImagePipeline) -> None:
    # Enough pictures that another rounding would reach one of their bytes: it did in 1 to 9 of 36.
    pipe.vq = load_vq("shapes")
    tokens = torch.randint(0, 512, (150, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    whole = pipe.decode(tokens)
    for size, count in ((1, 1), (5, 3), (64, 2)):
        torch.set_num_threads(count)
        np.testing.assert_array_equal(np.concatenate([pipe.decode(part) for part in tokens.split(size)]), whole)
        assert torch.get_num_threads() == count


@pytest.mark.skipif(not products.can_pack(), reason="this torch does not multiply with packed weights")
def test_weights_are_packed_when_the_first_picture_is_drawn(pipe: TextToImagePipeline) -> None:
    modules = [module for module in pipe.model.modules() if isinstance(module, products.Multiplies)]
    assert all(module._packed is None for module in modules)
    before = torch.get_rng_state()
    pipe.tokens(PROMPTS, seed=0)
    assert torch.get_rng_state().equal(before)
    assert all(module._packed is not None for module in modules)


def test_a_pipeline_without_a_tokenizer_draws_tokens_alone(class_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    bare = TextToImagePipeline(class_pipe.model, None, None, SAMPLE, 8, Provenance("nar.pt", 3))
    bare.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.tokens([0, 3], seed=0), class_pipe.tokens([0, 3], seed=0))

    def drawn(*_: object) -> None:
        raise AssertionError("drawn in vain")

    loaded.tokens = drawn  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match=r"nar\.pt has no image tokenizer: it gives tokens .* --vq TOKENIZER`$"):
        loaded([0, 3])


def test_a_class_model_draws_numbers(class_pipe: TextToImagePipeline) -> None:
    np.testing.assert_array_equal(pixels(class_pipe(2, seed=0)), pixels(class_pipe([2], seed=0)))


@pytest.mark.parametrize(
    ("kind", "prompts", "message"),
    [
        ("pipe", [], "no prompts"),
        ("pipe", ["a star", 3], "3 is no caption"),
        ("class_pipe", ["a star"], "'a star' is no class of this model; give whole numbers from 0 to 3"),
        ("class_pipe", [0, 4], "4 is no class"),
        ("class_pipe", -1, "-1 is no class"),
    ],
)
def test_prompts_of_the_wrong_kind_are_refused(
    kind: str, prompts: Any, message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)(prompts)


def test_options_out_of_range_are_refused(pipe: TextToImagePipeline) -> None:
    with pytest.raises(ValueError, match="top_p 2"):
        pipe(PROMPTS, top_p=2.0)
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        pipe(PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="both seed and seeds"):
        pipe(PROMPTS, seed=1, seeds=[1, 2])
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe(PROMPTS, batch_size=0)


def test_a_caption_longer_than_the_model_takes_keeps_its_start_and_end_token(text_encoder: TextEncoder) -> None:
    # As training does with stored states.
    model = small_model(small_config((4, 4), condition_dim=8, max_condition=4))
    pipe = TextToImagePipeline(model, VQModel(VQ), text_encoder, SAMPLE, 8, Provenance("test", 3))
    condition, mask = pipe._condition(list(PROMPTS))
    states, _ = text_encoder.encode(PROMPTS)
    assert mask is not None
    assert bool(mask.all())
    for kept, state, real in zip(condition, states, text_encoder.tokenize(PROMPTS)[1], strict=True):
        torch.testing.assert_close(kept, torch.cat([state[real][:3], state[-1:]]))


def test_a_caption_of_ten_thousand_letters_is_drawn(pipe: TextToImagePipeline) -> None:
    assert len(pipe(["a red circle " * 770, PROMPTS[0]], seed=0)) == 2


def test_encode_decode_is_the_tokenizers_reconstruction(pipe: TextToImagePipeline) -> None:
    images = np.stack([training_sample(0, index).image for index in range(2)])
    decoded = pipe.encode_decode(images)
    assert (decoded.shape, decoded.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(decoded, pipe.decode(pipe.vq.encode(images_to_tensor(images))))


def without_format(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"format": 99}))


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["tokens.weight"]
    save_file(weights | {"other": torch.zeros(1)}, folder / "model.safetensors")


def with_another_width(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"tokens.weight": torch.zeros(3, 2)}, folder / "model.safetensors")


def with_an_unknown_field(folder: Path) -> None:
    description = json.loads((folder / "config.json").read_text())
    description["model"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is no export: it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is no export: it has no model.safetensors"),
        (lambda folder: (folder / "tokenizer" / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer has no config.json"),
        (lambda folder: (folder / "text_encoder" / "spiece.model").unlink(), "lacks vocabulary"),
        (without_format, "has export format 99 and this version reads 2; export it again"),
        (without_a_weight, r"missing tokens.weight; unexpected other"),
        (with_another_width, r"tokens.weight is \(3, 2\), expected \(11, 16\)"),
        (with_an_unknown_field, r"config\.json is no ExportDescription: model\.depth is no field of it$"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json holds a JSON list"),
        (lambda folder: (folder / "config.json").write_text('{"z_channels": 3}'), "no export: .* something else"),
        (lambda folder: (folder / "config.json").write_text('{"format": 2}'), "model is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), r"model\.safetensors is damaged"),
    ],
)
def test_a_damaged_export_is_refused_by_what_it_lacks(
    pipe: TextToImagePipeline, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    pipe.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        TextToImagePipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        TextToImagePipeline.from_pretrained(tmp_path, "cuda:99")


def test_pictures_are_drawn_in_evaluation_mode(pipe: TextToImagePipeline) -> None:
    model = small_model(replace(pipe.model.config, dropout=0.9)).train()
    made = TextToImagePipeline(model, pipe.vq, pipe.text_encoder, SAMPLE, 8, Provenance("test", 1))
    assert not made.model.training
    np.testing.assert_array_equal(pixels(made(PROMPTS, seed=0)), pixels(pipe(PROMPTS, seed=0)))


@pytest.mark.parametrize(("count", "columns", "size"), [(1, None, (8, 8)), (5, None, (28, 18)), (4, 4, (38, 8))])
def test_picture_grid(count: int, columns: int | None, size: tuple[int, int]) -> None:
    images = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(count)]
    grid = picture_grid(images, columns)
    assert grid.size == size
    per_row = (size[0] + 2) // 10
    for n in range(count):
        assert grid.getpixel((n % per_row * 10, n // per_row * 10)) == (n, 0, 0)


def test_an_export_cut_off_while_it_is_written_over_is_none(
    pipe: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vq, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no export: it has no config\.json"):
        TextToImagePipeline.from_pretrained(tmp_path)


# Clips


def clip_pixels(clips: list[list[Image.Image]]) -> np.ndarray:
    return np.stack([pixels(frames) for frames in clips])


def test_a_clip_for_each_class_whatever_the_batch(video_pipe: TextToImagePipeline) -> None:
    clips = clip_pixels(video_pipe.clips([1, 3, 0], seed=5))
    assert (clips.shape, clips.dtype) == ((3, 3, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(clips, clip_pixels(video_pipe.clips([1, 3, 0], seeds=[5, 6, 7], batch_size=2)))
    np.testing.assert_array_equal(clips[1:2], clip_pixels(video_pipe.clips(3, seed=6)))
    assert (clip_pixels(video_pipe.clips([1, 3, 0], seed=6)) != clips).any()


def test_frames_are_what_the_tokenizer_makes_of_their_tokens_alone(video_pipe: TextToImagePipeline) -> None:
    tokens = torch.randint(11, (2, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    decoded = video_pipe.decode(tokens)
    for clip, clip_tokens in zip(decoded, tokens, strict=True):
        np.testing.assert_array_equal(clip, video_pipe.decode(clip_tokens))  # three frames as a batch of pictures


def test_a_saved_video_model_draws_the_same_clips(video_pipe: TextToImagePipeline, tmp_path: Path) -> None:
    video_pipe.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.draws_clips
    np.testing.assert_array_equal(
        clip_pixels(loaded.clips([0, 3], seed=0)), clip_pixels(video_pipe.clips([0, 3], seed=0))
    )


def test_a_video_model_of_captions_draws_clips(text_encoder: TextEncoder) -> None:
    model = small_model(small_config((2, 4, 4), condition_dim=8, max_condition=32))
    pipe = TextToImagePipeline(model, VQModel(VQ), text_encoder, SAMPLE, 8, Provenance("test", 3))
    assert clip_pixels(pipe.clips(PROMPTS, seed=0)).shape == (2, 2, 8, 8, 3)


def test_clips_and_pictures_each_have_their_method(
    video_pipe: TextToImagePipeline, class_pipe: TextToImagePipeline
) -> None:
    assert (video_pipe.draws_clips, class_pipe.draws_clips) == (True, False)
    with pytest.raises(ValueError, match="this model draws clips, not pictures; call its method `clips`"):
        video_pipe([0], seed=0)
    with pytest.raises(ValueError, match="this model draws pictures, not clips; call it instead"):
        class_pipe.clips([0], seed=0)
    with pytest.raises(ValueError, match="4 is no class"):
        video_pipe.clips([0, 4])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        video_pipe.clips([0, 1], seeds=[1])


# Decoding on request, and being watched


@pytest.fixture
def raster_pipe() -> TextToImagePipeline:
    torch.manual_seed(0)
    model = small_model(small_config((4, 4), condition="class", order="raster"))
    return TextToImagePipeline(model, VQModel(VQ), None, SAMPLE, 8, Provenance("test", 3))


def test_a_raster_model_is_decoded_with_zipar_on_request(raster_pipe: TextToImagePipeline) -> None:
    passes: list[int] = []
    draw = partial(raster_pipe.tokens, [0, 3], seed=0, watch=lambda number, _: passes.append(number))
    raster = draw()
    assert passes == list(range(16))
    assert torch.equal(draw(zipar_window=4), raster)
    passes.clear()
    assert not torch.equal(draw(zipar_window=1), raster)
    assert len(passes) == passes_needed(4, 4, 1)
    assert draw(zipar_window=1, zipar_adaptive=True, progress=True).shape == (2, 4, 4)


def test_guidance_can_end_early(class_pipe: TextToImagePipeline) -> None:
    options = {"guidance_scale": 4.0, "temperature": 0.0}
    whole, half, none = (class_pipe.tokens(1, 0, guidance_share=share, **options) for share in (1.0, 0.5, 0.0))
    assert torch.equal(none, class_pipe.tokens(1, 0, guidance_scale=1.0, temperature=0.0))
    early = (levels((4, 4)) < 4).view(1, 4, 4)  # the first four passes of seven
    assert torch.equal(half[early], whole[early])
    assert not torch.equal(half, whole)
    with torch.no_grad():  # the rest is what the condition alone makes likeliest
        logits = class_pipe.model.logits(half.flatten(1), torch.tensor([1]))
    assert torch.equal(logits.argmax(-1).view(1, 4, 4)[~early], half[~early])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zipar_window": 1}, "ZipAR decodes pictures of raster models"),
        ({"zipar_adaptive": True}, "zipar_adaptive needs zipar_window"),
        ({"guidance_share": 1.5}, r"guidance_share is 1.5; it must be in \[0, 1\]"),
        ({"guidance_share": 0.5, "zipar_window": 1}, "guidance_share is not for ZipAR"),
    ],
)
def test_ways_to_decode_that_do_not_fit_are_refused(
    class_pipe: TextToImagePipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        class_pipe(0, **options)


@pytest.mark.parametrize("kind", ["class_pipe", "video_pipe"])
def test_what_is_not_drawn_yet_is_grey(kind: str, request: pytest.FixtureRequest) -> None:
    pipe: TextToImagePipeline = request.getfixturevalue(kind)
    seen: list[tuple[torch.Tensor, np.ndarray]] = []
    final = pipe.tokens([0, 1], 0, watch=lambda _, tokens: seen.append((tokens.clone(), pipe.unfinished(tokens))))
    assert (seen[-1][1] == pipe.decode(final)).all()
    for tokens, drawn in seen[:-1]:
        cells = (tokens < 0).numpy().repeat(2, -2).repeat(2, -1)
        assert (drawn[cells] == 128).all()
        assert not (drawn[~cells] == 128).all()
