from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import captions, small_config, small_model

from t2i import products
from t2i.layers import Linear
from t2i.products import THIN_ROWS, Multiplies, packs, product
from t2i.sampling import generate
from t2i.zipar import generate_zipar


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 23, 31, 32, 33, THIN_ROWS, THIN_ROWS + 1])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_thin_product_is_the_linear_map(rows: int, side_by_side: bool) -> None:
    x, weight = torch.randn(1, rows, 12), torch.randn(5, 12)
    if side_by_side:  # as the columns of another product
        x = x[0].t().contiguous().t()[None]
    with torch.no_grad():
        result = product(x, weight)
    assert result.shape == (1, rows, 5)
    torch.testing.assert_close(result, F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 600])
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 5), (16, 64), (2816, 1024)])
def test_a_packed_product_is_the_linear_map(rows: int, inputs: int, outputs: int) -> None:
    assert packs(), "this torch has no oneDNN to pack for"
    layer, x = Linear(inputs, outputs, std=inputs**-0.5).eval(), torch.randn(2, rows, inputs)
    layer.pack()
    assert layer._packed is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x[:, :, ::2].repeat_interleave(2, 2)[:, :, :inputs]),
                                   F.linear(x[:, :, ::2].repeat_interleave(2, 2)[:, :, :inputs], layer.weight),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_packed_model_draws_the_same_tokens(grid: tuple[int, ...], temperature: float) -> None:
    config = small_config(grid, n_head=4, n_kv_head=2)
    plain, packed = small_model(config), small_model(config).pack()
    states, mask = captions(config, [3, 5, 1])
    options: dict[str, Any] = {"guidance_scale": 3.0, "temperature": temperature, "seeds": [1, 2, 3]}
    assert generate(packed, states, mask, **options).equal(generate(plain, states, mask, **options))


def test_a_packed_raster_model_draws_the_same_tokens_with_zipar() -> None:
    config = small_config((4, 4), order="raster")
    states, mask = captions(config, [3, 2])
    options: dict[str, Any] = {"window": 2, "guidance_scale": 3.0, "seeds": [1, 2]}
    plain, packed = small_model(config), small_model(config).pack()
    assert generate_zipar(packed, states, mask, **options).equal(generate_zipar(plain, states, mask, **options))


def test_gradients_are_not_those_of_packed_weights() -> None:
    layer, x = Linear(6, 4, std=1.0).eval(), torch.randn(3, 6)
    layer.pack()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, -1))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train().eval(),
        lambda model: model.eval(),
        lambda model: model.load_state_dict(small_model(model.config, seed=1).state_dict()),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["train", "eval", "load", "double", "bfloat16"],
)
def test_what_may_have_changed_is_not_packed_any_more(change: object) -> None:
    model = small_model(small_config((3, 3))).pack()
    packed = [module for module in model.modules() if isinstance(module, Multiplies)]
    # Of each of the three blocks five, the two of the caption, the heads.
    assert len(packed) == 3 * 5 + 2 + 1
    assert all(module._packed is not None for module in packed)
    assert callable(change)
    change(model)
    assert all(module._packed is None for module in packed)
    # And what is drawn comes from the weights that there are.
    states, mask = captions(model.config, [2])
    states = states.to(model.tokens.weight.dtype)
    fresh = small_model(model.config).to(states.dtype)
    fresh.load_state_dict(model.state_dict())
    assert generate(model, states, mask, seeds=[0]).equal(generate(fresh, states, mask, seeds=[0]))


def test_a_change_in_place_is_seen_when_packing_again() -> None:
    model = small_model(small_config((3, 3))).pack()
    kept = model.blocks[0].attention.wo._packed
    with torch.no_grad():
        model.heads.weight.mul_(-1)
        model.blocks[0].feed_forward.w1.weight.zero_()
    model.pack()
    assert model.blocks[0].attention.wo._packed is kept  # that one has not changed
    fresh = small_model(model.config)
    fresh.load_state_dict(model.state_dict())
    states, mask = captions(model.config, [2])
    assert generate(model, states, mask, seeds=[0]).equal(generate(fresh, states, mask, seeds=[0]))


def test_other_types_are_not_packed() -> None:
    model = small_model(small_config((3, 3))).double().pack()
    assert all(module._packed is None for module in model.modules() if isinstance(module, Multiplies))


def test_a_packed_model_is_saved_and_read_as_ever() -> None:
    model = small_model(small_config((3, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.pack().state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("fault", ["none", "another signature", "wrong"])
def test_without_such_a_product_nothing_is_packed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, packed_OI: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], len(packed_OI))

    operators = {"none": None, "another signature": lambda x, packed_OI: x, "wrong": wrong}
    monkeypatch.setattr(products, "packed_operator", lambda: operators[fault])
    packs.cache_clear()
    try:
        assert not packs()
        model = small_model(small_config((3, 3))).pack()
        assert all(module._packed is None for module in model.modules() if isinstance(module, Multiplies))
    finally:
        packs.cache_clear()
