from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.config import TrainConfig
from t2i.optimizer import AVERAGE, AveragingAdamW, lr_at, make_optimizer


def run(decay: float, steps: int) -> tuple[list[torch.Tensor], torch.optim.AdamW]:
    """The weights after each step of a small problem, and its optimizer."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = make_optimizer([{"params": [weight]}], TrainConfig(lr=0.1, ema_decay=decay))
    seen = []
    for _ in range(steps):
        (weight - 2).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(weight.detach().clone())
    return seen, optimizer


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_that_of_its_definition(decay: float) -> None:
    seen, optimizer = run(decay, 20)
    average = seen[0]
    for step, weights in enumerate(seen[1:], start=2):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * weights
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state[AVERAGE], average)


def test_averaging_does_not_change_the_steps() -> None:
    with_average, optimizer = run(0.9, 5)
    assert isinstance(optimizer, AveragingAdamW)
    without, plain = run(0.0, 5)
    assert type(plain) is torch.optim.AdamW
    assert all(torch.equal(a, b) for a, b in zip(with_average, without, strict=True))


def test_a_saved_average_goes_on() -> None:
    straight, first = run(0.9, 10)
    state = first.state_dict()
    weight = torch.nn.Parameter(straight[-1].clone())
    second = make_optimizer([{"params": [weight]}], TrainConfig(lr=0.1, ema_decay=0.9))
    second.load_state_dict(state)
    (weight - 2).square().sum().backward()
    second.step()
    further, both = run(0.9, 11)
    assert torch.equal(weight.detach(), further[-1])
    assert torch.equal(second.state[weight][AVERAGE], next(iter(both.state.values()))[AVERAGE])


def test_a_parameter_without_gradient_has_no_average() -> None:
    weight, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([{"params": [weight, idle]}], TrainConfig(ema_decay=0.9))
    weight.sum().backward()
    optimizer.step()
    assert AVERAGE in optimizer.state[weight]
    assert not optimizer.state[idle]


@given(
    steps=st.integers(1, 500), warmup=st.integers(0, 50), lr=st.floats(1e-6, 1.0), floor=st.floats(0, 1)
)  # fmt: skip
def test_learning_rate_rises_to_lr_and_falls_to_min_lr(steps: int, warmup: int, lr: float, floor: float) -> None:
    config = TrainConfig(steps=steps, warmup_steps=warmup, lr=lr, min_lr=lr * floor)
    rates = [lr_at(config, step) for step in range(steps)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == pytest.approx([lr * (step + 1) / warmup for step in range(len(up))])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(down))
    assert all(config.min_lr * (1 - 1e-9) <= rate <= lr * (1 + 1e-9) for rate in down)
    if down:
        assert down[0] == pytest.approx(lr)
    assert lr_at(config, max(steps, warmup + 1)) == pytest.approx(config.min_lr, abs=1e-12)


@given(steps=st.integers(1, 300), warmup=st.integers(0, 20), decay=st.integers(0, 100))
def test_a_constant_rate_falls_in_its_last_steps_only(steps: int, warmup: int, decay: int) -> None:
    config = TrainConfig(
        steps=steps, warmup_steps=warmup, lr=1.0, min_lr=0.2, lr_schedule="constant", decay_steps=decay
    )  # fmt: skip
    rates = [lr_at(config, step) for step in range(steps)]
    constant = rates[warmup : max(warmup, steps - decay)]
    assert constant == [1.0] * len(constant)
    falling = rates[max(warmup, steps - decay) :]
    assert all(later < earlier for earlier, later in pairwise(falling))
    assert all(0.2 < rate <= 1.0 for rate in falling)
    assert lr_at(config, max(steps, warmup)) == pytest.approx(0.2)
