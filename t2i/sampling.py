"""Decoding: tokens of a grid from a trained NAR model, one pass per wavefront (arXiv 2503.10696, section 3.3).

    tokens = generate(model, states, mask, guidance_scale=7.5, seeds=[0, 1])

Shape suffixes: B batch, P prefix, X condition channels, n tokens of one wavefront, V vocabulary, N grid tokens.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from t2i.model import NAR, tables
from t2i.wavefronts import wavefront_sizes


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


def _draw(logits_BnV: Tensor, temperature: float, top_k: int, top_p: float, noise_BnV: Tensor | None) -> Tensor:
    """Tokens [B, n]: the likeliest at temperature 0, else a draw by the Gumbel-max trick from the given noise."""
    if noise_BnV is None:
        return logits_BnV.argmax(-1)
    return (_filtered(logits_BnV / temperature, top_k, top_p) + noise_BnV).argmax(-1)


def _gumbel(generators: Sequence[torch.Generator], n: int, vocab: int, device: torch.device) -> Tensor:
    uniform = torch.stack([torch.rand(n, vocab, generator=g, device=g.device) for g in generators])
    # `rand` is below 1, so only its zeros need care: both logarithms are then of positive numbers.
    exponential = -uniform.clamp_min(torch.finfo(torch.float32).tiny).log()
    return -exponential.log().to(device)


@torch.inference_mode()
def generate(
    model: NAR,
    condition: Tensor,
    condition_mask: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw samples, int64 [B, *grid].

    Args:
        model: In evaluation mode.
        condition: Caption states [B, P, X], left-padded, or class labels [B].
        condition_mask: bool [B, P], True at real tokens.
        guidance_scale: s of `uncond + s * (cond - uncond)`; 1 runs no unconditional branch.
        temperature: 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens up to this probability mass.
        seeds: One per sample; a sample depends on its own seed and condition, not on the batch. Without seeds, the
            global generator's.
        callback: Called after each wavefront with its number and the tokens so far [B, *grid] (-1 = not yet drawn).

    Raises ValueError for options out of range or a number of seeds that is not the batch's.
    """
    batch, device = len(condition), condition.device
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
    # Random numbers are made on the processor: the same picture for a seed on every device.
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds] if temperature > 0 else []
    guided = guidance_scale != 1
    if condition_mask is not None:
        # No work on padding beyond the longest caption.
        longest = int(condition_mask.sum(1).max())
        condition, condition_mask = condition[:, -longest:], condition_mask[:, -longest:]
    unconditional = None
    if guided:
        condition = torch.cat([condition, condition])
        condition_mask = None if condition_mask is None else torch.cat([condition_mask, condition_mask])
        unconditional = torch.arange(2 * batch, device=device) >= batch

    sizes = wavefront_sizes(model.config.schedule)
    rank_N = tables(model.config, device).rank_N
    tokens_BN = torch.full((batch, model.n_tokens), -1, dtype=torch.int64, device=device)
    logits, cache, prefix_mask = model.prefill(condition, condition_mask, unconditional)
    done = 0
    for wavefront, size in enumerate(sizes):
        logits = logits.float()
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + guidance_scale * (cond - uncond)
        noise = _gumbel(generators, size, logits.shape[-1], device) if generators else None
        drawn = _draw(logits, temperature, top_k, top_p, noise)
        tokens_BN[:, done : done + size] = drawn
        done += size
        if callback is not None:
            callback(wavefront, tokens_BN[:, rank_N].unflatten(1, model.config.grid))
        if wavefront + 1 < len(sizes):
            logits = model.step(torch.cat([drawn, drawn]) if guided else drawn, wavefront, cache, prefix_mask)
    return tokens_BN[:, rank_N].unflatten(1, model.config.grid)
