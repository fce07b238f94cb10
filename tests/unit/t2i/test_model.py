import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import captions, small_config, small_model
from torch import Tensor

from t2i.config import ModelConfig
from t2i.convert import load_official_nar
from t2i.model import NAR, parameter_count
from t2i.recipes import PRESETS
from t2i.sampling import generate
from t2i.wavefronts import levels, order, wavefront_sizes

few = settings(max_examples=25)
grids = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
variants = st.sampled_from(
    [
        {},
        {"prefix_rotary": "zero"},
        {"n_head": 4, "n_kv_head": 2},
        {"uncond_tokens": 3},
        {"uncond_embedding": "frozen"},
        {"uncond_tokens": 5, "uncond_mask": "caption"},
        {"zero_init_heads": "all"},
        {"order": "raster"},
    ]
)


def tokens_for(config: ModelConfig, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, math.prod(config.grid)), generator=generator)


# Parity with the published computation


@pytest.mark.parametrize(
    ("name", "grid"), [("nar_t2i", (5, 5)), ("nar_c2i", (4, 4)), ("nar_video", (2, 3, 4))], ids=["t2i", "c2i", "video"]
)
def test_logits_loss_and_greedy_tokens_are_the_published_ones(
    reference: Callable[[str], Any], name: str, grid: tuple[int, ...]
) -> None:
    fixture = reference(name)
    model = load_official_nar(fixture.weights, grid=grid, n_head=fixture.config["n_head"])
    tokens, expected = fixture.tensors["in.tokens"], fixture.tensors["out.train_logits"]
    with torch.no_grad():
        logits = model.logits(tokens, fixture.condition, fixture.mask)
        loss = model(tokens, fixture.condition, fixture.mask)
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 2e-5
    assert abs(float(loss - fixture.tensors["out.train_loss"])) <= 1e-5
    scales = [key for key in fixture.tensors if key.startswith("out.greedy_tokens_cfg")]
    assert len(scales) == 2
    for key in scales:
        drawn = generate(
            model, fixture.condition, fixture.mask, guidance_scale=float(key.partition("cfg")[2]), temperature=0
        )
        assert torch.equal(drawn.flatten(1), fixture.tensors[key]), key


# Against an implementation that follows the definition, position by position


