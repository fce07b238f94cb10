import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_config

from t2i.heads import AxisHeads
from t2i.layers import (
    Attention,
    Embedding,
    FeedForward,
    GatedLinear,
    KVCache,
    Linear,
    RMSNorm,
    _GatedProduct,
    prefix_rotary_table,
    rotary_table,
    rotate_,
)
from t2i.model import NAR
from t2i.wavefronts import coordinates, order

CONFIG = small_config((3, 4))
HEAD_DIM = CONFIG.width // CONFIG.n_head


def test_rms_norm_is_its_formula_in_fp32() -> None:
    norm = RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    half = norm.to(torch.bfloat16)(1e-3 * x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()


def test_rms_norm_has_the_gradients_of_its_formula() -> None:
    norm = RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    x, along = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16)
    gradients = []
    for normed in (norm(x), F.rms_norm(x, (16,), norm.weight, norm.eps)):
        gradients.append(torch.autograd.grad((normed * along).sum(), (x, norm.weight)))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, norm.eps))
    half = norm.to(torch.bfloat16)
    y = x.detach().bfloat16().requires_grad_()
    (half(y).float() * along).sum().backward()
    assert y.grad is not None
    assert half.weight.grad is not None
    torch.testing.assert_close(y.grad.float(), gradients[0][0], rtol=0.05, atol=0.05)


