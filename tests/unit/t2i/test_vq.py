import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_pipeline.shapes import training_sample
from t2i.vq import (
    VQConfig,
    VQModel,
    images_to_tensor,
    load_official_vq,
    load_vq,
    tensor_to_images,
    vq_folder,
    vq_sha256,
)

SMALL = VQConfig(
    base_channels=8, channel_multipliers=(1, 2), n_res_blocks=1, z_channels=8, codebook_size=16, codebook_dim=4, norm_groups=4
)  # fmt: skip


def test_indices_and_reconstruction_are_the_published_ones(reference: Callable[[str], Any]) -> None:
    fixture = reference("vq")
    vq = load_official_vq(fixture.weights)
    with torch.no_grad():
        indices = vq.encode(fixture.tensors["in.image"])
        pictures = vq.decode(indices)
    assert torch.equal(indices, fixture.tensors["out.indices"])
    torch.testing.assert_close(pictures, fixture.tensors["out.reconstruction"], rtol=0, atol=1e-4)
    assert vq.config == VQConfig(
        base_channels=32,
        channel_multipliers=(1, 1, 2),
        n_res_blocks=2,
        z_channels=32,
        codebook_size=128,
        codebook_dim=8,
    )
    assert not vq.training


def test_a_patch_encoder_sees_the_pixels_of_its_own_token_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vq = VQModel(replace(SMALL, encoder="patches")).eval()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    features = vq.features(images)
    assert features.shape == (2, 4, 4, 6)
    changed = images.clone()
    changed[:, :, 2:4, 4:6] = 0
    differs = (vq.features(changed) != features).any(1)
    assert differs[:, 1, 2].all()
    assert differs.sum() == 2
    vq.save(tmp_path)
    assert torch.equal(load_vq(str(tmp_path)).encode(images), vq.encode(images))


def test_every_published_key_that_does_not_fit_is_listed(reference: Callable[[str], Any]) -> None:
    weights = reference("vq").weights
    del weights["quant_conv.bias"]
    weights["loss.discriminator"] = torch.zeros(1)
    weights["decoder.conv_out.weight"] = torch.zeros(4, 32, 3, 3)
    weights["quantize.codebook_used"] = torch.zeros(3)  # a training statistic that published files carry
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_vq(weights)
    for part in (
        "missing quant_conv.bias",
        "unexpected loss.discriminator",
        "decoder.conv_out.weight is (4, 32, 3, 3), expected (3, 32, 3, 3)",
    ):
        assert part in str(error.value)
    assert "codebook_used" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        VQConfig(32, (1, 2, 2, 4), 1, z_channels=48, codebook_size=7, codebook_dim=3),
        VQConfig(64, (2, 1), 3, z_channels=32, codebook_size=300, codebook_dim=64),
        VQConfig(32, (3,), 2, z_channels=32, codebook_size=1, codebook_dim=1),
    ],
)
def test_every_size_of_published_weights_is_read_off_their_shapes(config: VQConfig) -> None:
    torch.manual_seed(0)
    vq = VQModel(config).eval()
    loaded = load_official_vq({key: tensor.half() for key, tensor in vq.state_dict().items()})
    assert loaded.config == config
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, vq.state_dict()[key].half().float())


def test_any_missing_or_misshapen_published_key_is_named(reference: Callable[[str], Any]) -> None:
    weights = reference("vq").weights
    outside = ("encoder.conv_in", "encoder.conv_out", "quantize", "quant_conv", "post_quant_conv", "decoder.conv_out")
    for key in weights:
        if not key.startswith((*outside, "encoder.conv_blocks.1.res.0.conv1", "decoder.mid.1.q")):
            continue
        rest = {other: t for other, t in weights.items() if other != key}
        with pytest.raises(ValueError, match=f"missing {key}"):
            load_official_vq(rest)
        with pytest.raises(ValueError, match=rf"{key} is \(\), expected \("):
            load_official_vq(rest | {key: torch.zeros(())})


def test_what_decides_the_sizes_may_be_missing_beside_others(reference: Callable[[str], Any]) -> None:
    weights = reference("vq").weights
    gone = (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "quantize.embedding.weight",
        "decoder.mid.0.norm1.bias",
    )
    for key in gone:
        del weights[key]
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_vq(weights)
    listed = str(error.value).removeprefix("published tokenizer weights do not fit: ").split("; ")
    assert sorted(listed) == sorted(f"missing {key}" for key in gone)


def test_weights_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not the weights of a VQ tokenizer: no encoder.conv_blocks; .* conv.weight"):
        load_official_vq({"conv.weight": torch.zeros(1)})


def test_vq_16_has_stride_16_and_72_million_parameters() -> None:
    with torch.device("meta"):
        model = VQModel(VQConfig())
    assert model.config.stride == 16
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 72