def obvious_logits(model: NAR, tokens_BN: Tensor, states_BPX: Tensor, mask_BP: Tensor) -> Tensor:
    """Mixed logits by the definition: row-major sequence, a mask from coordinates, each head's logits in full."""
    config, weights = model.config, model.state_dict()
    coords = list(itertools.product(*(range(n) for n in config.grid)))
    prefix, head_dim = states_BPX.shape[1], config.width // config.n_head
    projected = F.gelu(states_BPX @ weights["prefix.fc1.weight"].T, approximate="tanh") @ weights["prefix.fc2.weight"].T
    x = torch.cat([projected, weights["tokens.weight"][tokens_BN]], dim=1)
    if config.positions == "learned":
        x = x + weights["positions"][config.max_condition - prefix :]
    length = x.shape[1]
    allowed = torch.zeros(len(x), length, length, dtype=torch.bool)
    for b, i, j in itertools.product(range(len(x)), range(length), range(length)):
        if i < prefix:
            allowed[b, i, j] = i == j or (j < i and bool(mask_BP[b, j]))
        elif j < prefix:
            allowed[b, i, j] = bool(mask_BP[b, j])
        else:
            raster, (row, column) = config.order == "raster", (coords[i - prefix], coords[j - prefix])
            allowed[b, i, j] = j <= i if raster else sum(column) <= sum(row)

    def turned(v_LE: Tensor) -> Tensor:
        if config.positions == "learned":
            return v_LE
        result = torch.zeros_like(v_LE)
        for i, pair in itertools.product(range(length), range(head_dim // 2)):
            if i < prefix:
                factor = complex(1 if config.prefix_rotary == "identity" else 0)
            else:
                quarter = head_dim // 4
                coordinate = coords[i - prefix][0 if pair < quarter else 1]
                angle = coordinate * config.rope_base ** (-2 * (pair % quarter) / (head_dim // 2))
                factor = complex(math.cos(angle), math.sin(angle))
            value = complex(float(v_LE[i, 2 * pair]), float(v_LE[i, 2 * pair + 1])) * factor
            result[i, 2 * pair], result[i, 2 * pair + 1] = value.real, value.imag
        return result

    def norm(h: Tensor, weight: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    kv_heads = config.n_kv_head or config.n_head
    hidden = []
    for number in range(len(model.blocks)):
        w = {k.removeprefix(f"blocks.{number}."): v for k, v in weights.items() if k.startswith(f"blocks.{number}.")}
        wide = norm(x, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T
        q, k, v = wide.split([config.width, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
        mixed = torch.zeros_like(q)
        for b, head in itertools.product(range(len(x)), range(config.n_head)):
            mine = slice(head * head_dim, (head + 1) * head_dim)
            group = head * kv_heads // config.n_head
            shared = slice(group * head_dim, (group + 1) * head_dim)
            scores = turned(q[b, :, mine]) @ turned(k[b, :, shared]).T / math.sqrt(head_dim)
            mixed[b, :, mine] = scores.masked_fill(~allowed[b], -torch.inf).softmax(-1) @ v[b, :, shared]
        x = x + mixed @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gate = y @ w["feed_forward.w1.weight"].T
        up = y @ w["feed_forward.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["feed_forward.w2.weight"].T
        hidden.append(x)
    axes = 1 if config.order == "raster" else len(config.grid)
    heads = []
    for axis in range(axes):
        h = hidden[config.n_layer - 1 + (axes - 1 - axis)]  # the last axis after the trunk, each other one block later
        heads.append(norm(h, weights[f"heads.norms.{axis}.weight"]) @ weights["heads.weight"][:, axis].T)
    logits = torch.zeros(len(x), len(coords), config.vocab_size)
    for n, coordinate in enumerate(coords):
        predictions = []
        for axis in range(axes):
            back = tuple(c - (a == axis) for a, c in enumerate(coordinate))
            if config.order == "raster" and n > 0:
                predictions.append(heads[axis][:, prefix + n - 1])
            elif config.order == "neighbor" and min(back) >= 0:
                predictions.append(heads[axis][:, prefix + coords.index(back)])
            elif n == 0:
                predictions.append(heads[axis][:, prefix - 1])
        logits[:, n] = torch.stack(predictions).mean(0)
    return logits


@settings(max_examples=12)
@given(
    grid=grids, variant=variants, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=2), seed=st.integers(0, 99)
)
def test_logits_and_loss_are_those_of_the_definition(
    grid: tuple[int, ...], variant: dict[str, Any], lengths: list[int], seed: int
) -> None:
    model = small_model(small_config(grid, **variant), seed)
    states, mask = captions(model.config, lengths, seed)
    tokens = tokens_for(model.config, len(lengths), seed)
    with torch.no_grad():
        expected = obvious_logits(model, tokens, states, mask)
        logits = model.logits(tokens, states, mask)
        loss = model(tokens.unflatten(1, grid), states, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), tokens.flatten()), rtol=1e-4, atol=1e-4)


# Decoding is the same function


@few
@given(
    grid=grids, variant=variants, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_cached_steps_give_the_uncached_logits(
    grid: tuple[int, ...], variant: dict[str, Any], lengths: list[int], seed: int
) -> None:
    model = small_model(small_config(grid, **variant), seed)
    states, mask = captions(model.config, lengths, seed)
    tokens = tokens_for(model.config, len(lengths), seed)
    in_order, sizes = order(model.config.schedule), wavefront_sizes(model.config.schedule)
    with torch.no_grad():
        expected = model.logits(tokens, states, mask)[:, in_order]
        step, cache, prefix_mask = model.prefill(states, mask)
        got, done = [step], 0
        for wavefront, size in enumerate(sizes[:-1]):
            got.append(model.step(tokens[:, in_order[done : done + size]], wavefront, cache, prefix_mask))
            done += size
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.length == states.shape[1] + model.n_tokens - sizes[-1]


@few
@given(
    grid=grids, variant=variants, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 99)
)
def test_greedy_tokens_are_the_argmax_of_the_uncached_logits(
    grid: tuple[int, ...], variant: dict[str, Any], lengths: list[int], seed: int
) -> None:
    model = small_model(small_config(grid, **variant), seed)
    states, mask = captions(model.config, lengths, seed)
    drawn = generate(model, states, mask, temperature=0)
    assert drawn.shape == (len(lengths), *grid)
    with torch.no_grad():
        assert torch.equal(model.logits(drawn, states, mask).argmax(-1), drawn.flatten(1))


@few
@given(grid=grids, seed=st.integers(0, 99), data=st.data())
def test_a_token_changes_only_the_logits_of_later_levels(grid: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    model = small_model(small_config(grid), seed)
    states, mask = captions(model.config, [3], seed)
    tokens = tokens_for(model.config, 1, seed)
    place = data.draw(st.integers(0, tokens.shape[1] - 1))
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens, states, mask), model.logits(changed, states, mask)
    level = levels(grid)
    torch.testing.assert_close(before[:, level <= level[place]], after[:, level <= level[place]])
    later = level > level[place]
    if later.any():
        assert not torch.allclose(before[:, later], after[:, later])


# Conditions


@few
@given(grid=grids, variant=variants, seed=st.integers(0, 99))
def test_logits_do_not_depend_on_padding(grid: tuple[int, ...], variant: dict[str, Any], seed: int) -> None:
    model = small_model(small_config(grid, **variant), seed)
    states, mask = captions(model.config, [2, 5], seed)  # the first is padded by three
    tokens = tokens_for(model.config, 2, seed)
    with torch.no_grad():
        together = model.logits(tokens, states, mask)[:1]
        alone = model.logits(tokens[:1], states[:1, 3:], mask[:1, 3:])
        unmasked = model.logits(tokens[:1], states[:1, 3:])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, unmasked)


def unconditional_loss(model: NAR, lengths: list[int], seed: int) -> Tensor:
    states, mask = captions(model.config, lengths, seed)
    tokens = tokens_for(model.config, len(lengths))
    with torch.no_grad():
        return model(tokens, states, mask, torch.ones(len(lengths), dtype=torch.bool))


@pytest.mark.parametrize("grid", [(3, 3), (2, 2, 2)])
@pytest.mark.parametrize("uncond_tokens", [1, 3, 5])
def test_unconditional_branch_knows_nothing_of_the_caption(grid: tuple[int, ...], uncond_tokens: int) -> None:
    model = small_model(small_config(grid, uncond_tokens=uncond_tokens))
    losses = [unconditional_loss(model, [length], seed) for length in (1, 3, 5) for seed in (0, 1)]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(6))


def test_published_unconditional_branch_depends_on_the_captions_length_alone() -> None:
    model = small_model(small_config((3, 3), uncond_tokens=5, uncond_mask="caption"))
    for length in (1, 3, 5):
        torch.testing.assert_close(unconditional_loss(model, [length], 0), unconditional_loss(model, [length], 1))
    assert not torch.isclose(unconditional_loss(model, [2], 0), unconditional_loss(model, [5], 0))


def test_dropping_conditions_leaves_the_other_samples_alone() -> None:
    model = small_model(small_config((3, 3), uncond_tokens=3))
    states, mask = captions(model.config, [1, 2])
    tokens = tokens_for(model.config, 2)
    with torch.no_grad():
        mixed = model(tokens, states, mask, torch.tensor([True, False]))
        separate = (
            model(tokens[:1], states[:1], mask[:1], torch.tensor([True])) + model(tokens[1:], states[1:], mask[1:])
        ) / 2
    torch.testing.assert_close(mixed, separate)


def test_class_condition_and_its_row_for_no_class() -> None:
    model = small_model(small_config((3, 3), condition="class"))
    labels, tokens = torch.tensor([0, 3]), tokens_for(model.config, 2)
    with torch.no_grad():
        assert not torch.allclose(model(tokens[:1], labels[:1]), model(tokens[:1], labels[1:]))
        dropped = model(tokens, labels, None, torch.tensor([True, True]))
        assert torch.equal(dropped, model(tokens, torch.tensor([4, 4])))


# Training


def test_dropout_only_while_training() -> None:
    model = small_model(small_config((3, 3), dropout=0.5))
    states, mask = captions(model.config, [3])
    tokens = tokens_for(model.config, 1)
    with torch.no_grad():
        assert torch.equal(model(tokens, states, mask), model(tokens, states, mask))
        model.train()
        assert not torch.equal(model(tokens, states, mask), model(tokens, states, mask))


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_model(small_config((3, 3), dropout=0.3)).train()
        model.activation_checkpointing = checkpointing
        states, mask = captions(model.config, [2, 3])
        torch.manual_seed(1)
        model(tokens_for(model.config, 2), states, mask).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_every_parameter_learns() -> None:
    for config in (small_config((3, 3)), small_config((2, 2, 2)), small_config((3, 3), condition="class")):
        model = small_model(config)
        dropped = torch.tensor([True, False])
        if config.condition == "text":
            loss = model(tokens_for(config, 2), *captions(config, [5, 5]), dropped)
        else:
            loss = model(tokens_for(config, 2), torch.tensor([0, 1]), None, dropped)
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_model_trains_after_it_has_sampled() -> None:
    # Tables made while sampling, in inference mode, must not be in the way of gradients.
    model = small_model(small_config((2, 5), vocab_size=13))
    states, mask = captions(model.config, [4])
    drawn = generate(model, states, mask, guidance_scale=2.0, seeds=[0])
    model.train()(drawn.clone(), states, mask, torch.tensor([True])).backward()


def test_low_precision_stays_close() -> None:
    model = small_model(small_config((4, 4)))
    states, mask = captions(model.config, [3, 5])
    tokens = tokens_for(model.config, 2)
    with torch.no_grad():
        expected = model(tokens, states, mask)
        loss = model.to(torch.bfloat16)(tokens, states.to(torch.bfloat16), mask)
    assert loss.dtype == torch.float32
    assert abs(float(loss - expected)) < 0.05 * float(expected)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("B", 130_551_552), ("M", 295_453_696), ("L", 372_536_320), ("XL", 815_991_040), ("XXL", 1_464_454_656)],
)
def test_preset_sizes_with_the_thousand_classes_of_imagenet(preset: str, parameters: int) -> None:
    assert parameter_count(replace(PRESETS[preset](), condition="class")) == parameters


def test_parameters_are_counted_without_being_made() -> None:
    config = small_config((2, 2, 2))
    assert parameter_count(config) == sum(p.numel() for p in NAR(config).parameters())
