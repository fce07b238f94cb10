import pytest
import torch
from small_models import captions, small_config, small_model

from t2i.bench.floor import Products
from t2i.products import can_pack
from t2i.sampling import generate


def test_products_are_those_of_the_run() -> None:
    weight, x = torch.nn.Parameter(torch.randn(5, 7)), torch.randn(3, 7)
    with torch.no_grad(), Products([weight]) as products:
        torch.relu(x @ weight.t())
        weight @ x.t()
        torch.nn.functional.linear(x, weight)
        torch.bmm(torch.zeros(2, 3, 4), torch.zeros(2, 4, 6))
    shapes = [(tuple(left.shape), tuple(right.shape)) for left, right in products.products]
    assert shapes == [((3, 7), (7, 5)), ((5, 7), (7, 3)), ((3, 7), (7, 5)), ((2, 3, 4), (2, 4, 6))]
    assert products.products[1][0].data_ptr() == weight.data_ptr()  # from where it is in the run
    assert products.products[1][1].stride() == x.t().stride()
    assert products.flops == 3 * 2 * 3 * 7 * 5 + 2 * 2 * 3 * 4 * 6
    products.repeat()


@pytest.mark.parametrize("inference", [False, True])
def test_attention_is_its_products(inference: bool) -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    with torch.inference_mode(inference), Products([]) as products:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert products.flops == 2 * (2 * 2 * 3 * 4 * 6 * 8)


def test_attention_backwards_is_five_products() -> None:
    q, k, v = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(3))
    with Products([]) as products:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert products.flops == 7 * (2 * 2 * 3 * 4 * 4 * 8)
    products.repeat()


def test_floor_of_decoding_counts_every_block_of_every_pass() -> None:
    model = small_model(small_config((3, 3)))
    states, mask = captions(model.config, [2])
    with torch.no_grad(), Products(list(model.parameters())) as products:
        generate(model, states, mask, guidance_scale=2.0, seeds=[0])
    w1 = model.blocks[0].feed_forward.w1.weight
    rows = [right.shape[1] for left, right in products.products if left.data_ptr() == w1.data_ptr()]
    # The caption, the prefix without one, then the wavefronts but the last, both branches of each.
    assert rows == [2, 1, 2 * 1, 2 * 2, 2 * 3, 2 * 2]


@pytest.mark.skipif(not can_pack(), reason="this torch does not multiply with packed weights")
def test_floor_of_decoding_multiplies_packed_weights_and_reads_the_cache() -> None:
    model = small_model(small_config((3, 3)))
    states, mask = captions(model.config, [2])
    flops, kept = [], []
    for packed in (False, True):
        if packed:
            model.pack()
        with torch.no_grad(), Products(list(model.parameters())) as products:
            generate(model, states, mask, guidance_scale=2.0, seeds=[0])
        flops.append(products.flops)
        kept.append(sum(right.is_mkldnn for _, right in products.products))
        # Keys of heads of 8 channels: what a block has written in one pass lies where it lay in the others.
        keys = [right for left, right in products.products if left.shape[-1] == 8 and right.shape[0] == 2 * 2]
        assert len({one.untyped_storage().data_ptr() for one in keys}) == 2  # the cache's keys and its values
        assert len({one.data_ptr() for one in keys}) == 2 * len(model.blocks)
        products.repeat()
    assert flops[0] == flops[1]
    assert kept[0] == 0
    # Two prefixes through the map of captions, three blocks and the heads; four wavefronts.
    assert kept[1] == 2 * (2 + 3 * 5 + 1) + 4 * (3 * 5 + 1)


def test_floor_of_a_training_step_counts_the_loss_in_parts() -> None:
    model = small_model(small_config((3, 3)))
    states, mask = captions(model.config, [2, 2])
    with Products(list(model.parameters())) as products:
        model(torch.zeros(2, 9, dtype=torch.int64), states, mask).backward()
    # 18 predictions of 11 codes from two heads of 16 channels: logits, and the gradients of both operands.
    of_heads = [one for one in products.products if 11 in one[0].shape or 11 in one[1].shape]
    assert [(2 * left.numel() * right.shape[-1]) for left, right in of_heads] == [2 * 18 * 11 * 32] * 3
    # One token less than there are goes in, behind two of the caption.
    w1 = model.blocks[0].feed_forward.w1.weight
    rows = 2 * (2 + 8)
    flops = [
        2 * left.numel() * right.shape[-1]
        for left, right in products.products
        if w1.shape[0] in (*left.shape, *right.shape)
    ]
    assert flops == [2 * rows * w1.numel()] * (3 * 3 * len(model.blocks))
