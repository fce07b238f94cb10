"""The prediction heads of a NAR model, one per axis, and their loss (arXiv 2503.10696, section 3).

Single-device code. Parameters are set in the constructor that makes them: see `t2i.layers`.

Shape suffixes: B batch, C width, A axes, N positions predicted, M = B N, V vocabulary, D channels of a code vector, K its
principal components, I = A C; m rows of one part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from t2i.config import ModelConfig
from t2i.layers import RMSNorm
from t2i.products import Multiplies

CODE_COMPONENTS = 32  # principal components of the codes that heads start from
CODE_SCALE = 4.0  # of the standard deviation of other weights
LOSS_ROWS = 512  # rows of fp32 logits that exist at once while training; 34 MB with 16,384 codes


def project_codes(codes_VD: Tensor, width: int, std: float) -> Tensor:
    """Code vectors [V, D] to random vectors [V, width] of entries with that standard deviation, alike where the codes are.

    Their first principal components, each scaled to the same spread, times a random matrix from the global generator. On
    that scale what tells few codes apart, an outline, weighs as much as what tells many, a colour.
    """
    left_VK, _, _ = torch.linalg.svd(codes_VD - codes_VD.mean(0), full_matrices=False)
    whitened_VK = left_VK[:, :CODE_COMPONENTS]
    # Under ZeRO-3 what is made here comes in the engine's type and place.
    projected = whitened_VK @ torch.randn(whitened_VK.shape[1], width).to(whitened_VK)
    return projected * (std / projected.std())


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits that exist only `LOSS_ROWS` rows at a time, and its gradients in the same go."""

    @staticmethod
    def forward(ctx: Any, hidden_MI: Tensor, weight_VI: Tensor, targets_M: Tensor, learns: bool) -> Tensor:
        """`learns`: whether gradients are on, which cannot be seen in here."""
        rows = len(hidden_MI)
        loss = hidden_MI.new_zeros((), dtype=torch.float32)
        of_hidden_MI = torch.empty_like(hidden_MI) if learns and ctx.needs_input_grad[0] else None
        of_weight_VI = torch.zeros_like(weight_VI, dtype=torch.float32) if learns and ctx.needs_input_grad[1] else None
        for first in range(0, rows, LOSS_ROWS):
            part = slice(first, first + LOSS_ROWS)
            hidden_mI, targets_m1 = hidden_MI[part], targets_M[part, None]
            logits_mV = F.linear(hidden_mI, weight_VI).float()
            norms_m1 = logits_mV.logsumexp(-1, keepdim=True)
            loss += (norms_m1 - logits_mV.gather(1, targets_m1)).sum() / rows
            if of_hidden_MI is None and of_weight_VI is None:
                continue
            of_logits_mV = logits_mV.sub_(norms_m1).exp_()
            of_logits_mV.scatter_add_(1, targets_m1, of_logits_mV.new_full((1, 1), -1.0).expand_as(targets_m1))
            of_logits_mV = of_logits_mV.to(hidden_mI.dtype)
            if of_hidden_MI is not None:
                torch.mm(of_logits_mV, weight_VI, out=of_hidden_MI[part])
            if of_weight_VI is not None:
                if of_weight_VI.dtype == hidden_mI.dtype:
                    of_weight_VI.addmm_(of_logits_mV.t(), hidden_mI)
                else:
                    of_weight_VI += of_logits_mV.t() @ hidden_mI
        ctx.rows, ctx.weight_dtype = rows, weight_VI.dtype
        ctx.gradients = (of_hidden_MI, of_weight_VI)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden_MI, of_weight_VI = ctx.gradients
        ctx.gradients = None  # scaled in place: a second time they would be wrong
        gradient = gradient / ctx.rows  # here, where fp16's loss scale has been multiplied in
        return (
            None if of_hidden_MI is None else of_hidden_MI.mul_(gradient),
            None if of_weight_VI is None else of_weight_VI.mul_(gradient).to(ctx.weight_dtype),
            None,
            None,
        )


class AxisHeads(Multiplies):
    """One prediction head per axis, each a norm and a linear map to the vocabulary, and their weighted mean.

    Head a at position q predicts the token at q + e_a; a position's logits are the mean of the predictions made for it
    (NAR, arXiv 2503.10696, section 3). The heads being linear, the mean is one matrix product over the weighted hidden
    states side by side, and no head's own logits ever exist.

    With `codes_VD`, the code vectors of the image tokenizer, every head starts from projections of them: what is learned
    of one token then holds at once for those that look like it. Otherwise the last one, or all, start at zero.
    """

    def __init__(self, config: ModelConfig, codes_VD: Tensor | None = None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(config.width) for _ in range(config.n_axes))
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.n_axes, config.width))
        nn.init.normal_(self.weight, std=config.init_std)
        with torch.no_grad():
            if codes_VD is not None:
                assert len(codes_VD) == config.vocab_size, (len(codes_VD), config.vocab_size)
                for axis in range(config.n_axes):
                    self.weight[:, axis] = project_codes(codes_VD.float(), config.width, CODE_SCALE * config.init_std)
            else:
                self.weight[:, -1 if config.zero_init_heads == "last" else slice(None)] = 0

    def forward(self, hidden: list[Tensor], weights_NA: Tensor, targets_BN: Tensor | None = None) -> Tensor:
        """Logits [B, N, V] from the predecessors' hidden states, one [B, N, C] per axis, and the weights of the mean; or,
        with the tokens that they predict, their mean cross-entropy (a scalar, nats per token), without ever holding them
        all."""
        weighted = [
            norm(h) * weights_NA[:, a : a + 1].to(h.dtype)
            for a, (norm, h) in enumerate(zip(self.norms, hidden, strict=True))
        ]
        joined = torch.cat(weighted, dim=-1)
        if targets_BN is None:
            return self.multiply(joined)
        loss: Tensor = _CrossEntropy.apply(
            joined.flatten(0, 1), self.matrix(), targets_BN.flatten(), torch.is_grad_enabled()
        )
        return loss