def test_rotary_table_turns_half_by_row_and_half_by_column() -> None:
    table = rotary_table(CONFIG)
    assert table.shape == (12, HEAD_DIM // 2, 2)
    pairs = HEAD_DIM // 4
    for place, (row, column) in enumerate(coordinates(CONFIG.grid)[order(CONFIG.grid)].tolist()):
        for pair in range(HEAD_DIM // 2):
            axis_value = row if pair < pairs else column
            angle = axis_value * 10000.0 ** (-2 * (pair % pairs) / (HEAD_DIM // 2))
            torch.testing.assert_close(table[place, pair], torch.tensor([math.cos(angle), math.sin(angle)]))


@given(st.integers(0, 10**6))
def test_rotation_is_complex_multiplication_and_keeps_lengths(seed: int) -> None:
    x = torch.randn(2, 12, 2, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    table = rotary_table(CONFIG)
    turned = rotate_(x.clone(), table)
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(table)[:, None]
    torch.testing.assert_close(turned, torch.view_as_real(as_complex).flatten(-2))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_both_ways_to_rotate_are_one() -> None:
    x = torch.randn(2, 12, 3, HEAD_DIM)
    table = rotary_table(CONFIG)
    torch.testing.assert_close(rotate_(x.clone(), table).double(), rotate_(x.double(), table), rtol=1e-5, atol=1e-6)
    assert rotate_(x.bfloat16(), table).dtype == torch.bfloat16


def test_prefix_rotation_is_none_or_the_published_zero() -> None:
    x = torch.randn(1, 5, 2, HEAD_DIM)
    torch.testing.assert_close(rotate_(x.clone(), prefix_rotary_table(CONFIG, 5)), x)
    words = prefix_rotary_table(small_config((3, 4), prefix_rotary="sequence"), 3)
    # The row's half does not turn, the column's turns by 1, 2, 3 steps backwards; the same words have the same places,
    # however long the padding before them.
    assert torch.equal(words[:, : HEAD_DIM // 4, 0], torch.ones(3, HEAD_DIM // 4))
    cos, sin = words[:, HEAD_DIM // 4].unbind(-1)
    torch.testing.assert_close(torch.atan2(sin, cos), torch.tensor([-3.0, -2.0, -1.0]))
    assert torch.equal(prefix_rotary_table(small_config((3, 4), prefix_rotary="sequence"), 5)[2:], words)
    published = small_config((3, 4), prefix_rotary="zero")
    assert not rotate_(x.clone(), prefix_rotary_table(published, 5)).any()


def test_attention_with_grouped_heads_is_attention_with_repeated_ones() -> None:
    config = small_config((3, 4), n_head=4, n_kv_head=2)
    attention = Attention(config).eval()
    x = torch.randn(2, 6, 16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    q, k, v = attention.wqkv(x).split([16, 8, 8], dim=-1)
    outs = []
    for head in range(4):
        columns, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        scores = q[..., columns] @ k[..., shared].transpose(1, 2) / 2.0
        outs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[..., shared])
    torch.testing.assert_close(attention(x, None, mask), attention.wo(torch.cat(outs, dim=-1)))


def test_cache_returns_all_that_was_written_in_order() -> None:
    cache = KVCache(CONFIG, batch=2, length=5, device=torch.device("cpu"), dtype=torch.float32)
    parts = [torch.randn(2, 2, n, HEAD_DIM) for n in (2, 1, 2)]
    for part in parts:
        for block in range(3):
            keys, values = cache.extend(block, part + block, -part)
            assert keys.data_ptr() == cache.keys[block].data_ptr()  # a view, not a copy
        cache.advance(part.shape[2])
    torch.testing.assert_close(keys, torch.cat(parts, dim=2) + 2)
    torch.testing.assert_close(values, -torch.cat(parts, dim=2))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    for layer in (Linear(256, 256, 0.02), Embedding(256, 256, 0.02)):
        assert abs(layer.weight.std().item() - 0.02) < 5e-4
    last, every = AxisHeads(CONFIG), AxisHeads(small_config((3, 4), zero_init_heads="all"))
    assert last.weight[:, 0].any()
    assert not last.weight[:, 1].any()
    assert not every.weight.any()


def test_blocks_that_start_at_zero_pass_on_what_they_are_given() -> None:
    torch.manual_seed(0)
    model = NAR(small_config((3, 4), residual_init="zero")).eval()
    x = torch.randn(2, 5, model.config.width)
    for block in model.blocks:
        assert torch.equal(block(x, None, None), x)
        assert block.attention.wqkv.weight.std() > 0
        assert block.feed_forward.w1.weight.std() > 0


def test_every_matrix_of_a_model_starts_from_the_std_of_its_configuration() -> None:
    torch.manual_seed(0)
    model = NAR(small_config((3, 4), width=64, init_std=0.3))
    matrices = {k: v for k, v in model.named_parameters() if v.ndim > 1 and not k.endswith("uncond") and v.any()}
    assert len(matrices) >= 9
    for name, weight in matrices.items():
        drawn = weight[:, :-1] if name == "heads.weight" else weight  # the last head starts at zero
        assert drawn.std().item() == pytest.approx(0.3, rel=0.15), name


def test_feed_forward_is_swiglu_of_the_rounded_size() -> None:
    layer = FeedForward(CONFIG).eval()
    assert layer.w1.weight.shape == (256, 16)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), F.linear(F.silu(layer.w1(x)) * layer.w3(x), layer.w2.weight))


def test_gated_map_has_the_gradients_of_its_formula() -> None:
    gate, up = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_GatedProduct.apply(gate, up, weight), F.linear(F.silu(gate) * up, weight))
    assert torch.autograd.gradcheck(_GatedProduct.apply, (gate, up, weight))


def test_gated_map_in_bf16_and_with_a_frozen_weight() -> None:
    layer = GatedLinear(8, 4, 0.5)
    inputs = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    layer(*inputs).sum().backward()
    exact = [one.grad for one in inputs]
    half = [one.detach().bfloat16().requires_grad_() for one in inputs]
    layer.zero_grad()
    layer = layer.bfloat16().requires_grad_(False)
    layer(*half).sum().backward()
    assert layer.weight.grad is None
    for expected, got in zip(exact, half, strict=True):
        assert expected is not None
        assert got.grad is not None
        torch.testing.assert_close(got.grad.float(), expected, rtol=0.05, atol=0.02)
