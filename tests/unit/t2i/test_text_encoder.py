import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5EncoderModel

from t2i.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    pad_left,
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
    encoder = TextEncoder.from_config(CONFIG, spiece).eval()
    for name, parameter in encoder.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):  # zero in a new encoder, which then mixes no tokens
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.fixture(scope="module")
def saved(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "text_encoder"
    encoder.save_pretrained(folder)
    return folder


class TestTokenize:
    def test_pads_on_the_left(self, encoder: TextEncoder) -> None:
        ids_BL, mask_BL = encoder.tokenize(["a photo of a red circle", "a star", ""])
        assert ids_BL.dtype == torch.int64
        assert mask_BL.dtype == torch.bool
        assert (ids_BL[:, -1] == 1).all()
        assert mask_BL[:, -1].all()
        assert mask_BL[0].all()
        assert mask_BL[2].tolist() == [False] * (ids_BL.shape[1] - 1) + [True]
        assert torch.equal(ids_BL == 0, ~mask_BL)

    def test_empty_caption_is_one_token(self, encoder: TextEncoder) -> None:
        ids_BL, mask_BL = encoder.tokenize(["", "<br/>"])
        assert ids_BL.tolist() == [[1], [1]]
        assert mask_BL.all()

    def test_long_caption_keeps_its_start_and_the_end_token(self, encoder: TextEncoder) -> None:
        text = "a photo of " + "a red star " * 1000
        ids_BL, mask_BL = encoder.tokenize([text])
        assert ids_BL.shape == (1, CONFIG.max_length)
        assert ids_BL[0, :-1].tolist() == encoder.vocabulary.encode(text)[: CONFIG.max_length - 1]
        assert ids_BL[0, -1] == 1
        assert mask_BL.all()

    def test_caption_that_just_fits_is_whole(self, spiece: Path, encoder: TextEncoder) -> None:
        ids = encoder.vocabulary.encode(CAPTIONS[0])
        fitting = TextEncoder.from_config(replace(CONFIG, max_length=len(ids) + 1), spiece)
        assert fitting.tokenize([CAPTIONS[0]])[0].tolist() == [[*ids, 1]]

    def test_cleans(self, encoder: TextEncoder) -> None:
        plain, web = encoder.tokenize(["a red star"])[0], encoder.tokenize(["<b>a red&nbsp;star</b>"])[0]
        assert torch.equal(plain, web)

    def test_lower_case(self, spiece: Path, encoder: TextEncoder) -> None:
        lower = TextEncoder.from_config(replace(CONFIG, lower_case=True), spiece)
        assert torch.equal(lower.tokenize(["A Red STAR"])[0], encoder.tokenize(["a red star"])[0])
        assert not torch.equal(encoder.tokenize(["A Red STAR"])[0], encoder.tokenize(["a red star"])[0])

    @pytest.mark.parametrize("captions", [[], (), "a red star"])
    def test_not_a_list_of_captions(self, encoder: TextEncoder, captions: list[str]) -> None:
        with pytest.raises(ValueError, match="tokenize needs a list of at least one caption"):
            encoder.tokenize(captions)


class TestStates:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.sampled_from([*CAPTIONS, "", "a star", "star " * 40]), min_size=1, max_size=6))
    def test_do_not_depend_on_the_batch(self, encoder: TextEncoder, captions: list[str]) -> None:
        states_BLC, mask_BL = encoder.encode(captions)
        assert states_BLC.shape == (*mask_BL.shape, encoder.dim)
        for caption, states_LC, mask_L in zip(captions, states_BLC, mask_BL, strict=True):
            alone_1LC, _ = encoder.encode([caption])
            torch.testing.assert_close(states_LC[mask_L], alone_1LC[0], atol=1e-5, rtol=1e-5)
            assert not states_LC[~mask_L].any()

    def test_do_not_depend_on_the_amount_of_padding(self, encoder: TextEncoder) -> None:
        ids_BL, mask_BL = encoder.tokenize([CAPTIONS[0]])
        with torch.no_grad():
            alone = encoder(ids_BL, mask_BL)
            for padding in (1, 7, 200):
                ids = torch.nn.functional.pad(ids_BL, (padding, 0), value=0)
                mask = torch.nn.functional.pad(mask_BL, (padding, 0), value=False)
                torch.testing.assert_close(encoder(ids, mask)[:, padding:], alone, atol=1e-5, rtol=1e-5)

    def test_depend_on_the_order_of_words(self, encoder: TextEncoder) -> None:
        one, _ = encoder.encode(["red star left of blue heart"])
        other, _ = encoder.encode(["blue heart left of red star"])
        assert not torch.allclose(one[0, -1], other[0, -1], atol=1e-2)

    def test_encode_leaves_no_graph_and_no_dropout(self, spiece: Path) -> None:
        dropping = TextEncoder.from_config(replace(CONFIG, dropout=0.5), spiece)  # drops embeddings, too
        assert dropping.training
        one, other = dropping.encode(CAPTIONS[:2])[0], dropping.encode(CAPTIONS[:2])[0]
        assert torch.equal(one, other)
        assert not one.requires_grad
        assert dropping.training
        assert dropping.encoder.training
        assert not torch.equal(dropping(*dropping.tokenize(CAPTIONS[:2])), one)

    def test_bfloat16(self, encoder: TextEncoder) -> None:
        half = copy.deepcopy(encoder).to(torch.bfloat16)
        half_BLC, mask_BL = half.encode([*CAPTIONS[:4], ""])
        assert half_BLC.dtype == torch.bfloat16
        full_BLC, _ = encoder.encode([*CAPTIONS[:4], ""])
        error = (half_BLC.float() - full_BLC)[mask_BL].square().mean() / full_BLC[mask_BL].square().mean()
        assert error < 1e-3

    def test_same_as_transformers(self, encoder: TextEncoder, saved: Path) -> None:
        theirs = T5EncoderModel.from_pretrained(saved, local_files_only=True, dtype=torch.float32).eval()
        ids_BL, mask_BL = encoder.tokenize([*CAPTIONS, ""])
        with torch.no_grad():
            expected = theirs(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        ours, _ = encoder.encode([*CAPTIONS, ""])
        torch.testing.assert_close(ours[mask_BL], expected[mask_BL], atol=1e-5, rtol=1e-5)


class TestTraining:
    def test_each_parameter_has_one_name(self, encoder: TextEncoder) -> None:
        names = [name for name, _ in encoder.named_parameters(remove_duplicate=False)]
        assert sorted(names) == sorted(encoder.state_dict())
        pointers = {tensor.data_ptr() for tensor in encoder.state_dict().values()}
        assert len(pointers) == len(names)

    def test_every_parameter_gets_a_gradient(self, encoder: TextEncoder) -> None:
        encoder = copy.deepcopy(encoder)
        ids_BL, mask_BL = encoder.tokenize(CAPTIONS)
        (encoder(ids_BL, mask_BL) * torch.randn(CONFIG.dim)).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())

    def test_learns_to_tell_captions_apart(self, spiece: Path) -> None:
        torch.manual_seed(0)
        encoder = TextEncoder.from_config(CONFIG, spiece)
        head = torch.nn.Linear(CONFIG.dim, 2)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
        ids_BL, mask_BL = encoder.tokenize(CAPTIONS)
        labels_B = torch.tensor([int("circle" in caption) for caption in CAPTIONS])
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(head(encoder(ids_BL, mask_BL)[:, -1]), labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.05

    def test_initial_weights_are_distributed_as_transformers_draws_most_of_them(self, spiece: Path) -> None:
        torch.manual_seed(0)
        config = TextEncoderConfig(vocab_size=2000, dim=256, n_head=4, ffn_dim=512)
        ours = dict(TextEncoder.from_config(config, spiece).encoder.named_parameters())
        theirs = dict(
            T5EncoderModel(
                T5Config(vocab_size=2000, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
            ).encoder.named_parameters()
        )
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            if name.endswith((".o.weight", ".wo.weight")):
                assert not parameter.any(), name
                continue
            if name.endswith("relative_attention_bias.weight"):
                continue  # see the next test
            relative = 0.25 if parameter.numel() < 1000 else 0.05
            assert parameter.std().item() == pytest.approx(theirs[name].std().item(), rel=relative), name
            assert abs(parameter.mean().item() - theirs[name].mean().item()) < 0.1, name

    def test_first_heads_look_at_their_neighbours(self, spiece: Path) -> None:
        torch.manual_seed(0)
        encoder = TextEncoder.from_config(replace(CONFIG, n_head=4, dim=64), spiece).eval()
        ids, mask = encoder.tokenize(["a photo of a red circle left of a blue star"])
        encoder.encoder.set_attn_implementation("eager")  # the only one that shows its attention
        attention = encoder.encoder(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0][0]
        words = torch.arange(2, ids.shape[1] - 2)
        for head, offset in enumerate((-1, 1, -2, 2)):
            assert attention[head, words, words + offset].mean() > 0.5

    def test_same_seed_same_weights(self, spiece: Path) -> None:
        first, second = (
            (torch.manual_seed(3), TextEncoder.from_config(CONFIG, spiece).state_dict())[1] for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_initial_weights_under_zero_3(self, spiece: Path) -> None:
        """In a process of its own: DeepSpeed's zero.Init patches torch, and needs a process group."""
        program = f"""
import json, deepspeed
from t2i.engine import start_runtime
from t2i.text_encoder import TextEncoder, TextEncoderConfig
start_runtime()
with deepspeed.zero.Init(config_dict_or_path={{"train_batch_size": 1, "zero_optimization": {{"stage": 3}}}}):
    encoder = TextEncoder.from_config(TextEncoderConfig(vocab_size=300, dim=128), {str(spiece)!r})
deviations = {{}}
for name, parameter in encoder.encoder.named_parameters():
    with deepspeed.zero.GatheredParameters([parameter]):
        deviations[name] = parameter.std().item()
print("DEVIATIONS", json.dumps(deviations))
try:
    encoder.save_pretrained("/nonexistent")
except ValueError as error:
    print("REFUSED", error)
"""
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        deviations = json.loads(re.findall(r"DEVIATIONS (.*)", run.stdout)[0])
        assert deviations["embed_tokens.weight"] == pytest.approx(1.0, rel=0.1)
        assert deviations["block.1.layer.0.SelfAttention.q.weight"] == pytest.approx(128**-0.5 * 32**-0.5, rel=0.1)
        assert deviations["block.1.layer.1.DenseReluDense.wi.weight"] == pytest.approx(128**-0.5, rel=0.1)
        assert deviations["block.1.layer.1.DenseReluDense.wo.weight"] == 0
        assert deviations["block.0.layer.0.SelfAttention.relative_attention_bias.weight"] > 0
        assert re.search("REFUSED .* is partitioned over ranks", run.stdout)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), max_length=st.integers(1, 9))
def test_states_are_padded_on_the_left_and_keep_start_and_end(lengths: list[int], max_length: int) -> None:
    states = [torch.arange(1.0, length + 1)[:, None].expand(-1, 3) for length in lengths]
    padded, mask = pad_left(states, max_length)
    assert padded.shape == (len(lengths), min(max_length, max(lengths)), 3)
    for b, length in enumerate(lengths):
        kept = min(length, max_length)
        assert mask[b].tolist() == [False] * (padded.shape[1] - kept) + [True] * kept
        expected = torch.cat([states[b][: kept - 1], states[b][-1:]])
        torch.testing.assert_close(padded[b][mask[b]], expected)
        assert not padded[b][~mask[b]].any()
    assert bool(mask[:, -1].all())