def test_shapes_of_tokens_and_pictures() -> None:
    vq = VQModel(SMALL).eval()
    indices = vq.encode(torch.rand(3, 3, 8, 12) * 2 - 1)
    assert indices.shape == (3, 4, 6)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 16
    assert vq.decode(indices).shape == (3, 3, 8, 12)


def test_nearest_is_the_code_at_the_smallest_distance() -> None:
    vq = VQModel(SMALL).eval()
    features = vq.features(torch.rand(2, 3, 8, 8) * 2 - 1)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 4, 4))
    distances = (features.movedim(1, -1)[..., None, :] - vq.quantize.normalized()).norm(dim=-1)
    assert torch.equal(vq.nearest(features), distances.argmin(-1))
    assert torch.equal(vq.nearest(vq.embed(vq.nearest(features))), vq.nearest(features))


@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_a_picture_that_does_not_divide_into_tokens_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"picture of {size[0]}x{size[1]} pixels"):
        VQModel(SMALL).encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"codebook_size": 65537}, "at most 65536"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers is \(1, 0\)"),
        ({"encoder": "vit"}, "encoder is 'vit'; it must be convolutional or patches"),
        ({"base_channels": 40}, "40 channels at one level, not divisible by norm_groups 32"),
    ],
)
def test_sizes_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saving_and_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    vq = VQModel(SMALL)
    vq.save(tmp_path / "vq", dtype)
    loaded = VQModel.from_folder(tmp_path / "vq")
    assert loaded.config == SMALL
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, vq.state_dict()[name].to(dtype).float(), rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "vq").iterdir()) == ["config.json", "model.safetensors"]
    # Whoever serves the weights need not be who wrote them.
    assert (tmp_path / "vq" / "model.safetensors").stat().st_mode & stat.S_IROTH


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path, missing: str) -> None:
    VQModel(SMALL).save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing}"):
        load_vq(str(tmp_path))
    with pytest.raises(ValueError, match=f"has no {missing}"):
        vq_sha256(str(tmp_path))


def change_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "t5"}'),
            r"config\.json describes no image tokenizer",
        ),
        (lambda f: change_config(f, z_chanels=8), r"config\.json is no VQConfig: z_chanels is no field of it$"),
        (lambda f: change_config(f, z_channels="wide"), r"z_channels is 'wide' \(input should be a valid integer"),
        (lambda f: change_config(f, codebook_size=0), "codebook_size is 0; it must be at least 1"),
        (
            lambda f: change_config(f, codebook_dim=5),
            r"model\.safetensors does not fit its config\.json: .*expected \(16, 5\)",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), r"model\.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    VQModel(SMALL).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        VQModel.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_export_is_no_tokenizer_but_holds_one(tmp_path: Path) -> None:
    VQModel(SMALL).save(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text('{"format": 1, "provenance": {}}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match=f"is an export, not a tokenizer; its tokenizer is in {tmp_path / 'tokenizer'}$"
    ):
        load_vq(str(tmp_path))


def test_the_hash_is_that_of_weights_and_configuration(tmp_path: Path) -> None:
    VQModel(SMALL).save(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    VQModel.from_folder(tmp_path / "a").save(tmp_path / "b")
    assert vq_sha256(str(tmp_path / "a")) == vq_sha256(str(tmp_path / "b"))
    weights["post_quant_conv.bias"] += 1e-3
    save_file(weights, tmp_path / "b" / "model.safetensors")
    assert vq_sha256(str(tmp_path / "a")) != vq_sha256(str(tmp_path / "b"))


@given(st.integers(0, 2**32 - 1))
def test_pictures_survive_the_way_to_tensors_and_back(seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    tensor = images_to_tensor(images)
    assert tensor.shape == (2, 3, 4, 6)
    assert float(tensor.abs().max()) <= 1
    np.testing.assert_array_equal(tensor_to_images(tensor), images)
    np.testing.assert_array_equal(tensor_to_images(images_to_tensor(list(images))), images)


def test_pixels_beyond_the_range_are_clipped() -> None:
    pixels = tensor_to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 3, 1, 5))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_shipped_tokenizer_keeps_shapes_pictures() -> None:
    vq = load_vq("shapes")
    assert vq.config.stride == 8
    assert not any(p.requires_grad for p in vq.parameters())
    folder = vq_folder("shapes")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4e6
    assert json.loads((folder / "config.json").read_text())["codebook_size"] == vq.config.codebook_size
    images = np.stack([training_sample(123, index).image for index in range(24)])
    with torch.no_grad():
        indices = vq.encode(images_to_tensor(images))
        decoded = tensor_to_images(vq.decode(indices))
    assert indices.shape == (24, 8, 8)
    error = np.square(decoded.astype(float) - images).mean()
    assert 10 * np.log10(255**2 / error) > 22  # dB
