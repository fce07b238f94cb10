import copy
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from t2i.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    resolve_folder,
    text_encoder_sha256,
    train_sentencepiece,
)

CAPTIONS = [
    f"a photo of a {color} {shape} left of a {other}"
    for color in ("red", "blue", "green")
    for shape in ("circle", "square")
    for other in ("star", "heart")
]
CONFIG = TextEncoderConfig(vocab_size=300, dim=32, n_layer=2, n_head=4, ffn_dim=64, max_length=24)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece(CAPTIONS, 285, path)
    return path


@pytest.fixture(scope="module")
def encoder(spiece: Path) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.from_config(CONFIG, spiece).eval()


@pytest.fixture(scope="module")
def saved(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "text_encoder"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


class TestFolders:
    def test_round_trip(self, encoder: TextEncoder, saved: Path, offline: None) -> None:
        assert sorted(path.name for path in saved.iterdir()) == [
            "config.json",
            "model.safetensors",
            "spiece.model",
        ]
        read = TextEncoder.from_pretrained(saved)
        assert not read.training
        assert (read.dim, read.max_length, read.lower_case) == (32, 24, False)
        assert torch.equal(read.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
        assert read.state_dict().keys() == encoder.state_dict().keys()

    def test_saving_what_was_read_changes_nothing(self, saved: Path, tmp_path: Path) -> None:
        TextEncoder.from_pretrained(saved).save_pretrained(tmp_path)
        for path in saved.iterdir():
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name

    def test_options_are_saved(self, spiece: Path, tmp_path: Path) -> None:
        TextEncoder.from_config(replace(CONFIG, lower_case=True), spiece.read_bytes()).save_pretrained(tmp_path)
        read = TextEncoder.from_pretrained(str(tmp_path))
        assert (read.max_length, read.lower_case) == (24, True)
        read = TextEncoder.from_pretrained(tmp_path, max_length=9, lower_case=False)
        assert (read.max_length, read.lower_case) == (9, False)

    def test_bfloat16_is_read_and_saved(self, saved: Path, tmp_path: Path) -> None:
        half = TextEncoder.from_pretrained(saved, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        half.save_pretrained(tmp_path)
        assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
        assert next(TextEncoder.from_pretrained(tmp_path).parameters()).dtype == torch.float32

    @pytest.mark.parametrize("shards", [False, True])
    @pytest.mark.parametrize("absent", ["tokenizer.json", "spiece.model", None])
    def test_layout_of_the_hub(
        self,
        spiece: Path,
        tmp_path: Path,
        offline: None,
        capfd: pytest.CaptureFixture[str],
        shards: bool,
        absent: str | None,
    ) -> None:
        """A whole T5 with a decoder, gated like flan-t5, saved by transformers."""
        config = T5Config(
            vocab_size=288,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).eval()
        model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == shards
        shutil.copy(spiece, tmp_path / "spiece.model")
        AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, extra_ids=0).save_pretrained(tmp_path)
        if absent:
            (tmp_path / absent).unlink()
        capfd.readouterr()
        encoder = TextEncoder.from_pretrained(tmp_path)
        assert capfd.readouterr() == ("", "")
        assert encoder.max_length == 120
        ids_BL, mask_BL = encoder.tokenize(CAPTIONS)
        with torch.no_grad():
            expected_BLC = model.get_encoder()(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        states_BLC, _ = encoder.encode(CAPTIONS)
        torch.testing.assert_close(states_BLC[mask_BL], expected_BLC[mask_BL], atol=1e-5, rtol=1e-5)
        encoder.save_pretrained(tmp_path / "again")
        again = TextEncoder.from_pretrained(tmp_path / "again")
        assert torch.equal(again.encode(CAPTIONS)[0], states_BLC)

    def test_torch_weights(self, saved: Path, encoder: TextEncoder, tmp_path: Path) -> None:
        folder = shutil.copytree(saved, tmp_path / "torch")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert torch.equal(TextEncoder.from_pretrained(folder).encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])

    def test_copies_are_independent(self, encoder: TextEncoder) -> None:
        twin = copy.deepcopy(encoder)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin.encode(CAPTIONS[:1])[0].any()
        assert encoder.encode(CAPTIONS[:1])[0].any()


class TestFaults:
    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("config.json", r"lacks config\.json$"),
            ("model.safetensors", r"lacks weights \(model\.safetensors\)$"),
            ("spiece.model", r"lacks vocabulary \(spiece\.model or tokenizer\.json\)$"),
        ],
    )
    def test_missing_file(self, saved: Path, tmp_path: Path, gone: str, message: str) -> None:
        folder = shutil.copytree(saved, tmp_path / "broken")
        (folder / gone).unlink()
        with pytest.raises(ValueError, match=message):
            TextEncoder.from_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            text_encoder_sha256(folder)

    def test_empty_folder_names_all_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"lacks config\.json, weights .*, vocabulary"):
            TextEncoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.json", b"{", r"config\.json is not JSON"),
            ("config.json", b"[]", "must be 't5'"),
            (
                "config.json",
                b'{"model_type": "t5", "d_model": "wide"}',
                r"config\.json is no T5 configuration: .*d_model",
            ),
            ("config.json", b'{"model_type": "bert"}', "model_type 'bert', but a text encoder must be 't5'"),
            ("model.safetensors", b"garbage!", "weights in .* cannot be read"),
            ("spiece.model", b"garbage!", r"spiece\.model is not a sentencepiece model"),
        ],
    )
    def test_broken_file(self, saved: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        folder = shutil.copytree(saved, tmp_path / "broken")
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TextEncoder.from_pretrained(folder)

    def test_missing_weight(self, saved: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved, tmp_path / "broken")
        weights = load_file(folder / "model.safetensors")
        del weights["encoder.final_layer_norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lack 1 tensors, such as encoder\.final_layer_norm\.weight"):
            TextEncoder.from_pretrained(folder)

    def test_weights_of_another_size(self, saved: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved, tmp_path / "broken")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"d_model": 48}))
        with pytest.raises(ValueError, match=r"weights in .* cannot be read"):
            TextEncoder.from_pretrained(folder)

    def test_vocabulary_too_large_for_the_embedding(self, spiece: Path) -> None:
        with pytest.raises(ValueError, match="has 285 pieces, but the text encoder embeds 284: set its vocab_size"):
            TextEncoder.from_config(replace(CONFIG, vocab_size=284), spiece)

    def test_vocabulary_of_another_convention(self, saved: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved, tmp_path / "broken")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
        with pytest.raises(ValueError, match="end of sentence 1, but the text encoder expects 0 and 2"):
            TextEncoder.from_pretrained(folder)

    @pytest.mark.parametrize(
        "source",
        ["/no/such/folder", "./t5", "../t5", "~/no-such-t5", "runs/t5/final", "t5/", Path("t5-small")],
    )
    def test_missing_folder_is_never_asked_for_on_the_hub(
        self, source: str | Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("asked the hub")

        monkeypatch.setattr("t2i.text_encoder.snapshot_download", refuse)
        with pytest.raises(ValueError, match=f"text encoder folder {re.escape(str(source))} does not exist"):
            TextEncoder.from_pretrained(source)

    def test_hub_out_of_reach(self, offline: None) -> None:
        with pytest.raises(ValueError, match=r"text encoder nobody/no-t5 is not a folder here, and the Hugging Face"):
            TextEncoder.from_pretrained("nobody/no-t5")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"dim": 0}, "dim is 0"),
            ({"n_layer": -1}, "n_layer is -1"),
            ({"max_length": 0}, "max_length is 0"),
            ({"vocab_size": 0}, "vocab_size is 0"),
            ({"dim": 30}, "dim 30 is not divisible by n_head 4"),
            ({"dropout": 1.0}, r"dropout is 1\.0"),
        ],
    )
    def test_config_is_checked(self, fields: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TextEncoderConfig(**(asdict(CONFIG) | fields))

    def test_max_length_is_checked_when_reading(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="max_length is 0"):
            TextEncoder.from_pretrained(saved, max_length=0)


class TestHash:
    def test_of_a_copy_and_of_a_config_saved_by_another_version(self, saved: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(saved, tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "9"}))
        (folder / "README.md").write_text("notes")
        assert text_encoder_sha256(folder) == text_encoder_sha256(str(saved))
        assert re.fullmatch("[0-9a-f]{64}", text_encoder_sha256(saved))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "spiece.model"])
    def test_tells_each_part(self, saved: Path, tmp_path: Path, name: str) -> None:
        folder = shutil.copytree(saved, tmp_path / "copy")
        content = (folder / name).read_bytes()
        changed = content.replace(b'"caption_max_length": 24', b'"caption_max_length": 25')
        (folder / name).write_bytes(changed if name == "config.json" else content[:-1] + b"!")
        assert text_encoder_sha256(folder) != text_encoder_sha256(saved)

    def test_resolved_folder_is_the_folder(self, saved: Path) -> None:
        assert resolve_folder(str(saved)) == saved
