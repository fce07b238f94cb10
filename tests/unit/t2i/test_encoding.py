from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.images import CROP_POLICY, center_crop_resize, open_frames, open_rgb
from data_pipeline.index import ShardSet, load_manifest
from t2i.encoding import encode
from t2i.text_encoder import TextEncoder, TextEncoderConfig, text_encoder_sha256, train_sentencepiece
from t2i.vq import VQConfig, VQModel, images_to_tensor, load_vq, vq_sha256


def test_codes_are_those_of_the_tokenizer_in_order(raw_shapes: Path, encoded_shapes: Path) -> None:
    raw, encoded = ShardSet(raw_shapes), ShardSet(encoded_shapes)
    assert len(encoded) == len(raw) == 96
    vq = load_vq("shapes")
    for i in range(0, 96, 13):
        sample, source = encoded.read_encoded(i), raw.read_raw(i)
        assert (sample.key, sample.caption, sample.label) == (source.key, source.caption, source.label)
        picture = center_crop_resize(open_rgb(source.image), 64)
        with torch.no_grad():
            codes = vq.encode(images_to_tensor(picture[None]))[0]
        assert sample.codes.dtype == np.uint16
        np.testing.assert_array_equal(sample.codes, codes)


def test_the_manifest_says_how_the_set_was_encoded(encoded_shapes: Path) -> None:
    manifest = load_manifest(encoded_shapes)
    assert manifest.encoding == {
        "tokenizer_sha256": vq_sha256("shapes"),
        "text_encoder_sha256": None,
        "crop": CROP_POLICY,
        "image_size": 64,
        "grid": [8, 8],
        "codebook_size": 512,
    }


def test_text_states_are_those_of_each_caption_alone(raw_shapes: Path, tmp_path: Path) -> None:
    raw = ShardSet(raw_shapes)
    train_sentencepiece([raw.read_raw(i).caption for i in range(96)], 320, tmp_path / "spiece.model")
    config = TextEncoderConfig(vocab_size=320, dim=16, n_layer=1, n_head=2, ffn_dim=16, max_length=32)
    TextEncoder.from_config(config, tmp_path / "spiece.model").save_pretrained(tmp_path / "t5")
    VQModel(
        VQConfig(base_channels=8, channel_multipliers=(1, 1, 1), z_channels=8, codebook_size=16, norm_groups=4)
    ).save(tmp_path / "vq")
    manifest = encode(
        raw_shapes, tmp_path / "out", tokenizer=str(tmp_path / "vq"), image_size=16, text_encoder=str(tmp_path / "t5"),
        batch_size=32, device="cpu",
    )  # fmt: skip
    assert manifest is not None
    assert manifest.encoding is not None
    assert manifest.encoding["text_encoder_sha256"] == text_encoder_sha256(tmp_path / "t5")
    encoder, encoded = TextEncoder.from_pretrained(tmp_path / "t5"), ShardSet(tmp_path / "out")
    for i in (0, 50, 95):
        sample = encoded.read_encoded(i)
        states, mask = encoder.encode([sample.caption])
        assert sample.states is not None
        assert sample.states.shape == states[0].shape
        assert bool(mask.all())
        torch.testing.assert_close(sample.states.float(), states[0], rtol=1e-2, atol=1e-2)


def test_clips_are_encoded_frame_by_frame(raw_clips: Path, encoded_clips: Path) -> None:
    raw, encoded, vq = ShardSet(raw_clips), ShardSet(encoded_clips), load_vq("shapes")
    encoding = encoded.manifest.encoding
    assert encoding is not None
    assert (encoding["grid"], encoding["frames"], encoding["tokenizer_sha256"]) == ([4, 8, 8], 4, vq_sha256("shapes"))
    for i in (0, 10, 23):
        sample, source = encoded.read_encoded(i), raw.read_raw(i)
        assert (sample.key, sample.caption, sample.label) == (source.key, source.caption, source.label)
        pictures = np.stack([np.asarray(frame) for frame in open_frames(source.image)])
        with torch.no_grad():
            np.testing.assert_array_equal(sample.codes, vq.encode(images_to_tensor(pictures)))


def test_each_rank_encodes_its_shards_and_the_last_one_the_manifest(
    raw_shapes: Path, encoded_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert encode(raw_shapes, tmp_path, tokenizer="shapes", image_size=64, batch_size=16, device="cpu") is None
    assert [path.name for path in tmp_path.glob("*.tar")] == ["shapes-000001.tar"]
    monkeypatch.setenv("RANK", "0")
    manifest = encode(raw_shapes, tmp_path, tokenizer="shapes", image_size=64, batch_size=16, device="cpu")
    assert manifest == load_manifest(encoded_shapes)


def test_pictures_that_do_not_divide_into_tokens_are_refused(raw_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="60 pixels do not divide into tokens of 8; use a multiple of 8"):
        encode(raw_shapes, tmp_path / "out", tokenizer="shapes", image_size=60)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_refused(raw_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json"):
        encode(raw_shapes, tmp_path / "out", tokenizer=str(tmp_path), image_size=64)
