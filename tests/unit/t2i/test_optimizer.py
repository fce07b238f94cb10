import pytest
import torch

from t2i.config import TrainConfig
from t2i.optimizer import AVERAGE, AveragingAdamW, make_optimizer


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
