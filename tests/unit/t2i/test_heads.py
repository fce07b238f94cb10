import pytest
import torch
import torch.nn.functional as F
from small_models import small_config

from t2i.heads import AxisHeads
from t2i.wavefronts import head_weights

CONFIG = small_config((3, 4))


def test_heads_are_the_weighted_mean_of_their_own_logits() -> None:
    heads = AxisHeads(CONFIG)
    torch.nn.init.normal_(heads.weight)
    hidden = [torch.randn(2, 12, 16) for _ in range(2)]
    weights = head_weights(CONFIG.grid)
    separate = torch.stack(
        [F.linear(n(h), w) for n, h, w in zip(heads.norms, hidden, heads.weight.unbind(1), strict=True)]
    )
    torch.testing.assert_close(heads(hidden, weights), (separate * weights.T[:, None, :, None]).sum(0))


def test_heads_that_start_from_codes_are_alike_where_codes_are() -> None:
    torch.manual_seed(0)
    codes = F.normalize(torch.randn(16, 8), dim=1)
    codes[1] = codes[0]
    codes[:, 0] *= 20  # one direction that outweighs all others must not be all that the heads see
    heads = AxisHeads(small_config((3, 4), vocab_size=16, width=256, init_std=0.05), codes).weight.detach().unbind(1)
    assert len(heads) == 2
    assert not torch.equal(heads[0], heads[1])
    centred = codes - codes.mean(0)
    whitened = torch.linalg.svd(centred, full_matrices=False)[0]
    expected = F.cosine_similarity(whitened[:, None], whitened[None], dim=-1)
    for weight in heads:
        assert weight.std().item() == pytest.approx(0.2, rel=0.05)
        similarity = F.cosine_similarity(weight[:, None], weight[None], dim=-1)
        assert similarity[0, 1] > 0.999
        assert torch.corrcoef(torch.stack([similarity.flatten(), expected.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_in_parts_is_cross_entropy_with_its_gradients(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i.heads.LOSS_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    heads = AxisHeads(CONFIG).to(dtype)
    torch.nn.init.normal_(heads.weight, generator=generator)
    hidden = [torch.randn(2, 12, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    targets = torch.randint(11, (2, 12), generator=generator)
    weights = head_weights(CONFIG.grid)
    results = []
    for whole in (True, False):
        heads.zero_grad()
        for h in hidden:
            h.grad = None
        if whole:
            loss = F.cross_entropy(heads(hidden, weights).float().flatten(0, 1), targets.flatten())
        else:
            loss = heads(hidden, weights, targets)
        (3 * loss).backward()
        gradients = [h.grad for h in hidden] + [p.grad for p in heads.parameters()]
        assert all(g is not None and g.dtype == dtype for g in gradients)
        results.append([loss.detach(), *gradients])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(heads(hidden, weights, targets), results[0][0], **tolerance)


def test_loss_with_a_part_of_the_gradients() -> None:
    heads = AxisHeads(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(heads.weight)
    hidden = [torch.randn(1, 12, 16, requires_grad=True) for _ in range(2)]
    heads(hidden, head_weights(CONFIG.grid), torch.zeros(1, 12, dtype=torch.int64)).backward()
    assert all(h.grad is not None and h.grad.any() for h in hidden)
