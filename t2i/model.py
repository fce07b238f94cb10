"""The NAR transformer: tokens of a grid from a caption or a class, a wavefront at a time (arXiv 2503.10696).

One class for images, video and any other grid. Three ways in:

- `forward(tokens, condition, ...)`: the training loss;
- `logits(tokens, condition, ...)`: the mixed logits of every position, uncached, in row-major order;
- `prefill` and `step`: one wavefront after the other with a key-value cache, for `t2i.sampling`.

Inside, the grid is always in wavefront order: the mask is then block-lower-triangular in training, and while decoding
there is none but for the padding of shorter prefixes, which that of no caption nearly always is.

Shape suffixes: B batch, P prefix positions, N grid tokens, L = P + N - 1 sequence, C width, X condition channels,
A axes, V vocabulary, n tokens of one wavefront.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i.config import ModelConfig
from t2i.heads import AxisHeads
from t2i.layers import Block, Embedding, KVCache, Linear, Mask, prefix_rotary_table, rotary_table
from t2i.products import Multiplies
from t2i.wavefronts import attention_mask, head_weights, order, predecessors, rank, wavefront_sizes


@dataclass(frozen=True)
class Tables:
    """What follows from the grid alone, in wavefront order, on one device."""

    order_N: Tensor
    rank_N: Tensor
    predecessors_NA: Tensor
    head_weights_NA: Tensor
    rotary_NE2: Tensor | None


@cache
def tables(config: ModelConfig, device: torch.device) -> Tables:
    """The tables of a configuration. Kept out of the modules' buffers, where a cast to bf16 would blunt the angles."""
    written = config.schedule
    # A tensor made in inference mode could not be used for training later.
    with torch.inference_mode(False):
        # The origin is predicted from the last prefix position, which stands right before the grid: place -1.
        places_NA = predecessors(written)
        return Tables(
            order(written).to(device),
            rank(written).to(device),
            places_NA.to(device),
            head_weights(written).to(device),
            rotary_table(config).to(device) if config.positions == "rotary" else None,
        )


@cache
def prefix_table(config: ModelConfig, length: int, device: torch.device) -> Tensor | None:
    """Rotary table of a prefix of `length` positions, or None with learned positions."""
    if config.positions != "rotary":
        return None
    with torch.inference_mode(False):
        return prefix_rotary_table(config, length).to(device)


@cache
def _attention_mask(config: ModelConfig, prefix: int, device: torch.device) -> Tensor:
    """What of prefix and grid may attend to what, bool [L, L]; nothing is predicted from the last token."""
    with torch.inference_mode(False):
        return attention_mask(config.schedule, prefix)[:-1, :-1].to(device)


class TextPrefix(nn.Module):
    """Caption states to prefix embeddings: a two-layer GELU(tanh) map, and the unconditional prefix beside it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = Linear(config.condition_dim, config.width, config.init_std)
        self.fc2 = Linear(config.width, config.width, config.init_std)
        uncond = torch.empty(config.uncond_tokens, config.condition_dim)
        nn.init.normal_(uncond, std=config.condition_dim**-0.5)
        if config.uncond_embedding == "learned":
            self.uncond = nn.Parameter(uncond)
        else:
            self.register_buffer("uncond", uncond)

    def forward(
        self, states_BPX: Tensor, mask_BP: Tensor | None, unconditional_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Prefix embeddings [B, P, C] and their mask [B, P], or None where all are real; where `unconditional_B`, those
        of no caption.

        P grows to `uncond_tokens` if any sample could be unconditional and the captions are shorter.
        """
        batch, length, _ = states_BPX.shape
        if unconditional_B is not None:
            if mask_BP is None:
                mask_BP = states_BPX.new_ones(batch, length, dtype=torch.bool)
            tokens = self.config.uncond_tokens
            if self.config.uncond_mask == "caption":  # as many of its last positions as captions are long
                uncond_PX, uncond_mask = self.uncond[tokens - length :], mask_BP
            else:
                short = max(0, tokens - length)
                states_BPX, mask_BP = F.pad(states_BPX, (0, 0, short, 0)), F.pad(mask_BP, (short, 0))
                uncond_PX = F.pad(self.uncond, (0, 0, states_BPX.shape[1] - tokens, 0))
                uncond_mask = torch.arange(states_BPX.shape[1], device=mask_BP.device) >= len(uncond_PX) - tokens
            states_BPX = torch.where(unconditional_B[:, None, None], uncond_PX.to(states_BPX.dtype), states_BPX)
            mask_BP = torch.where(unconditional_B[:, None], uncond_mask, mask_BP)
        return self.fc2(F.gelu(self.fc1(states_BPX), approximate="tanh")), mask_BP


