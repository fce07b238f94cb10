"""Decoding: tokens of a grid from a trained model, one pass per wavefront (NAR, arXiv 2503.10696, section 3.3).

    tokens = generate(model, states, mask, guidance_scale=7.5, seeds=[0, 1])

A raster model's wavefronts are single tokens; `t2i.zipar` decodes it in fewer passes.

Shape suffixes: B batch, P prefix, X condition channels, n tokens of one pass, V vocabulary, N grid tokens.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from t2i.model import NAR, tables
from t2i.wavefronts import wavefront_sizes

Callback = Callable[[int, Tensor], None]
"""Called after each pass with its number and the tokens so far [B, *grid] (-1 = not yet drawn)."""


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the `top_k` likeliest tokens, and all beyond probability mass `top_p`, at -inf."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        # A token stays while the mass before it is below top_p, so the likeliest always stays.
        drop = mass - ordered.softmax(-1) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, places, drop), -torch.inf)
    return logits


class Sampler:
    """From logits to tokens, for one batch: guidance, temperature, top-k, top-p, and a generator for each sample."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """See `generate`. Raises ValueError for options out of range or a number of seeds that is not the batch's."""
        # Written so that NaN is refused as well.
        if not (0 <= temperature < math.inf and top_k >= 0 and 0 < top_p <= 1 and 0 <= guidance_scale < math.inf):
            raise ValueError(
                f"cannot sample with temperature {temperature}, top_k {top_k}, top_p {top_p}, guidance {guidance_scale}: "
                "temperature, top_k and guidance must be finite and at least 0, and top_p in (0, 1]"
            )
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} samples; give one for each")
        if wrong := [seed for seed in seeds or () if not (isinstance(seed, Integral) and -(2**63) <= seed < 2**64)]:
            raise ValueError(f"seed {wrong[0]!r} is no whole number of 64 bits; give one such as 0")
        if seeds is None:
            seeds = torch.randint(2**62, (batch,)).tolist()
        self.guidance_scale, self.temperature, self.top_k, self.top_p = guidance_scale, temperature, top_k, top_p
        # On the model's device, so that nothing moves between devices while decoding.
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds] if temperature > 0 else []

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return self.guidance_scale != 1

    def scores(self, logits: Tensor, guided: bool) -> Tensor:
        """What tokens are drawn by, float32: the log-probabilities, but for a constant, of those that may be drawn, or
        at temperature 0 the logits. When `guided`, the second half of the batch is the unconditional branch."""
        logits = logits.float()
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.guidance_scale * (cond - uncond)
        return _filtered(logits / self.temperature, self.top_k, self.top_p) if self.generators else logits

    def draw(self, scores_BnV: Tensor) -> Tensor:
        """Tokens [B, n]: the likeliest at temperature 0, else a draw by the Gumbel-max trick."""
        if not self.generators:
            return scores_BnV.argmax(-1)
        uniform = torch.stack([self._uniform(g, scores_BnV) for g in self.generators])
        # `rand` is below 1, so only its zeros need care: both logarithms are then of positive numbers.
        exponential = uniform.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
        return exponential.log_().neg_().add_(scores_BnV).argmax(-1)

    @staticmethod
    def _uniform(generator: torch.Generator, scores_BnV: Tensor) -> Tensor:
        return torch.rand(scores_BnV.shape[1:], generator=generator, device=scores_BnV.device)


def trimmed(condition: Tensor, condition_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Caption states and mask without the padding beyond the longest caption; classes as they are."""
    if condition_mask is None:
        return condition, None
    longest = int(condition_mask.sum(1).max())
    return condition[:, -longest:], condition_mask[:, -longest:]


@torch.inference_mode()
def generate(
    model: NAR,
    condition: Tensor,
    condition_mask: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    guidance_share: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Draw samples, int64 [B, *grid].

    Args:
        model: In evaluation mode.
        condition: Caption states [B, P, X], left-padded, or class labels [B].
        condition_mask: bool [B, P], True at real tokens.
        guidance_scale: s of `uncond + s * (cond - uncond)`; 1 runs no unconditional branch.
        guidance_share: Share of the passes, from the first on, that are guided; after them the unconditional branch is
            not computed any more (as the interval of Kynkäänniemi et al. 2024, arXiv 2404.07724, here from the start).
        temperature: 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens up to this probability mass.
        seeds: One per sample; a sample depends on its own seed and condition, not on the batch, and on the kind of
            device. Without seeds, the global generator's.
        callback: See `Callback`.

    Raises ValueError for options out of range or a number of seeds that is not the batch's.
    """
    batch, device = len(condition), condition.device
    sampler = Sampler(
        batch, device, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds
    )
    if not 0 <= guidance_share <= 1:
        raise ValueError(f"guidance_share is {guidance_share}; it must be in [0, 1]")
    sizes = wavefront_sizes(model.config.schedule)
    guided_passes = round(guidance_share * len(sizes)) if sampler.guided else 0
    rank_N = tables(model.config, device).rank_N
    tokens_BN = torch.full((batch, model.n_tokens), -1, dtype=torch.int64, device=device)
    logits, cache, prefix_mask = model.prefill(*trimmed(condition, condition_mask), guided=guided_passes > 0)
    done = 0
    for wavefront, size in enumerate(sizes):
        drawn = sampler.draw(sampler.scores(logits, wavefront < guided_passes))
        tokens_BN[:, done : done + size] = drawn
        done += size
        if callback is not None:
            callback(wavefront, tokens_BN[:, rank_N].unflatten(1, model.config.grid))
        if wavefront + 1 == len(sizes):
            break
        if wavefront + 1 < guided_passes:
            drawn = torch.cat([drawn, drawn])
        elif wavefront + 1 == guided_passes:
            cache.keep_first(batch)
            prefix_mask = None if prefix_mask is None else prefix_mask[:batch]
        logits = model.step(drawn, wavefront, cache, prefix_mask)
    return tokens_BN[:, rank_N].unflatten(1, model.config.grid)
