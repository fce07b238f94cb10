import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.convert import load_official_llamagen, load_official_nar
from t2i.sampling import generate

GRIDS = {"nar_t2i": (5, 5), "nar_c2i": (4, 4), "nar_video": (2, 3, 4)}


def raster_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a NAR model of two axes without its second head and the block before that: those of a LlamaGen model."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    return {key: t for key, t in weights.items() if not key.startswith(("medusa", f"layers.{last}."))}


def with_grouped_heads(weights: dict[str, Tensor], n_head: int, n_kv_head: int) -> dict[str, Tensor]:
    """The same model with the first key-value heads alone."""
    width = weights["tok_embeddings.weight"].shape[1]
    kept = width // n_head * n_kv_head
    rows = [*range(width + kept), *range(2 * width, 2 * width + kept)]
    return {key: t[rows].clone() if key.endswith("wqkv.weight") else t for key, t in weights.items()}


# NAR: the parity tests with the published computation are in test_model.py


def test_sizes_and_published_options_are_read_off_the_weights(reference: Callable[[str], Any]) -> None:
    text = load_official_nar(reference("nar_t2i").weights, grid=(5, 5), n_head=4).config
    assert (text.condition, text.width, text.n_layer, text.vocab_size) == ("text", 64, 3, 96)
    assert (text.condition_dim, text.max_condition, text.uncond_tokens) == (24, 120, 120)
    assert (text.prefix_rotary, text.uncond_embedding, text.uncond_mask) == ("zero", "frozen", "caption")
    assert (text.ffn_multiple, text.n_kv_head, text.order) == (256, None, "neighbor")
    classes = load_official_nar(reference("nar_c2i").weights, grid=(4, 4), n_head=4).config
    assert (classes.condition, classes.num_classes, classes.n_layer) == ("class", 10, 2)
    video = load_official_nar(reference("nar_video").weights, grid=(2, 3, 4), n_head=4).config
    assert (video.positions, video.zero_init_heads, video.num_classes, video.n_layer) == ("learned", "all", 6, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_comes_in_evaluation_mode_and_float32_and_is_ones_own(
    reference: Callable[[str], Any], dtype: torch.dtype
) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in reference("nar_c2i").weights.items()}
    model = load_official_nar(weights, grid=(4, 4), n_head=4)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.tokens.weight, weights["tok_embeddings.weight"].float())
    exact = reference("nar_c2i").weights
    before = exact["tok_embeddings.weight"].clone()
    model = load_official_nar(exact, grid=(4, 4), n_head=4)
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.tokens.weight.zero_()
    assert torch.equal(exact["tok_embeddings.weight"], before)


@pytest.mark.parametrize("hidden", [256, 192, 172, 170, 512, 300])
def test_the_feed_forward_may_have_any_hidden_size_from_8_thirds_on(
    reference: Callable[[str], Any], hidden: int
) -> None:
    def resized(key: str, tensor: Tensor) -> Tensor:
        if "feed_forward" not in key:
            return tensor
        if key.endswith("w2.weight"):
            return F.pad(tensor, (0, max(0, hidden - 256)))[:, :hidden]
        return F.pad(tensor, (0, 0, 0, max(0, hidden - 256)))[:hidden]

    weights = {key: resized(key, tensor) for key, tensor in reference("nar_t2i").weights.items()}
    model = load_official_nar(weights, grid=(5, 5), n_head=4)
    assert model.config.hidden == hidden
    if hidden == 256:
        assert model.config.ffn_multiple == 256


def test_a_feed_forward_narrower_than_any_is_refused(reference: Callable[[str], Any]) -> None:
    weights = {
        key: tensor[:169] if key.endswith(("w1.weight", "w3.weight")) else tensor
        for key, tensor in reference("nar_t2i").weights.items()
    }
    with pytest.raises(
        ValueError, match=r"feed_forward\.w1 has 169 rows; a feed-forward of width 64 has at least 170"
    ) as error:
        load_official_nar(weights, grid=(5, 5), n_head=4)
    assert "layers.3.feed_forward.w3.weight is (169, 64)" in str(error.value)


