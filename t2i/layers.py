"""The transformer blocks of the NAR model, their rotary positions and key-value cache.

Single-device code. Every module sets its own parameters in its constructor: under ZeRO-3 they are partitioned as soon
as that constructor returns, and an outer module could no longer reach them.

Shape suffixes: B batch, L sequence, S cached sequence, H heads, K key-value heads, E head dimension, C width, O outputs
and I inputs of a linear map.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from t2i.config import ModelConfig
from t2i.products import Multiplies
from t2i.wavefronts import coordinates, order


class Linear(Multiplies, nn.Linear):
    """Bias-free linear map that starts from normal(0, std)."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        self._std = std
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self._std)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class GatedLinear(Linear):
    """Linear map of silu(gate) * up, which is made anew for the backward pass instead of being kept for it."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return self.multiply(F.silu(gate) * up)
        result: Tensor = _GatedProduct.apply(gate, up, self.weight)
        return result


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) times the transposed weight, from which nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight_OI)
        return F.linear(F.silu(gate) * up, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight_OI = ctx.saved_tensors
        # In an order that holds few of these at once.
        share, of_weight = F.silu(gate), None
        if ctx.needs_input_grad[2]:
            of_weight = gradient.flatten(0, -2).t() @ (share * up).flatten(0, -2)
        of_product = gradient @ weight_OI
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        return of_gate, of_product.mul_(share), of_weight


class Embedding(nn.Embedding):
    """Embedding table that starts from normal(0, std)."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        self._std = std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self._std)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in fp32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu":
            result: Tensor = _Normed.apply(x, self.weight, self.eps)
            return result
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).type_as(x)


class _Normed(torch.autograd.Function):
    """The norm on a processor, where torch's own keeps the normed values for the backward pass, as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x.float() * scale).mul_(weight).type_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        normed, gradient = x.float() * scale, gradient.float()
        of_weight = (gradient * normed).flatten(0, -2).sum(0).type_as(weight)
        of_normed = gradient * weight
        along = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(along)).mul_(scale).type_as(x), of_weight, None


def _rotations(config: ModelConfig, coords_L2: Tensor) -> Tensor:
    """Rotation of positions (row, column): float32 [L, E / 2, 2], last axis (cos, sin).

    2-D rotary embedding: the first half of the pairs turns with the row, the second with the column (RoFormer, Su et
    al. 2021, arXiv 2104.09864, on two axes as in LlamaGen).
    """
    half = config.width // config.n_head // 2
    frequency = 1.0 / config.rope_base ** (torch.arange(0, half, 2).float() / half)
    angles = (coords_L2.float()[:, :, None] * frequency).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotary_table(config: ModelConfig) -> Tensor:
    """Rotation of each grid position in wavefront order: float32 [N, E / 2, 2]."""
    return _rotations(config, coordinates(config.grid)[order(config.schedule)])


def prefix_rotary_table(config: ModelConfig, length: int) -> Tensor:
    """Rotation of the prefix positions [length, E / 2, 2], by `config.prefix_rotary`: none, that of columns -length to -1
    of the first row, or the published factor 0, which erases q and k."""
    if config.prefix_rotary == "sequence":
        columns_L = torch.arange(-length, 0)
        return _rotations(config, torch.stack([torch.zeros_like(columns_L), columns_L], dim=1))
    table = torch.zeros(length, config.width // config.n_head // 2, 2)
    if config.prefix_rotary == "identity":
        table[..., 0] = 1
    return table


def rotate_(x_BLHE: Tensor, table_LE2: Tensor) -> Tensor:
    """Turn each (even, odd) pair of the head dimension by its position's angle, in place where that is possible."""
    if x_BLHE.dtype == torch.float32 and not torch.compiler.is_compiling():
        # As complex numbers it is one pass over the data, a third of the time on a processor; compilers and half
        # precision do not take them.
        pairs_BLHe = torch.view_as_complex(x_BLHE.unflatten(-1, (-1, 2)))
        pairs_BLHe.mul_(torch.view_as_complex(table_LE2)[:, None])
        return x_BLHE
    even, odd = x_BLHE.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_LE2[:, None].unbind(-1)  # in fp32, as published: bf16 would blunt the angles
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x_BLHE)


