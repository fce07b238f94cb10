"""The optimizer: AdamW, with a moving average of the weights beside the moments where a run asks for one, and its learning
rate at each step.

ZeRO lets an optimizer step over this rank's flat fp32 share of the parameters. An average kept in the optimizer's own
state therefore is sharded, saved and resumed exactly as the moments are, at every stage, and no rank ever holds all of it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from t2i.config import TrainConfig

AVERAGE = "ema"
"""Name of the average in the optimizer's state of a parameter."""


class AveragingAdamW(torch.optim.AdamW):
    """AdamW whose state of each parameter also holds an exponential moving average of that parameter.

    After step t the average moves towards the new weights by `1 - min(decay, (1 + t) / (10 + t))`: what is early and far
    from the end is soon forgotten.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], decay: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One AdamW step, then the averages."""
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if not (state := self.state.get(parameter)):
                    continue  # it had no gradient
                if AVERAGE not in state:
                    state[AVERAGE] = parameter.detach().clone()
                steps: Tensor = state["step"]  # on the parameter's device, so that nothing waits for it
                share = 1 - ((1 + steps) / (10 + steps)).clamp_max(self.decay)
                state[AVERAGE].lerp_(parameter, share.to(parameter))
        return loss


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of a run over parameter groups (`t2i.objective.parameter_groups`)."""
    options: dict[str, Any] = {"lr": train.lr, "betas": (train.beta1, train.beta2), "fused": True}
    if train.ema_decay:
        return AveragingAdamW(groups, train.ema_decay, **options)
    return torch.optim.AdamW(groups, **options)


def lr_at(train: TrainConfig, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then by `train.lr_schedule` to `min_lr` at the last step."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "cosine":
        progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
        return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    left = min(1.0, max(0, train.steps - step) / max(1, train.decay_steps))
    return train.min_lr + (train.lr - train.min_lr) * left
