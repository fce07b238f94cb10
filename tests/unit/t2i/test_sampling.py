import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import captions, small_config, small_model
from torch import Tensor

from t2i.sampling import _filtered, generate
from t2i.wavefronts import levels, order, rank, wavefront_sizes

few = settings(max_examples=20)


def kept_by_definition(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Tokens that may be drawn: of the k likeliest, the fewest that together reach probability `top_p`."""
    ordered = sorted(range(len(logits)), key=lambda token: -logits[token])
    ordered = ordered[:top_k] if top_k else ordered
    total = sum(math.exp(logits[token]) for token in ordered)
    kept: set[int] = set()
    mass = 0.0
    for token in ordered:
        kept.add(token)
        mass += math.exp(logits[token]) / total
        if mass >= top_p:
            break
    return kept


@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=9, unique=True),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.013, 0.27, 0.51, 0.77, 0.96, 1.0]),
)
def test_filter_keeps_what_the_definition_keeps(logits: list[int], top_k: int, top_p: float) -> None:
    values = [value / 10 for value in logits]
    filtered = _filtered(torch.tensor([[values]]), top_k, top_p)[0, 0]
    kept = {token for token in range(len(values)) if filtered[token] > -math.inf}
    assert kept == kept_by_definition(values, top_k, top_p)
    for token in kept:
        assert abs(float(filtered[token]) - values[token]) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
        {"guidance_scale": 1.8, "temperature": 0.9},
    ],
)
def test_tokens_are_drawn_with_the_right_probabilities(options: dict[str, Any]) -> None:
    model = small_model(small_config((1, 1)))
    states, mask = captions(model.config, [3])
    draws = 4000
    drawn = generate(model, states.expand(draws, -1, -1), mask.expand(draws, -1), seeds=range(draws), **options)
    frequencies = torch.bincount(drawn.flatten(), minlength=11) / draws
    with torch.no_grad():
        logits = model.prefill(states, mask)[0][0, 0]
        if (scale := options.get("guidance_scale", 1.0)) != 1:
            unconditional = model.prefill(states, mask, guided=True)[0][1, 0]
            logits = unconditional + scale * (logits - unconditional)
    logits = logits / options.get("temperature", 1.0)
    kept = kept_by_definition(logits.tolist(), options.get("top_k", 0), options.get("top_p", 1.0))
    expected = torch.tensor([math.exp(v) if token in kept else 0.0 for token, v in enumerate(logits.tolist())])
    expected /= expected.sum()
    assert not frequencies[expected == 0].any()
    # Five standard deviations of a share.
    assert bool(((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all())


def test_top_k_of_one_is_greedy() -> None:
    model = small_model(small_config((3, 3)))
    states, mask = captions(model.config, [3, 5])
    greedy = generate(model, states, mask, temperature=0)
    assert torch.equal(generate(model, states, mask, top_k=1, seeds=[3, 4]), greedy)
    assert torch.equal(generate(model, states, mask, top_p=1e-9, seeds=[3, 4]), greedy)


@few
@given(
    grid=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    guidance=st.sampled_from([0.0, 1.0, 3.0]),
    uncond_tokens=st.sampled_from([1, 4]),
    seed=st.integers(0, 10**9),
)
def test_a_sample_does_not_depend_on_its_batch(
    grid: tuple[int, ...], lengths: list[int], guidance: float, uncond_tokens: int, seed: int
) -> None:
    model = small_model(small_config(grid, uncond_tokens=uncond_tokens), seed % 50)
    states, mask = captions(model.config, lengths, seed % 50)
    seeds = [seed + 7 * b for b in range(len(lengths))]
    together = generate(model, states, mask, guidance_scale=guidance, seeds=seeds)
    for b, length in enumerate(lengths):
        own = states[b : b + 1, states.shape[1] - length :]
        alone = generate(model, own, None, guidance_scale=guidance, seeds=seeds[b : b + 1])
        assert torch.equal(together[b], alone[0]), b
    assert torch.equal(
        generate(model, states.flip(0), mask.flip(0), guidance_scale=guidance, seeds=seeds[::-1]).flip(0), together
    )


def test_seeds_decide_the_sample() -> None:
    model = small_model(small_config((4, 4)))
    states, mask = captions(model.config, [4])
    one, again, other = (generate(model, states, mask, seeds=[seed]) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_without_seeds_the_global_generator_decides() -> None:
    model = small_model(small_config((4, 4)))
    states, mask = captions(model.config, [4, 4])
    torch.manual_seed(3)
    one, next_one = generate(model, states, mask), generate(model, states, mask)
    torch.manual_seed(3)
    assert torch.equal(generate(model, states, mask), one)
    assert not torch.equal(next_one, one)
    state = torch.get_rng_state()
    generate(model, states, mask, seeds=[1, 2])
    generate(model, states, mask, temperature=0, seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), state)  # seeded sampling leaves it alone


def test_guidance_of_one_is_no_guidance_and_zero_ignores_the_caption() -> None:
    model = small_model(small_config((3, 3)))
    one, other = (captions(model.config, [3], seed) for seed in (1, 2))
    assert torch.equal(
        generate(model, *one, guidance_scale=0.0, temperature=0),
        generate(model, *other, guidance_scale=0.0, temperature=0),
    )
    with torch.no_grad():
        logits = model.logits(generate(model, *one, temperature=0), *one)
    assert torch.equal(logits.argmax(-1), generate(model, *one, guidance_scale=1.0, temperature=0).flatten(1))


@few
@given(share=st.floats(0, 1), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=st.integers(0, 50))
def test_guidance_of_the_first_passes(share: float, lengths: list[int], seed: int) -> None:
    model = small_model(small_config((3, 3), uncond_tokens=3), seed)
    states, mask = captions(model.config, lengths, seed)
    drawn = generate(model, states, mask, guidance_scale=3.0, guidance_share=share, temperature=0)
    with torch.no_grad():
        tokens = drawn.flatten(1)
        logits = model.logits(tokens, states, mask)
        none = torch.ones(len(lengths), dtype=torch.bool)
        in_order = model._predict(tokens[:, order((3, 3))], states, mask, none)
        unconditional = in_order[:, rank((3, 3))]
    guided = levels((3, 3)) < round(5 * share)
    expected = torch.where(guided[:, None], unconditional + 3.0 * (logits - unconditional), logits)
    assert torch.equal(expected.argmax(-1), tokens)


def test_classes_are_conditions_too() -> None:
    model = small_model(small_config((2, 3, 2), condition="class"))
    drawn = generate(model, torch.tensor([0, 3, 0]), guidance_scale=1.5, seeds=[1, 1, 1])
    assert drawn.shape == (3, 2, 3, 2)
    assert torch.equal(drawn[0], drawn[2])


def test_callback_sees_every_wavefront_as_it_is_written() -> None:
    grid = (2, 4)
    model = small_model(small_config(grid))
    seen: list[tuple[int, Tensor]] = []
    states, mask = captions(model.config, [2, 5])
    drawn = generate(model, states, mask, seeds=[0, 1], callback=lambda n, tokens: seen.append((n, tokens.clone())))
    assert [number for number, _ in seen] == list(range(len(wavefront_sizes(grid))))
    for number, tokens in seen:
        written = (levels(grid) <= number).reshape(grid)
        assert torch.equal(tokens[:, written], drawn[:, written])
        assert bool((tokens[:, ~written] == -1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"guidance_scale": float("inf")}, "guidance inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p 1.01"),
        ({"guidance_scale": -1.0}, "guidance -1.0"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 samples"),
        ({"seeds": [1, 1.5]}, "seed 1.5 is no whole number of 64 bits"),
        ({"seeds": [1, 2**64]}, "is no whole number of 64 bits"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    model = small_model(small_config((2, 2)))
    states, mask = captions(model.config, [2, 3])
    with pytest.raises(ValueError, match=message):
        generate(model, states, mask, **options)


def test_what_fresh_memory_holds_does_not_matter() -> None:
    model = small_model(small_config((3, 4)))
    states, mask = captions(model.config, [5, 1])
    options: dict[str, Any] = {"guidance_scale": 3.0, "seeds": [0, 1]}
    expected = generate(model, states, mask, **options)
    torch.use_deterministic_algorithms(True)  # torch then fills it with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert generate(model, states, mask, **options).equal(expected)
    finally:
        torch.use_deterministic_algorithms(False)
