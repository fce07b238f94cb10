from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import captions, small_config, small_model

from t2i.bench.naive import NaiveNAR
from t2i.convert import load_official_nar
from t2i.sampling import Sampler, generate

variants = pytest.mark.parametrize(
    "variant",
    [
        {},
        {"prefix_rotary": "sequence", "uncond_tokens": 3},
        {"prefix_rotary": "zero", "uncond_tokens": 5, "uncond_mask": "caption", "n_head": 4, "n_kv_head": 2},
    ],
)


@variants
@pytest.mark.parametrize("grid", [(3, 4), (4, 4), (1, 3)])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"guidance_scale": 3.0}, {"top_p": 0.8, "top_k": 5}])
def test_our_decoder_draws_the_same_tokens(
    variant: dict[str, Any], grid: tuple[int, int], options: dict[str, Any]
) -> None:
    model = small_model(small_config(grid, **variant))
    states, mask = captions(model.config, [2, 4, 3])
    sampler = Sampler(3, states.device, seeds=[4, 5, 6], **options)
    drawn = NaiveNAR(model).generate(states, mask, sampler)
    assert torch.equal(generate(model, states, mask, seeds=[4, 5, 6], **options), drawn)


@variants
def test_our_training_step_has_the_same_loss_and_gradients(variant: dict[str, Any]) -> None:
    model = small_model(small_config((3, 4), **variant))
    states, mask = captions(model.config, [2, 4, 3])
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    unconditional = torch.tensor([False, True, False])
    naive = NaiveNAR(model)
    expected = naive.loss(tokens, states, mask, unconditional)
    expected.backward()
    gradients = naive.gradients()
    naive.zero_grad()
    assert not any(p.grad is not None for p in [*model.parameters(), *naive.heads])
    loss = model(tokens, states, mask, unconditional)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_it_is_the_published_computation(reference: Callable[[str], Any]) -> None:
    fixture = reference("nar_t2i")
    model = load_official_nar(fixture.weights, grid=(5, 5), n_head=fixture.config["n_head"])
    naive = NaiveNAR(model)
    with torch.no_grad():
        none = torch.zeros(len(fixture.mask), dtype=torch.bool)
        loss = naive.loss(fixture.tensors["in.tokens"], fixture.condition, fixture.mask, none)
    assert abs(float(loss - fixture.tensors["out.train_loss"])) <= 1e-5
    scales = [key for key in fixture.tensors if key.startswith("out.greedy_tokens_cfg")]
    assert len(scales) == 2
    for key in scales:
        scale = float(key.partition("cfg")[2])
        sampler = Sampler(len(fixture.mask), fixture.mask.device, guidance_scale=scale, temperature=0)
        drawn = naive.generate(fixture.condition, fixture.mask, sampler)
        assert torch.equal(drawn.flatten(1), fixture.tensors[key]), key
