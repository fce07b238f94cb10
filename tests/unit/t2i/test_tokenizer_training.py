import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.images import center_crop_resize, open_rgb
from t2i.tokenizer_config import TokenizerTraining
from t2i.tokenizer_training import TokenizerTrainer, kmeans, train_tokenizer
from t2i.vq import VQConfig, VQModel, images_to_tensor

SMALL = VQConfig(
    base_channels=8, channel_multipliers=(1, 2, 2), n_res_blocks=1, z_channels=8, codebook_size=16, codebook_dim=4,
    norm_groups=4,
)  # fmt: skip


def settings(raw: Path, out: Path, **changes: Any) -> TokenizerTraining:
    fields: dict[str, Any] = {
        "data": raw, "out": out, "image_size": 16, "model": SMALL, "steps": 12, "batch": 8, "warmup_steps": 2,
        "train_encoder": True, "unquantized_steps": 3, "revive_every": 2, "validation": 16, "lanes": 4, "save_every": 4,
    }  # fmt: skip
    return TokenizerTraining(**fields | changes)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "state.pt", weights_only=True)["model"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(raw_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(settings(raw_shapes, out), progress=False)
    return out


def read_images(samples: Sequence[Any]) -> torch.Tensor:
    return images_to_tensor([center_crop_resize(open_rgb(s.image), 16) for s in samples])


def test_a_finished_training_leaves_a_tokenizer_and_its_numbers(uninterrupted: Path) -> None:
    vq = VQModel.from_folder(uninterrupted)
    assert vq.config == SMALL
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["steps"] == 12
    assert result["psnr"] > 5
    assert 0 < result["codebook_use"] <= 1
    assert 1 <= result["perplexity"] <= 16
    assert (uninterrupted / "preview.png").is_file()
    assert [row["step"] for row in rows(uninterrupted) if "l1" in row] == list(range(1, 13))
    assert [row["step"] for row in rows(uninterrupted) if "psnr" in row] == [4, 8, 12]


@pytest.mark.parametrize("killed_at", [3, 6, 10], ids=["at the codebook's start", "between saves", "after a revival"])
def test_a_killed_training_goes_on_exactly(
    raw_shapes: Path, tmp_path: Path, uninterrupted: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(raw_shapes, tmp_path)
    step = TokenizerTrainer.train_step

    def killed(trainer: TokenizerTrainer, images: torch.Tensor) -> dict[str, float]:
        if trainer.step == killed_at:
            raise KeyboardInterrupt
        return step(trainer, images)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(config, progress=False)
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 11, "l1": 0.')  # a line that was cut off
    train_tokenizer(config, progress=False)
    assert_same(weights(tmp_path), weights(uninterrupted))
    assert rows(tmp_path) == rows(uninterrupted)


def test_running_a_finished_training_again_changes_nothing(raw_shapes: Path, uninterrupted: Path) -> None:
    before, history = weights(uninterrupted), rows(uninterrupted)
    train_tokenizer(settings(raw_shapes, uninterrupted), progress=False)
    assert rows(uninterrupted) == history
    assert_same(weights(uninterrupted), before)


def test_other_settings_in_the_same_folder_are_refused(raw_shapes: Path, uninterrupted: Path) -> None:
    changed = settings(raw_shapes, uninterrupted, lr=1e-3, seed=4)
    with pytest.raises(ValueError, match=r"other settings \(lr, seed\)"):
        train_tokenizer(changed, progress=False)


def test_loss_goes_down(raw_shapes: Path, tmp_path: Path) -> None:
    config = settings(raw_shapes, tmp_path, steps=40, unquantized_steps=15, save_every=40, lr=5e-3)
    train_tokenizer(config, progress=False)
    losses = [row["l1"] for row in rows(tmp_path) if "l1" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("learns", [False, True])
def test_the_encoder_learns_only_where_it_is_told_to(raw_shapes: Path, tmp_path: Path, learns: bool) -> None:
    trainer = TokenizerTrainer(settings(raw_shapes, tmp_path, train_encoder=learns, unquantized_steps=0), read_images)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train_step(read_images([trainer.shards.read_raw(i) for i in range(8)]))
    changed = {
        name.split(".")[0] for name, weight in trainer.model.state_dict().items() if not weight.equal(before[name])
    }
    assert changed == {"decoder", "post_quant_conv", "quantize"} | ({"encoder", "quant_conv"} if learns else set())


def test_k_means_gives_a_centre_to_what_is_rare() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(12, 32, generator=generator), dim=1)
    numbers = torch.cat([torch.zeros(5000, dtype=torch.long), torch.arange(1, 12).repeat_interleave(3)])
    points = F.normalize(directions[numbers] + 0.002 * torch.randn(len(numbers), 32, generator=generator), dim=1)
    for seed in range(5):
        centres = kmeans(points, 16, torch.Generator().manual_seed(seed))
        assert (directions @ centres.T).amax(1).min() > 0.98


def test_revival_puts_unused_codes_to_use(raw_shapes: Path, tmp_path: Path) -> None:
    trainer = TokenizerTrainer(settings(raw_shapes, tmp_path), read_images)
    images = read_images([trainer.shards.read_raw(i) for i in range(16)])
    trainer.step = trainer.config.unquantized_steps
    trainer.train_step(images)  # so that the optimizer has moments of the codes
    with torch.no_grad():
        # One code takes everything: among equal ones, the first.
        trainer.model.quantize.embedding.weight[:] = trainer.model.features(images)[0, :, 0, 0]
        trainer.usage_K.zero_()
        trainer.losses(images)
    assert int((trainer.usage_K > 0).sum()) == 1
    moment = trainer.optimizer.state[trainer.model.quantize.embedding.weight]["exp_avg"]
    moment.fill_(1.0)
    assert trainer.revive(images) == 15
    assert not trainer.usage_K.any()
    assert [bool(row.any()) for row in moment] == [code == 0 for code in range(16)]
    with torch.no_grad():
        trainer.losses(images)
    assert int((trainer.usage_K > 0).sum()) > 8
    assert trainer.revive(images) < 8


def test_codes_that_are_all_in_use_stay_where_they_are(raw_shapes: Path, tmp_path: Path) -> None:
    trainer = TokenizerTrainer(settings(raw_shapes, tmp_path), read_images)
    before = trainer.model.quantize.embedding.weight.detach().clone()
    trainer.usage_K.fill_(1)
    assert trainer.revive(read_images([trainer.shards.read_raw(0)])) == 0
    assert torch.equal(trainer.model.quantize.embedding.weight, before)


def test_learning_rate_warms_up_and_ends_near_zero(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, steps=100, warmup_steps=10, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[10] == pytest.approx(1.0)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"revive_every": 0}, "revive_every is 0"),
        ({"validation": 0}, "validation is 0"),
        ({"unquantized_steps": 12}, "12 unquantized steps leave none of 12"),
        ({"image_size": 18}, "18 is not a multiple of the stride 4"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **changes)


def test_a_set_that_is_too_small_or_a_batch_off_the_lanes_is_refused(raw_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 96 samples and 96 are kept for validation"):
        train_tokenizer(settings(raw_shapes, tmp_path / "a", validation=96), progress=False)
    with pytest.raises(ValueError, match="global batch 8 is not divisible by 5 lanes"):
        train_tokenizer(settings(raw_shapes, tmp_path / "b", lanes=5), progress=False)


def test_kmeans_finds_clusters_and_gives_unit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(6, 8, generator=generator), dim=1)
    points = F.normalize(truth.repeat_interleave(50, 0) + 0.05 * torch.randn(300, 8, generator=generator), dim=1)
    centres = kmeans(points, 24, torch.Generator().manual_seed(1))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(24))
    assert float((truth @ centres.T).amax(1).min()) > 0.98  # every cluster has a centre
    assert torch.equal(centres, kmeans(points, 24, torch.Generator().manual_seed(1)))


def test_kmeans_with_fewer_points_than_codes_uses_them_all() -> None:
    points = F.normalize(torch.randn(5, 3), dim=1)
    centres = kmeans(points, 12, torch.Generator().manual_seed(0))
    assert centres.shape == (12, 3)
    torch.testing.assert_close((points @ centres.T).amax(1), torch.ones(5))


def test_training_twice_from_one_seed_gives_one_tokenizer(
    raw_shapes: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    config = replace(settings(raw_shapes, uninterrupted), out=tmp_path)
    train_tokenizer(config, progress=False)
    assert_same(weights(tmp_path), weights(uninterrupted))


def test_an_encoded_set_is_refused(encoded_shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is encoded and holds no pictures; give the raw set"):
        train_tokenizer(settings(encoded_shapes, tmp_path), progress=False)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04 cut off"])
def test_a_damaged_state_is_refused(raw_shapes: Path, uninterrupted: Path, tmp_path: Path, data: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "training.json").write_text(
        (uninterrupted / "training.json").read_text().replace(str(uninterrupted), str(out))
    )
    (out / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]*state\.pt is damaged \([^\n]*\); remove it to start again$"):
        train_tokenizer(settings(raw_shapes, out), progress=False)
    (out / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training\.json is not JSON"):
        train_tokenizer(settings(raw_shapes, out), progress=False)
