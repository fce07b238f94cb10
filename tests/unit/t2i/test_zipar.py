from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import captions, small_config, small_model
from torch import Tensor

from t2i.model import NAR, prefix_table, tables
from t2i.sampling import Sampler, generate
from t2i.zipar import _Decoder, _Proposal, generate_zipar, passes_needed

few = settings(max_examples=20)
pictures = st.tuples(st.integers(1, 4), st.integers(1, 5))


def raster_model(grid: tuple[int, ...], seed: int = 0, **changes: Any) -> NAR:
    return small_model(small_config(grid, order="raster", **changes), seed)


def counted(model: NAR, states: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Tokens, and what was decoded after each pass."""
    passes: list[Tensor] = []
    drawn = generate_zipar(model, states, mask, callback=lambda _, t: passes.append(t.clone()), **options)
    return drawn, passes


@few
@given(
    grid=pictures,
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    options=st.sampled_from([{"temperature": 0}, {"guidance_scale": 2.5}, {"top_k": 4, "guidance_scale": 0.0}]),
    adaptive=st.booleans(),
    beyond=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_a_window_of_a_whole_row_is_raster_decoding(
    grid: tuple[int, int], lengths: list[int], options: dict[str, Any], adaptive: bool, beyond: int, seed: int
) -> None:
    model = raster_model(grid, seed)
    states, mask = captions(model.config, lengths, seed)
    seeds = [seed + b for b in range(len(lengths))]
    expected = generate(model, states, mask, seeds=seeds, **options)
    drawn = generate_zipar(model, states, mask, window=grid[1] + beyond, adaptive=adaptive, seeds=seeds, **options)
    assert torch.equal(drawn, expected)


@few
@given(grid=pictures, window=st.integers(1, 6))
def test_rows_open_after_their_window(grid: tuple[int, int], window: int) -> None:
    model = raster_model(grid)
    drawn, passes = counted(model, *captions(model.config, [2, 4]), window=window, seeds=[1, 2])
    assert len(passes) == passes_needed(*grid, window)
    rows, columns = grid
    starts = [0, columns] + [columns + n * min(window, columns) for n in range(1, rows)]
    for number, tokens in enumerate(passes):
        written = [max(0, min(columns, number + 1 - starts[row])) for row in range(rows)]
        assert ((tokens >= 0).sum(2) == torch.tensor(written)).all(), number
        assert torch.equal(tokens[tokens >= 0], drawn[tokens >= 0])


def test_published_numbers_of_passes() -> None:
    assert [passes_needed(24, 24, window) for window in (16, 12, 8)] == [400, 312, 224]
    assert passes_needed(24, 24, 24) == 24 * 24


@few
@given(
    grid=st.tuples(st.integers(2, 4), st.integers(2, 5)),
    window=st.integers(1, 4),
    adaptive=st.booleans(),
    variant=st.sampled_from([{}, {"n_head": 4, "n_kv_head": 2}, {"prefix_rotary": "zero"}, {"positions": "learned"}]),
    guidance=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 99),
)
def test_logits_are_those_of_what_had_been_decoded(
    grid: tuple[int, int], window: int, adaptive: bool, variant: dict[str, Any], guidance: float, seed: int
) -> None:
    """Every input of every pass once more in one sequence without a cache: each attends to the newest input, so far, of
    every position up to its own."""
    model = raster_model(grid, seed, **variant)
    states, mask = captions(model.config, [3], seed)
    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    step = model.step_anywhere

    def recorded(tokens: Tensor, positions: Tensor, allowed: Tensor, cache: Any, wanted: slice) -> Tensor:
        logits = step(tokens, positions, allowed, cache, wanted)
        passes.append((tokens, positions, logits))
        return logits

    model.step_anywhere = recorded  # type: ignore[method-assign]
    seen: list[Tensor] = []  # before each pass
    drawn = generate_zipar(
        model, states, mask, window=window, adaptive=adaptive, guidance_scale=guidance, seeds=[seed],
        callback=lambda _, tokens: seen.append(tokens.flatten() >= 0),
    ).flatten()  # fmt: skip
    for (inputs, places, _), shown in zip(passes, seen, strict=False):
        known = set(shown.nonzero().flatten().tolist())
        for token, position in zip(inputs[0].tolist(), places.tolist(), strict=True):
            if position in known:
                assert token == drawn[position]
            else:  # the last of a row, for which the newest token of the row above it stands in
                row, column = divmod(position, grid[1])
                assert column == grid[1] - 1
                assert token == drawn[max(p for p in known if p // grid[1] == row - 1)]
    tokens = torch.cat([tokens for tokens, _, _ in passes], dim=1)
    positions = torch.cat([positions for _, positions, _ in passes])
    times = torch.cat([torch.full_like(p, t) for t, (_, p, _) in enumerate(passes)])
    events, prefix = len(positions), states.shape[1]
    allowed = torch.zeros(prefix + events, prefix + events, dtype=torch.bool)
    allowed[:, :prefix] = torch.ones(prefix + events, prefix).tril().bool()
    for i in range(events):
        newest = {int(positions[j]): j for j in range(events) if times[j] <= times[i]}
        for position, j in newest.items():
            allowed[prefix + i, prefix + j] = position <= positions[i]
    with torch.no_grad():
        both = len(passes[0][0])  # with guidance, the unconditional branch as well
        embedded, real = model._embed_prefix(
            states.expand(both, -1, -1), mask.expand(both, -1), torch.tensor([False, True][:both])
        )
        x = torch.cat([embedded, model._embed(tokens, positions)], dim=1)
        table = prefix_table(model.config, prefix, x.device)
        rotary = tables(model.config, x.device).rotary_NE2
        if table is not None and rotary is not None:
            table = torch.cat([table, rotary[positions]])
        (hidden,) = model._run(x, table, model._mask(allowed, real))
        logits = model.heads([hidden[:, prefix:]], torch.ones(1, 1))
    first = 0
    for tokens, _, got in passes:
        after = first + tokens.shape[1]
        torch.testing.assert_close(got, logits[:, after - got.shape[1] : after], rtol=1e-4, atol=1e-4)
        first = after


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = raster_model((3, 4))
    states, mask = captions(model.config, [2, 5, 3])
    for adaptive in (False, True):
        options: dict[str, Any] = {"window": 2, "adaptive": adaptive, "guidance_scale": 2.0}
        together = generate_zipar(model, states, mask, seeds=[5, 6, 7], **options)
        for b in range(3):
            alone = generate_zipar(model, states[b : b + 1], mask[b : b + 1], seeds=[5 + b], **options)
            assert torch.equal(together[b], alone[0])


def test_a_checked_proposal_is_a_draw_from_the_new_probabilities() -> None:
    model = raster_model((2, 3))
    states, mask = captions(model.config, [2])
    old, new, newer = torch.randn(3, 1, 1, 5, generator=torch.Generator().manual_seed(3)) * 1.5
    sampler = Sampler(1, states.device, seeds=[0])
    decoder = _Decoder(model, sampler, 1, True, states, mask)
    draws: list[int] = []
    again: list[int] = []
    accepted = 0
    for _ in range(9000):
        proposal, kept = decoder._checked(_Proposal(sampler.draw(old)[:, 0], old), sampler.draw(new)[:, 0], new)
        draws.append(int(proposal.token))
        accepted += kept
        if not kept:  # a second check, of the token drawn in its place
            again.append(int(decoder._checked(proposal, sampler.draw(newer)[:, 0], newer)[0].token))
    for tokens, scores in ((draws, new), (again, newer)):
        frequencies = torch.bincount(torch.tensor(tokens), minlength=5) / len(tokens)
        torch.testing.assert_close(frequencies, scores.softmax(-1).flatten(), rtol=0, atol=0.03)
    overlap = torch.minimum(new.softmax(-1), old.softmax(-1)).sum()
    assert abs(accepted / len(draws) - float(overlap)) < 0.03


def test_adaptive_rows_wait_until_their_first_token_is_accepted() -> None:
    model = raster_model((4, 5))
    with torch.no_grad():
        model.heads.weight.zero_()  # all tokens are equally likely whatever has been decoded: accepted at once
    states, mask = captions(model.config, [2])
    _, passes = counted(model, states, mask, window=2, adaptive=True, seeds=[0])
    assert len(passes) == passes_needed(4, 5, 3)  # a proposal costs the pass in which it is checked
    model = raster_model((4, 5))
    counts = {len(counted(model, states, mask, window=1, adaptive=True, seeds=[s])[1]) for s in range(12)}
    assert len(counts) > 1  # now and then a first token is refused
    assert min(counts) >= passes_needed(4, 5, 2)
    assert max(counts) <= passes_needed(4, 5, 5)


def test_what_cannot_be_decoded_is_refused() -> None:
    model = raster_model((3, 3))
    states, mask = captions(model.config, [2, 3])
    with pytest.raises(ValueError, match="window is 0; a row starts after at least 1 token"):
        generate_zipar(model, states, mask, window=0)
    for adaptive in (False, True):
        with pytest.raises(ValueError, match="3 seeds for 2 samples"):
            generate_zipar(model, states, mask, window=1, adaptive=adaptive, seeds=[1, 2, 3])
    for other, message in (
        (small_model(small_config((3, 3))), "2 axes in neighbor order"),
        (raster_model((2, 2, 2)), "3 axes in raster order"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_zipar(other, states, mask, window=1)
