import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import captions, small_config, small_model

from t2i import products
from t2i.layers import Linear
from t2i.model import NAR
from t2i.products import THIN_ROWS, Multiplies, can_pack, product
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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_with_onednn_weights_can_be_packed() -> None:
    """Were it not so, tests below would be skipped and decoding would take twice as long, without a word."""
    assert can_pack()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product with a packed weight, as they are made."""
    if not can_pack():
        pytest.skip("this torch does not multiply with packed weights")
    rows: list[int] = []
    original = products.packed_product

    def counted(x: torch.Tensor, packed_OI: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[:-1].numel())
        return original(x, packed_OI)

    monkeypatch.setattr(products, "packed_product", counted)
    return rows


def packed_modules(model: NAR) -> list[Multiplies]:
    return [module for module in model.modules() if isinstance(module, Multiplies) and module._packed is not None]


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 600])
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 5), (16, 64), (2816, 1024)])
def test_a_packed_product_is_the_linear_map(rows: int, inputs: int, outputs: int, calls: list[int]) -> None:
    layer, x = Linear(inputs, outputs, std=inputs**-0.5).eval(), torch.randn(2, rows, inputs)
    layer.pack()
    with torch.no_grad():
        for given in (x, x.mT.contiguous().mT, x[:, ::2]):
            torch.testing.assert_close(layer(given), F.linear(given, layer.weight), rtol=1e-4, atol=1e-4)
    assert calls == [2 * rows, 2 * rows, 2 * ((rows + 1) // 2)]


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_packed_model_draws_the_same_tokens(grid: tuple[int, ...], temperature: float, calls: list[int]) -> None:
    config = small_config(grid, n_head=4, n_kv_head=2)
    plain, packed = small_model(config), small_model(config).pack()
    states, mask = captions(config, [3, 5, 1])
    options: dict[str, Any] = {"guidance_scale": 3.0, "temperature": temperature, "seeds": [1, 2, 3]}
    expected = generate(plain, states, mask, **options)
    assert not calls
    assert generate(packed, states, mask, **options).equal(expected)
    assert calls


def test_a_packed_raster_model_draws_the_same_tokens_with_zipar(calls: list[int]) -> None:
    config = small_config((4, 4), order="raster")
    states, mask = captions(config, [3, 2])
    options: dict[str, Any] = {"window": 2, "guidance_scale": 3.0, "seeds": [1, 2]}
    plain, packed = small_model(config), small_model(config).pack()
    expected = generate_zipar(plain, states, mask, **options)
    assert not calls
    assert generate_zipar(packed, states, mask, **options).equal(expected)
    assert calls


def test_gradients_are_not_those_of_packed_weights(calls: list[int]) -> None:
    layer, x = Linear(6, 4, std=1.0).eval(), torch.randn(3, 6)
    layer.pack()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, -1))
    assert not calls


def test_other_inputs_are_multiplied_as_ever(calls: list[int]) -> None:
    layer, x = Linear(6, 4, std=1.0).eval(), torch.randn(3, 6)
    layer.pack()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert not calls
        assert layer(x).dtype == torch.float32
        assert calls == [3]


def replaced(model: NAR) -> None:
    model.heads.weight = torch.nn.Parameter(-model.heads.weight.detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train().eval(),
        lambda model: model.eval(),
        lambda model: model.load_state_dict(small_model(model.config, seed=1).state_dict()),
        lambda model: model.load_state_dict(small_model(model.config, seed=1).state_dict(), assign=True),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: [parameter.detach().mul_(-1) for parameter in model.parameters()],
        replaced,
    ],
    ids=["train", "eval", "load", "assign", "double", "bfloat16", "in place", "replaced"],
)
def test_what_has_changed_is_not_multiplied_packed(change: Any, calls: list[int]) -> None:
    model = small_model(small_config((3, 3))).pack()
    # Of each of the three blocks five, the two of the caption, the heads.
    every = 3 * 5 + 2 + 1
    assert len(packed_modules(model)) == every
    change(model)
    states, mask = captions(model.config, [2])
    states = states.to(model.tokens.weight.dtype)
    fresh = NAR(model.config).to(states.dtype).eval()
    fresh.load_state_dict(model.state_dict())
    expected = generate(fresh, states, mask, seeds=[0])
    assert not calls
    assert generate(model, states, mask, seeds=[0]).equal(expected)
    changed = len(calls)
    assert changed == 0 if change is not replaced else changed > 0  # the rest is as it was
    # Packed again, where that can be.
    model.pack()
    before = len(calls)
    assert generate(model, states, mask, seeds=[0]).equal(expected)
    # The caption's map; then in the prefix's pass and four wavefronts' the blocks and the heads.
    assert len(calls) - before == (2 + 5 * 16 if states.dtype == torch.float32 else 0)


def test_other_types_are_not_packed() -> None:
    assert not packed_modules(small_model(small_config((3, 3))).double().pack())


def test_a_packed_model_is_saved_copied_and_pickled_as_ever() -> None:
    model = small_model(small_config((3, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.pack()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        after = one.state_dict()
        assert before.keys() == after.keys()
        assert all(tensor.equal(after[name]) for name, tensor in before.items())
        assert bool(packed_modules(one)) == (one is model and can_pack())


@pytest.mark.parametrize("fault", ["none", "another signature", "wrong"])
def test_without_such_a_product_nothing_is_packed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, packed_OI: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], len(packed_OI))

    operators = {"none": None, "another signature": lambda x, packed_OI: x, "wrong": wrong}
    monkeypatch.setattr(products, "packed_operator", lambda: operators[fault])
    can_pack.cache_clear()
    try:
        assert not can_pack()
        assert not packed_modules(small_model(small_config((3, 3))).pack())
    finally:
        can_pack.cache_clear()


def test_trying_whether_it_can_be_done_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    can_pack.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        tried = can_pack()
    can_pack.cache_clear()
    assert can_pack() == tried
    assert torch.get_rng_state().equal(before)