def test_grouped_key_value_heads_are_checked_and_the_fitting_number_is_named(reference: Callable[[str], Any]) -> None:
    weights = with_grouped_heads(reference("nar_c2i").weights, n_head=4, n_kv_head=2)
    model = load_official_nar(weights, grid=(4, 4), n_head=4, n_kv_head=2)
    assert model.config.n_kv_head == 2
    assert load_official_nar(reference("nar_c2i").weights, grid=(4, 4), n_head=4, n_kv_head=4).config.n_kv_head is None
    weights["other"] = torch.zeros(1)
    for given, message in (
        ({}, "attention.wqkv has 96 rows, which are not those of width 48 with n_head 4; give n_kv_head 2; unexpected other"),
        ({"n_kv_head": 1}, "with n_head 4 and n_kv_head 1; give n_kv_head 2; unexpected other"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit") as error:
            load_official_nar(weights, grid=(4, 4), n_head=4, **given)
        assert str(error.value).endswith(message)
    with pytest.raises(
        ValueError, match=r"with n_head 2; give the model's n_head; layers\.0\.attention\.wqkv\.weight is"
    ):
        load_official_nar(with_grouped_heads(reference("nar_t2i").weights, 4, 1), grid=(5, 5), n_head=2)


@pytest.mark.parametrize(("n_head", "message"), [(5, "width 48 is not divisible by n_head 5"), (0, "n_head is 0")])
def test_a_number_of_heads_that_cannot_be_is_refused(
    reference: Callable[[str], Any], n_head: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_official_nar(reference("nar_c2i").weights, grid=(4, 4), n_head=n_head)


def test_every_key_that_does_not_fit_is_listed_under_its_published_name(reference: Callable[[str], Any]) -> None:
    weights = reference("nar_c2i").weights
    del weights["layers.1.ffn_norm.weight"], weights["norm.weight"], weights["medusa_output.weight"]
    del weights["tok_embeddings.weight"], weights["layers.0.attention.wqkv.weight"]
    weights["layers.0.attention.wq.weight"] = torch.zeros(3)
    weights["head_of_another_model"] = torch.zeros(1)
    weights["layers.2.feed_forward.w2.weight"] = torch.zeros(7, 5)
    weights["cls_embedding.embedding_table.weight"] = torch.zeros(11)
    weights["layers.0.feed_forward.w1.weight"] = torch.zeros(9, 48)
    weights["layers.1.attention.wo.weight"] = torch.zeros(48, 48, dtype=torch.int8)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_nar(weights, grid=(4, 4), n_head=4)
    assert set(str(error.value).removeprefix("published weights do not fit: ").split("; ")) == {
        "missing layers.1.ffn_norm.weight",
        "missing norm.weight",
        "missing medusa_output.weight",
        "missing tok_embeddings.weight",
        "missing layers.0.attention.wqkv.weight",
        "unexpected layers.0.attention.wq.weight",
        "unexpected head_of_another_model",
        "layers.2.feed_forward.w2.weight is (7, 5), expected (48, 256)",
        "cls_embedding.embedding_table.weight is (11,), expected (1001, 48)",
        "layers.0.feed_forward.w1.weight is (9, 48), expected (256, 48)",
        "layers.1.attention.wo.weight is torch.int8, expected floating-point numbers",
    }


@pytest.mark.parametrize("name", GRIDS)
def test_any_missing_or_misshapen_key_is_named(reference: Callable[[str], Any], name: str) -> None:
    weights = reference(name).weights
    for key, tensor in weights.items():
        if key.startswith("layers.") and not key.startswith("layers.0."):
            continue
        rest = {other: t for other, t in weights.items() if other != key}
        with pytest.raises(ValueError, match=rf"^published weights do not fit: missing {key}$"):
            load_official_nar(rest, grid=GRIDS[name], n_head=4)
        shape = (2, *tensor.shape)
        with pytest.raises(ValueError, match="do not fit") as error:
            load_official_nar(rest | {key: torch.zeros(shape)}, grid=GRIDS[name], n_head=4)
        assert f"{key} is {shape}, expected " in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tok_embeddings.weight", r"tok_embeddings\.weight is \(95, 64\), expected \(96, 64\)"),
        ("medusa_output.weight", r"medusa_output\.weight is \(95, 64\), expected \(96, 64\)"),
        ("layers.0.attention.wqkv.weight", r"layers\.0\.attention\.wqkv\.weight is \(191, 64\), expected \(192, 64\)"),
        ("layers.2.feed_forward.w1.weight", r"layers\.2\.feed_forward\.w1\.weight is \(255, 64\), expected \(256, 64\)"),
        ("cls_embedding.cap_proj.fc1.weight", r"cls_embedding\.cap_proj\.fc1\.weight is \(63, 24\), expected \(64, 24\)"),
    ],
)  # fmt: skip
def test_one_key_that_differs_from_all_others_is_the_one_that_is_named(
    reference: Callable[[str], Any], key: str, message: str
) -> None:
    weights = reference("nar_t2i").weights
    weights[key] = weights[key][:-1]
    with pytest.raises(ValueError, match=rf"^published weights do not fit: {message}$"):
        load_official_nar(weights, grid=(5, 5), n_head=4)


def test_blocks_that_are_missing_altogether_are_named(reference: Callable[[str], Any]) -> None:
    weights = reference("nar_c2i").weights
    first = {key: t for key, t in weights.items() if not key.startswith(("layers.1.", "layers.2."))}
    with pytest.raises(ValueError, match=r"missing layers\.1\.attention\.wqkv\.weight"):
        load_official_nar(first, grid=(4, 4), n_head=4)
    with pytest.raises(ValueError, match=r"not the weights of a NAR model: no layers"):
        load_official_nar({key: t for key, t in first.items() if "layers" not in key}, grid=(4, 4), n_head=4)


def test_tables_and_caches_that_published_files_carry_are_no_weights(reference: Callable[[str], Any]) -> None:
    weights = reference("nar_t2i").weights
    carried = ("freqs_cis", "causal_mask", "diagonal_mask")
    caches = ("layers.0.attention.kv_cache.k_cache", "layers.3.attention.kv_cache.v_cache")
    for key in (*carried, *caches):
        weights[key] = torch.zeros(3, 2)
    load_official_nar(weights, grid=(5, 5), n_head=4)
    load_official_llamagen(raster_weights(weights) | {key: torch.zeros(1) for key in carried}, grid=(5, 5), n_head=4)
    weights |= {"layers.0.attention.kv_cache.weight": torch.zeros(1), "freqs_cis.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_nar(weights, grid=(5, 5), n_head=4)
    assert str(error.value).count("unexpected") == 2


def test_weights_of_something_else_are_refused(reference: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"NAR model: no tok_embeddings.weight; the first keys are conv.bias"):
        load_official_nar({"conv.bias": torch.zeros(2)}, grid=(4, 4), n_head=4)
    with pytest.raises(ValueError, match=r"not the weights of a LlamaGen model: no layers; the first keys are tok"):
        load_official_llamagen({"tok_embeddings.weight": torch.zeros(2, 2)}, grid=(4, 4), n_head=4)


def test_a_grid_of_another_number_of_axes_is_refused(reference: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"missing abs_pe; .*missing norm_R.weight; .*unexpected medusa_output.weight"):
        load_official_nar(reference("nar_c2i").weights, grid=(2, 2, 4), n_head=4)
    with pytest.raises(ValueError, match=r"abs_pe is \(1, 25, 48\), expected \(1, 17, 48\)"):
        load_official_nar(reference("nar_video").weights, grid=(2, 2, 4), n_head=4)
    with pytest.raises(ValueError, match="two axes for images or three for video"):
        load_official_nar(reference("nar_c2i").weights, grid=(16,), n_head=4)


# Raster: against a straightforward computation of LlamaGen, since there are no reference inputs of it


def llamagen_logits(
    weights: dict[str, Tensor], grid: tuple[int, int], n_head: int, prefix_BPC: Tensor, real_BP: Tensor, tokens: Tensor
) -> Tensor:
    """Logits of the token after each position from the last of the prefix on, [B, 1 + tokens, V], by the definition."""
    x = torch.cat([prefix_BPC, weights["tok_embeddings.weight"][tokens]], dim=1)
    batch, length, width = x.shape
    prefix, head_dim = prefix_BPC.shape[1], width // n_head
    kv_heads = (weights["layers.0.attention.wqkv.weight"].shape[0] - width) // head_dim // 2
    allowed = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1)
    allowed[:, :, :prefix] &= real_BP[:, None]
    allowed |= torch.eye(length, dtype=torch.bool)
    factors = torch.zeros(length, head_dim // 2, dtype=torch.complex64)  # of the prefix: zero, as published
    for n in range(length - prefix):
        for pair in range(head_dim // 2):
            quarter = head_dim // 4
            coordinate = divmod(n, grid[1])[0 if pair < quarter else 1]
            angle = coordinate * 10000 ** (-2 * (pair % quarter) / (head_dim // 2))
            factors[prefix + n, pair] = complex(math.cos(angle), math.sin(angle))

    def turned(v_BLHE: Tensor) -> Tensor:
        pairs = torch.view_as_complex(v_BLHE.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * factors[:, None]).flatten(-2)

    def norm(h: Tensor, name: str) -> Tensor:
        return h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]

    for n in range(1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))):
        wqkv = weights[f"layers.{n}.attention.wqkv.weight"]
        qkv = (norm(x, f"layers.{n}.attention_norm") @ wqkv.T).unflatten(-1, (-1, head_dim))
        q, k, v = qkv[:, :, :n_head], qkv[:, :, n_head : n_head + kv_heads], qkv[:, :, n_head + kv_heads :]
        k, v = (t.repeat_interleave(n_head // kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", turned(q), turned(k)) / math.sqrt(head_dim)
        shares = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        x = x + torch.einsum("bhqk,bkhe->bqhe", shares, v).flatten(2) @ weights[f"layers.{n}.attention.wo.weight"].T
        y = norm(x, f"layers.{n}.ffn_norm")
        w1, w2, w3 = (weights[f"layers.{n}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        x = x + (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    return norm(x, "norm")[:, prefix - 1 :] @ weights["output.weight"].T


def llamagen_prefix(weights: dict[str, Tensor], condition: Tensor, dropped: bool) -> Tensor:
    """Prefix embeddings [B, P, C] of caption states or labels, or those of no condition."""
    if condition.ndim == 1:
        table = weights["cls_embedding.embedding_table.weight"]
        return table[torch.full_like(condition, len(table) - 1) if dropped else condition][:, None]
    states = weights["cls_embedding.uncond_embedding"].expand_as(condition) if dropped else condition
    hidden = F.gelu(states @ weights["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return hidden @ weights["cls_embedding.cap_proj.fc2.weight"].T


@pytest.mark.parametrize("n_kv_head", [None, 2])
@pytest.mark.parametrize(
    ("name", "grid"), [("nar_t2i", (5, 5)), ("nar_c2i", (4, 4)), ("nar_c2i", (2, 8)), ("nar_c2i", (8, 2))]
)
def test_a_raster_models_logits_loss_and_greedy_tokens_are_llamagens(
    reference: Callable[[str], Any], name: str, grid: tuple[int, int], n_kv_head: int | None
) -> None:
    fixture = reference(name)
    weights = raster_weights(fixture.weights)
    if n_kv_head is not None:
        weights = with_grouped_heads(weights, 4, n_kv_head)
    model = load_official_llamagen(weights, grid=grid, n_head=4, n_kv_head=n_kv_head)
    assert (model.config.order, model.config.n_layer) == ("raster", fixture.config["n_layer"])
    tokens, condition = fixture.tensors["in.tokens"], fixture.condition
    prefixes = [llamagen_prefix(weights, condition, dropped) for dropped in (False, True)]
    real = torch.ones(prefixes[0].shape[:2], dtype=torch.bool) if fixture.mask is None else fixture.mask
    with torch.no_grad():
        expected = llamagen_logits(weights, grid, 4, prefixes[0], real, tokens[:, :-1])
        logits = model.logits(tokens, condition, fixture.mask)
        loss = model(tokens, condition, fixture.mask)
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 2e-5
    assert abs(float(loss - F.cross_entropy(expected.flatten(0, 1), tokens.flatten()))) <= 1e-5
    for scale in (1.0, 3.0):
        drawn = generate(model, condition, fixture.mask, guidance_scale=scale, temperature=0).flatten(1)
        cond, uncond = (llamagen_logits(weights, grid, 4, p, real, drawn[:, :-1]) for p in prefixes)
        # Causal: each token is the likeliest after those before it.
        assert torch.equal((uncond + scale * (cond - uncond)).argmax(-1), drawn), scale


def test_a_raster_models_keys_are_checked(reference: Callable[[str], Any]) -> None:
    weights = raster_weights(reference("nar_c2i").weights)
    del weights["norm.weight"]
    weights["layers.0.feed_forward.w3.weight"] = torch.zeros(2, 2)
    weights["ema"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_official_llamagen(weights, grid=(4, 4), n_head=4)
    assert str(error.value).removeprefix("published weights do not fit: ").split("; ") == [
        "missing norm.weight",
        "unexpected ema",
        "layers.0.feed_forward.w3.weight is (2, 2), expected (256, 48)",
    ]
    with pytest.raises(ValueError, match=r"grid \(2, 2, 4\) fits no published raster model"):
        load_official_llamagen(weights, grid=(2, 2, 4), n_head=4)


@pytest.mark.parametrize("grid", [(5, 5), (1, 5, 5)])
def test_each_kind_of_weights_is_recognised_and_the_way_to_open_it_is_named(
    reference: Callable[[str], Any], grid: tuple[int, ...]
) -> None:
    weights = raster_weights(reference("nar_t2i").weights)
    with pytest.raises(
        ValueError, match=r"raster autoregressive model \(LlamaGen\).*load_official_llamagen.*warm_start=True"
    ):
        load_official_nar(weights, grid=grid, n_head=4)
    for name in GRIDS:
        weights = reference(name).weights
        with pytest.raises(ValueError, match=r"weights of a NAR model, .* open them with load_official_nar"):
            load_official_llamagen(weights, grid=GRIDS[name], n_head=4)
        with pytest.raises(ValueError, match=r"weights of a NAR model, .* open them with load_official_nar"):
            load_official_nar(weights, grid=GRIDS[name], n_head=4, warm_start=True)
    # A NAR file that lacks a key is none of LlamaGen's.
    for key in ("medusa_norm.weight", "medusa_output.weight"):
        weights = reference("nar_t2i").weights
        del weights[key]
        with pytest.raises(ValueError, match=f"missing {key}"):
            load_official_nar(weights, grid=(5, 5), n_head=4)


# Warm start


@pytest.mark.parametrize("name", ["nar_t2i", "nar_c2i"])
def test_a_warm_start_keeps_the_raster_model_and_adds_a_block_that_passes_on_and_a_head_that_says_the_same(
    reference: Callable[[str], Any], name: str
) -> None:
    weights = raster_weights(reference(name).weights)
    model = load_official_nar(weights, grid=GRIDS[name], n_head=4, warm_start=True)
    raster = load_official_llamagen(weights, grid=GRIDS[name], n_head=4)
    config = model.config
    assert (config.order, config.n_layer, len(model.blocks)) == ("neighbor", len(raster.blocks), len(raster.blocks) + 1)
    assert (config.prefix_rotary, config.uncond_embedding) == ("zero", "frozen")
    assert not model.training
    own = model.state_dict()
    kept = {key: tensor for key, tensor in raster.state_dict().items() if not key.startswith("heads.")}
    assert all(torch.equal(own[key], tensor) for key, tensor in kept.items())
    for axis in range(2):
        assert torch.equal(own["heads.weight"][:, axis], weights["output.weight"])
        assert torch.equal(own[f"heads.norms.{axis}.weight"], weights["norm.weight"])
    states = torch.randn(2, 7, config.width)
    assert torch.equal(model.blocks[-1](states, None, None), states)
    # Each block and head learns for itself.
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_every_weight_of_a_warm_start_learns_by_the_second_step(reference: Callable[[str], Any]) -> None:
    fixture = reference("nar_c2i")
    model = load_official_nar(raster_weights(fixture.weights), grid=(4, 4), n_head=4, warm_start=True)
    labels = torch.tensor([0, 3, 10])  # with the row for no class
    for _ in range(2):
        model.zero_grad()
        model(fixture.tensors["in.tokens"], labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