class ClassPrefix(nn.Module):
    """Class number to one prefix embedding; the row after the last class is "no class"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.embedding = Embedding(config.num_classes + 1, config.width, config.init_std)

    def forward(self, labels_B: Tensor, mask_BP: Tensor | None, unconditional_B: Tensor | None) -> tuple[Tensor, None]:
        """Prefix embeddings [B, 1, C], all real; where `unconditional_B`, that of no class."""
        if unconditional_B is not None:
            labels_B = torch.where(unconditional_B, self.num_classes, labels_B)
        return self.embedding(labels_B)[:, None], None


class NAR(nn.Module):
    """Neighboring Autoregressive transformer over a grid of tokens. See the module's docstring.

    A condition is caption states [B, P, X], left-padded, with a bool mask [B, P] (True = real token; None = all real),
    or class labels int64 [B].
    """

    def __init__(self, config: ModelConfig, codes_VD: Tensor | None = None) -> None:
        """`codes_VD`: the tokenizer's code vectors, where the prediction heads are to start from them."""
        super().__init__()
        self.config = config
        self.prefix = TextPrefix(config) if config.condition == "text" else ClassPrefix(config)
        self.tokens = Embedding(config.vocab_size, config.width, config.init_std)
        self.token_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer + config.n_axes - 1))
        self.heads = AxisHeads(config, codes_VD)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.prefix + self.n_tokens, config.width))
            nn.init.normal_(self.positions, std=config.init_std)
        self.activation_checkpointing = False

    @property
    def n_tokens(self) -> int:
        """Tokens of one sample."""
        return math.prod(self.config.grid)

    # Building blocks shared by training and decoding

    def _run(self, x_BLC: Tensor, table_LE2: Tensor | None, mask: Mask, cache: KVCache | None = None) -> list[Tensor]:
        """Hidden states each head reads, one [B, L, C] per axis: the last axis after the trunk, each further axis one
        block later."""
        hidden = []
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x_BLC = checkpoint(block, x_BLC, table_LE2, mask, use_reentrant=False)
            else:
                x_BLC = block(x_BLC, table_LE2, mask, cache, number)
            if number >= self.config.n_layer - 1:
                hidden.append(x_BLC)
        return hidden[::-1]

    @staticmethod
    def _mask(allowed_LL: Tensor, real_BP: Tensor | None) -> Tensor:
        """What may attend to what, bool [B, 1, L, L], or one for all samples where nothing is padded: as `allowed_LL`, but
        real positions only, and padding only to itself."""
        if real_BP is None:
            return allowed_LL[None, None]
        columns_BL = F.pad(real_BP, (0, len(allowed_LL) - real_BP.shape[1]), value=True)
        itself = torch.eye(len(allowed_LL), dtype=torch.bool, device=allowed_LL.device)
        return ((allowed_LL & columns_BL[:, None, :]) | itself)[:, None]

    def _embed(self, tokens_Bn: Tensor, places: slice | Tensor) -> Tensor:
        """Embeddings of tokens that stand at these places of the wavefront order."""
        x = self.tokens(tokens_Bn)
        if self.config.positions == "learned":
            x = x + self.positions[self.config.prefix + tables(self.config, x.device).order_N[places]]
        return x

    def _embed_prefix(
        self, condition: Tensor, mask: Tensor | None, unconditional_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        prefix_BPC, real_BP = self.prefix(condition, mask, unconditional_B)
        if self.config.positions == "learned":  # aligned at the end, where the real tokens are
            prefix_BPC = prefix_BPC + self.positions[self.config.prefix - prefix_BPC.shape[1] : self.config.prefix]
        return prefix_BPC, real_BP

    # Training

    def _predict(
        self,
        tokens_BN: Tensor,
        condition: Tensor,
        mask: Tensor | None,
        unconditional_B: Tensor | None,
        targets_BN: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position [B, N, V], or their loss, from tokens in wavefront order."""
        prefix_BPC, real_BP = self._embed_prefix(condition, mask, unconditional_B)
        length = prefix_BPC.shape[1]
        # Nothing is predicted from the last token.
        x = torch.cat([prefix_BPC, self._embed(tokens_BN[:, :-1], slice(-1))], dim=1)
        x = self.token_dropout(x)
        fixed = tables(self.config, x.device)
        table = prefix_table(self.config, length, x.device)
        if table is not None and fixed.rotary_NE2 is not None:
            table = torch.cat([table, fixed.rotary_NE2[:-1]])
        attends: Mask = "causal"
        if self.config.order != "raster" or real_BP is not None:
            # As numbers, once for all blocks: each would make its own of them, and keep it for the backward pass.
            allowed = self._mask(_attention_mask(self.config, length, x.device), real_BP)
            attends = torch.zeros((), dtype=x.dtype, device=x.device).masked_fill(~allowed, -torch.inf)
        hidden = self._run(x, table, attends)
        places_NA = length + fixed.predecessors_NA
        read = [h[:, places_NA[:, a]] for a, h in enumerate(hidden)]
        predicted: Tensor = self.heads(read, fixed.head_weights_NA, targets_BN)
        return predicted

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        unconditional_B: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the mixed logits over all tokens (a scalar, nats per token).

        Args:
            tokens: int64 [B, *grid] or [B, N] in row-major order.
            condition, condition_mask: See the class.
            unconditional_B: bool [B], True where the condition is dropped (classifier-free guidance, Ho and Salimans
                2022, arXiv 2207.12598); None drops none.
        """
        tokens_BN = tokens.flatten(1)[:, tables(self.config, tokens.device).order_N]
        return self._predict(tokens_BN, condition, condition_mask, unconditional_B, tokens_BN)

    def logits(self, tokens_BN: Tensor, condition: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Mixed logits of every position given the tokens before it: [B, N] row-major -> [B, N, V] row-major."""
        fixed = tables(self.config, tokens_BN.device)
        tokens_BN = tokens_BN.flatten(1)[:, fixed.order_N]
        return self._predict(tokens_BN, condition, condition_mask, None)[:, fixed.rank_N]

    # Decoding

    def pack(self) -> Self:
        """Lay all matrices out anew for decoding on a processor in float32, where that takes up to half the time, and the
        matrices once more in memory; elsewhere it does nothing. For a model that is in evaluation mode, until it is switched
        to a mode; when weights have changed, call it again. See `t2i.products.Multiplies.pack`."""
        assert not self.training, "what is packed does not follow the weights in training"
        for module in self.modules():
            if isinstance(module, Multiplies):
                module.pack()
        return self

    def _prefill(
        self, condition: Tensor, mask: Tensor | None, unconditional_B: Tensor | None
    ) -> tuple[Tensor, KVCache, Tensor]:
        """Run one kind of prefix: the origin's logits [B, 1, V], a cache of the prefix alone, its real positions [B, P]."""
        prefix_BPC, real_BP = self._embed_prefix(condition, mask, unconditional_B)
        batch, length, _ = prefix_BPC.shape
        cache = KVCache(self.config, batch, length, prefix_BPC.device, prefix_BPC.dtype)
        table = prefix_table(self.config, length, prefix_BPC.device)
        attends: Mask = "causal"
        if real_BP is not None:
            lower = torch.ones(length, length, dtype=torch.bool, device=prefix_BPC.device).tril()
            attends = self._mask(lower, real_BP)
        hidden = self._run(prefix_BPC, table, attends, cache)
        logits = self.heads([h[:, -1:] for h in hidden], tables(self.config, condition.device).head_weights_NA[:1])
        return logits, cache, prefix_BPC.new_ones(batch, length, dtype=torch.bool) if real_BP is None else real_BP

    def _prefill_unconditional(self, condition: Tensor, mask: Tensor | None) -> tuple[Tensor, KVCache, Tensor]:
        """Run the prefix of no condition: a single one where it is the same for all samples."""
        alike = True
        if self.config.condition == "text":
            if self.config.uncond_mask == "full":
                condition, mask = condition[:, :0], None  # it has a length of its own
            else:
                alike = mask is None or bool((mask == mask[:1]).all())
        rows = slice(1) if alike else slice(None)
        condition, mask = condition[rows], None if mask is None else mask[rows]
        return self._prefill(condition, mask, torch.ones(len(condition), dtype=torch.bool, device=condition.device))

    def prefill(
        self, condition: Tensor, condition_mask: Tensor | None, guided: bool = False
    ) -> tuple[Tensor, KVCache, Tensor | None]:
        """Run the prefixes and start a cache; when `guided`, the batch is twice as long, its second half without
        condition.

        Returns the origin's logits [B, 1, V], the cache, and the mask [B, 1, 1, P] of the prefix's real positions, or
        None where all are real.
        """
        kinds = [self._prefill(condition, condition_mask, None)]
        if guided:
            kinds.append(self._prefill_unconditional(condition, condition_mask))
        batch, length = len(condition), max(real.shape[1] for _, _, real in kinds)
        sample = kinds[0][1].keys
        # The last token is never an input, so it needs no place.
        cache = KVCache(self.config, len(kinds) * batch, length + self.n_tokens - 1, sample.device, sample.dtype)
        real_BP = torch.zeros(len(kinds) * batch, length, dtype=torch.bool, device=sample.device)
        for number, (_, own, real) in enumerate(kinds):
            rows, padding = slice(number * batch, (number + 1) * batch), length - real.shape[1]
            for all_of_it, part in ((cache.keys, own.keys), (cache.values, own.values)):
                all_of_it[:, rows, :, padding:length] = part
            real_BP[rows, padding:] = real
        cache.advance(length)
        logits = torch.cat([logits.expand(batch, -1, -1) for logits, _, _ in kinds])
        return logits, cache, None if bool(real_BP.all()) else real_BP[:, None, None, :]

    def step(self, tokens_Bn: Tensor, wavefront: int, cache: KVCache, prefix_mask: Tensor | None) -> Tensor:
        """Run one wavefront's tokens [B, n] and return the logits of the next one [B, n', V]."""
        sizes = wavefront_sizes(self.config.schedule)
        first, after = sum(sizes[:wavefront]), sum(sizes[: wavefront + 1])
        fixed = tables(self.config, tokens_Bn.device)
        table = None if fixed.rotary_NE2 is None else fixed.rotary_NE2[first:after]
        mask = None if prefix_mask is None else F.pad(prefix_mask, (0, after), value=True)
        hidden = self._run(self._embed(tokens_Bn, slice(first, after)), table, mask, cache)
        cache.advance(after - first)
        following = slice(after, after + sizes[wavefront + 1])
        # A predecessor outside the grid has weight 0, so any place will do for it.
        places = (fixed.predecessors_NA[following] - first).clamp_min(0)
        return self.heads([h[:, places[:, a]] for a, h in enumerate(hidden)], fixed.head_weights_NA[following])

    def step_anywhere(
        self, tokens_Bn: Tensor, positions_n: Tensor, mask: Tensor, cache: KVCache, wanted: slice
    ) -> Tensor:
        """Run tokens of any positions of a raster model: the logits [B, n', V] of the positions after those `wanted`.

        `mask` (bool, broadcastable to [B, 1, n, S]) says what of the cache each may attend to; `cache.places` where
        they go.
        """
        assert self.config.order == "raster", "only in raster order one input decides one position"
        rotary_NE2 = tables(self.config, tokens_Bn.device).rotary_NE2
        table = None if rotary_NE2 is None else rotary_NE2[positions_n]
        (hidden,) = self._run(self._embed(tokens_Bn, positions_n), table, mask, cache)
        return self.heads([hidden[:, wanted]], hidden.new_ones(1, 1))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters of a model, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in NAR(config).parameters())
