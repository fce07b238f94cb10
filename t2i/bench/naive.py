"""The published way of computing a NAR model, on the same weights: what ours is measured against and tested with.

Captions are padded to `max_condition` and computed in full; the grid stays in row-major order, with a dense mask for each
sample; keys and values are scattered into a cache of full length, all of which is attended to under a mask; every head is
a matrix of its own and makes logits at every position; and the tokens of a wavefront are drawn one by one.

Shape suffixes: B batch, P prefix positions, N grid tokens, L = P + N sequence, n tokens of one pass, H heads, K key-value
heads, E head dimension, C width, V vocabulary, X condition channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.layers import Block, prefix_rotary_table, rotary_table
from t2i.model import NAR
from t2i.sampling import Sampler
from t2i.wavefronts import coordinates, levels, rank


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _rotate(x_BLHE: Tensor, table_LE2: Tensor) -> Tensor:
    even, odd = x_BLHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table_LE2[:, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class NaiveNAR:
    """A text-conditional image model's weights, computed the published way, in float32 on the processor."""

    def __init__(self, model: NAR) -> None:
        """The heads are copied, as they are now; everything else is the model's own."""
        config = model.config
        assert (config.condition, len(config.grid), config.order) == ("text", 2, "neighbor"), config
        self.model, self.config, self.prefix = model, config, config.max_condition
        # Matrices of their own, lest a gradient be made for all heads of a model at once, and thrown away but for one.
        self.heads = [head_VC.detach().clone().requires_grad_() for head_VC in model.heads.weight.unbind(1)]
        self.table_LE2 = torch.cat(
            [prefix_rotary_table(config, self.prefix), rotary_table(config)[rank(config.schedule)]]
        )
        levels_L = torch.cat([torch.arange(-self.prefix, 0), levels(config.grid)])
        self.allowed_LL = levels_L[:, None] >= levels_L[None, :]

    def _embed_prefix(self, states_BPX: Tensor, mask_BP: Tensor, unconditional_B: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix embeddings of captions padded to the longest there may be, and their mask."""
        padding = self.prefix - states_BPX.shape[1]
        padded, real = F.pad(states_BPX, (0, 0, padding, 0)), F.pad(mask_BP, (padding, 0))
        embedded: tuple[Tensor, Tensor] = self.model.prefix(padded, real, unconditional_B)
        return embedded

    def _mask(self, real_BP: Tensor) -> Tensor:
        """Dense mask of each sample, bool [B, 1, L, L]."""
        columns_BL = F.pad(real_BP, (0, self.model.n_tokens), value=True)
        itself = torch.eye(len(self.allowed_LL), dtype=torch.bool)
        return ((self.allowed_LL & columns_BL[:, None, :]) | itself)[:, None].contiguous()

    def _block(
        self, block: Block, x_BLC: Tensor, positions: Tensor, mask: Tensor, cache: list[Tensor] | None
    ) -> Tensor:
        attention, feed_forward = block.attention, block.feed_forward
        heads, kv_heads, size = attention.n_head, attention.n_kv_head, attention.head_dim
        qkv = F.linear(_rms_norm(x_BLC, block.attention_norm.weight), attention.wqkv.weight)
        q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
        q_BLHE, k_BLKE, v_BLKE = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
        table = self.table_LE2[positions]
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q_BLHE, table), _rotate(k_BLKE, table), v_BLKE))
        if cache is not None:
            cache[0][:, :, positions] = k
            cache[1][:, :, positions] = v
            k, v = cache
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x_BLC = x_BLC + F.linear(mixed.transpose(1, 2).flatten(2), attention.wo.weight)
        y = _rms_norm(x_BLC, block.ffn_norm.weight)
        gated = F.silu(F.linear(y, feed_forward.w1.weight)) * F.linear(y, feed_forward.w3.weight)
        return x_BLC + F.linear(gated, feed_forward.w2.weight)

    def _head_logits(
        self, x_BLC: Tensor, positions: Tensor, mask: Tensor, caches: Sequence[list[Tensor] | None]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the heads "below" and "right" at all positions, both [B, L, V]."""
        hidden = []
        for block, cache in zip(self.model.blocks, caches, strict=True):
            assert isinstance(block, Block)
            x_BLC = self._block(block, x_BLC, positions, mask, cache)
            hidden.append(x_BLC)
        norms = list(self.model.heads.norms.parameters())
        below, right = (
            F.linear(_rms_norm(h, norm), head_VC)
            for h, norm, head_VC in zip((hidden[-1], hidden[-2]), norms, self.heads, strict=True)
        )
        return below, right

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.model.zero_grad(set_to_none=True)
        for head_VC in self.heads:
            head_VC.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names of the model's parameters."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        of_heads = [head_VC.grad for head_VC in self.heads if head_VC.grad is not None]
        return found | {"heads.weight": torch.stack(of_heads, dim=1)}

    def loss(self, tokens_BN: Tensor, states_BPX: Tensor, mask_BP: Tensor, unconditional_B: Tensor) -> Tensor:
        """Training loss as `NAR.forward`: logits of both heads over every position, then their mean, in fp32."""
        prefix_BPC, real_BP = self._embed_prefix(states_BPX, mask_BP, unconditional_B)
        x = torch.cat([prefix_BPC, self.model.tokens(tokens_BN)], dim=1)
        caches = [None] * len(self.model.blocks)
        below, right = self._head_logits(x, torch.arange(x.shape[1]), self._mask(real_BP), caches)
        (rows, columns), start = self.config.grid, self.prefix
        logits = torch.zeros(len(tokens_BN), rows, columns, self.config.vocab_size)
        counts = torch.zeros(rows, columns, 1)
        from_below = below[:, start:].unflatten(1, (rows, columns))
        from_right = right[:, start:].unflatten(1, (rows, columns))
        logits[:, 1:] += from_below[:, :-1]
        logits[:, :, 1:] += from_right[:, :, :-1]
        counts[1:] += 1
        counts[:, 1:] += 1
        logits[:, 0, 0] = below[:, start - 1] + right[:, start - 1]
        counts[0, 0] = 2
        return F.cross_entropy((logits / counts).flatten(0, 2), tokens_BN.flatten())

    @torch.inference_mode()
    def generate(self, states_BPX: Tensor, mask_BP: Tensor, sampler: Sampler) -> Tensor:
        """Tokens [B, h, w] as `t2i.sampling.generate`; `sampler` has a generator for each of the B samples."""
        batch, (rows, columns) = len(states_BPX), self.config.grid
        doubled = 2 * batch if sampler.guided else batch
        states, mask = (torch.cat([t] * (doubled // batch)) for t in (states_BPX, mask_BP))
        prefix_BPC, real_BP = self._embed_prefix(states, mask, torch.arange(doubled) >= batch)
        allowed = self._mask(real_BP)
        shape = (
            doubled,
            self.config.n_kv_head or self.config.n_head,
            len(self.allowed_LL),
            self.table_LE2.shape[1] * 2,
        )
        caches = [[torch.zeros(shape), torch.zeros(shape)] for _ in self.model.blocks]
        positions = torch.arange(self.prefix)
        below, right = self._head_logits(prefix_BPC, positions, allowed[:, :, positions], caches)
        tokens_BN = torch.full((batch, rows * columns), -1)
        sources = {(0, 0): [below[:, -1], right[:, -1]]}
        for level in range(rows + columns - 1):
            wavefront = [tuple(place) for place in coordinates((rows, columns)).tolist() if sum(place) == level]
            for row, column in wavefront:
                mixed = torch.stack(sources[row, column]).mean(0)
                token = sampler.draw(sampler.scores(mixed[:, None], sampler.guided))
                tokens_BN[:, row * columns + column] = token[:, 0]
            if level == rows + columns - 2:
                break
            places = torch.tensor([row * columns + column for row, column in wavefront])
            x = self.model.tokens(torch.cat([tokens_BN[:, places]] * (doubled // batch)))
            positions = self.prefix + places
            below, right = self._head_logits(x, positions, allowed[:, :, positions], caches)
            sources = {}
            for n, (row, column) in enumerate(wavefront):
                sources.setdefault((row + 1, column), []).append(below[:, n])
                sources.setdefault((row, column + 1), []).append(right[:, n])
        return tokens_BN.unflatten(1, (rows, columns))