Mask = Tensor | Literal["causal"] | None
"""What may attend to what: bool (True = attends), or numbers that are added to the scores, broadcastable to [B, 1, L, S];
"causal", for which GPUs have kernels that need no such tensor: each to itself and all before it; None: all to all."""


class KVCache:
    """Keys and values of every block, preallocated in the order in which they are written, 0 where nothing is yet."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        blocks = config.n_layer + config.n_axes - 1
        heads = config.n_kv_head or config.n_head
        shape = (blocks, batch, heads, length, config.width // config.n_head)
        # Written once from end to end: the system then hands out its memory faster than for the scattered writes of the
        # passes, for 4% of the time of one picture.
        self.keys = torch.empty(shape, device=device, dtype=dtype).zero_()
        self.values = torch.empty(shape, device=device, dtype=dtype).zero_()
        self.length = 0
        self.places: Tensor | None = None

    def extend(self, block: int, keys_BKLE: Tensor, values_BKLE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new positions behind what is there; returns all so far, without a copy.

        `length` moves on when the caller calls `advance`, once all blocks have written. Where `places` (int64 [L]) are
        set, the new positions go there instead, all below `length`, which stays.
        """
        if self.places is None:
            end = self.length + keys_BKLE.shape[2]
            self.keys[block, :, :, self.length : end] = keys_BKLE
            self.values[block, :, :, self.length : end] = values_BKLE
        else:
            end = self.length
            self.keys[block].index_copy_(2, self.places, keys_BKLE)
            self.values[block].index_copy_(2, self.places, values_BKLE)
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]

    def keep_first(self, samples: int) -> None:
        """Drop all but the first samples of the batch."""
        self.keys, self.values = self.keys[:, :samples], self.values[:, :samples]

    def advance(self, positions: int) -> None:
        self.length += positions


class Attention(nn.Module):
    """Self-attention with fused query, key and value, optionally with grouped key-value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.width // config.n_head
        self.wqkv = Linear(config.width, (self.n_head + 2 * self.n_kv_head) * self.head_dim, config.init_std)
        self.wo = Linear(config.width, config.width, config.residual_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BLC: Tensor,
        table_LE2: Tensor | None,
        mask: Mask,
        cache: KVCache | None = None,
        block: int = 0,
    ) -> Tensor:
        """Attend over this call's positions and, with a cache, over all before them.

        Args:
            x_BLC: Hidden states.
            table_LE2: Rotary table of these positions, or None.
            mask: See `Mask`.
            cache: Where keys and values are kept; `block` is this block's number in it.
        """
        batch, length, _ = x_BLC.shape
        qkv = self.wqkv(x_BLC).contiguous().unflatten(-1, (-1, self.head_dim))
        # Queries and keys lie side by side, and are turned in one go.
        qk, v = qkv[:, :, : self.n_head + self.n_kv_head], qkv[:, :, self.n_head + self.n_kv_head :]
        if table_LE2 is not None:
            qk = rotate_(qk, table_LE2)
        q, k = qk[:, :, : self.n_head], qk[:, :, self.n_head :]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(block, k, v)
        allowed = None if isinstance(mask, str) else mask
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=isinstance(mask, str), enable_gqa=self.n_head != self.n_kv_head
        )
        return self.dropout(self.wo(mixed.transpose(1, 2).reshape(batch, length, -1)))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.width, config.hidden, config.init_std)
        self.w3 = Linear(config.width, config.hidden, config.init_std)
        self.w2 = GatedLinear(config.hidden, config.width, config.residual_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BLC: Tensor,
        table_LE2: Tensor | None,
        mask: Mask,
        cache: KVCache | None = None,
        block: int = 0,
    ) -> Tensor:
        x_BLC = x_BLC + self.attention(self.attention_norm(x_BLC), table_LE2, mask, cache, block)
        return x_BLC + self.feed_forward(self.ffn_norm(x_BLC))
