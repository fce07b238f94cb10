"""Train the image tokenizer on an indexed set of image-text tars.

    t2i tokenizer train --data data/shapes-tokenizer --out tokenizers/shapes

Single process. The codebook starts from k-means over encoder outputs, and codes that fall out of use are moved onto
encoder outputs. An encoder that learns should first take some steps without quantisation, so that its outputs mean
something. Resumes from `state.pt` in the output folder by itself. Losses: mean absolute and mean squared
error of pixels, and the codebook and commitment terms of VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937, eq. 3).

Shape suffixes: B batch, C channels, D code dimension, H W picture, h w tokens, K codes, N positions (B·h·w).
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipeline.images import center_crop_resize, open_rgb
from data_pipeline.index import RawSample, ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder
from t2i.devices import choose_device
from t2i.files import read_json
from t2i.metrics import Rows
from t2i.tokenizer_config import TokenizerTraining
from t2i.vq import VQModel, images_to_tensor, tensor_to_images

KMEANS_TRIALS = 8  # about 2 + ln(k) for some hundreds of codes


def kmeans(points_ND: Tensor, k: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """Spherical k-means over unit vectors [N, D] -> unit-length centres [k, D]; empty clusters restart at a point.

    Starts as k-means++ (Arthur and Vassilvitskii 2007), the greedy one: each next centre is the best of some points drawn
    by their squared distance to the centres so far, so that what is rare and different, objects on much background, gets
    centres too.
    """
    nearest_N = torch.full((len(points_ND),), 1.0)  # 1 - cosine: half the squared distance of unit vectors
    chosen = []
    for _ in range(k):
        # Fewer different points than codes: repeat some, revival spreads the rest.
        tried_T = torch.multinomial(nearest_N.clamp_min(1e-7), KMEANS_TRIALS, replacement=True, generator=generator)
        distance_NT = torch.minimum(nearest_N[:, None], 1 - points_ND @ points_ND[tried_T].T)
        best = distance_NT.sum(0).argmin()
        nearest_N = distance_NT[:, best]
        chosen.append(tried_T[best])
    centres_KD = points_ND[torch.stack(chosen)]
    for _ in range(rounds):
        nearest_N = torch.cat([(chunk @ centres_KD.T).argmax(1) for chunk in points_ND.split(8192)])
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, nearest_N, points_ND)
        empty_K = torch.bincount(nearest_N, minlength=k) == 0
        centres_KD = F.normalize(sums_KD, dim=1)
        replacement = torch.randint(len(points_ND), (int(empty_K.sum()),), generator=generator)
        centres_KD[empty_K] = points_ND[replacement]
    return centres_KD


class TokenizerTrainer:
    """One tokenizer in training: model, optimizer, code usage, and the step that they stand at."""

    def __init__(self, config: TokenizerTraining, read_images: Callable[[Sequence[RawSample]], Tensor]) -> None:
        self.config = config
        self.shards = ShardSet(config.data)
        if self.shards.manifest.kind != "raw":
            raise ValueError(f"{config.data} is encoded and holds no pictures; give the raw set that it was made from")
        if len(self.shards) <= config.validation:
            raise ValueError(
                f"{config.data} has {len(self.shards)} samples and {config.validation} are kept for validation; "
                "add samples or keep fewer"
            )
        self.read_images = read_images
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.model = VQModel(config.model).to(self.device)
        for module in (self.model.encoder, self.model.quant_conv):
            module.requires_grad_(config.train_encoder)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.usage_K = torch.zeros(config.model.codebook_size, device=self.device)
        self.step = 0
        self.seconds = 0.0

    # Saving and resuming

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "usage": self.usage_K,
            "step": self.step, "seconds": self.seconds,
        }  # fmt: skip
        temporary = self.config.out / ".state.pt.partial"
        torch.save(state, temporary)
        temporary.replace(self.config.out / "state.pt")

    def resume(self) -> bool:
        """Go on from `state.pt`, if it is there. Raises ValueError where it belongs to other settings."""
        path, settings_path = self.config.out / "state.pt", self.config.out / "training.json"
        settings = json.loads(json.dumps(asdict(self.config), default=str))
        del settings["device"]
        if not path.exists():
            self.config.out.mkdir(parents=True, exist_ok=True)
            settings_path.write_text(json.dumps(settings, indent=2))
            return False
        recorded = read_json(settings_path)
        changed = [key for key in settings if recorded.get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{self.config.out} holds a tokenizer in training with other settings ({', '.join(changed)}); "
                "choose another --out, or give the same ones"
            )
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # bytes that are no state fail in the unpickler in any way
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is damaged ({reason}); remove it to start again") from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.usage_K, self.step, self.seconds = state["usage"], state["step"], state["seconds"]
        return True

    # One step

    def _generator(self) -> torch.Generator:
        """Randomness is a function of (seed, step), so a resumed run draws what an uninterrupted one would."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)

    def start_codebook(self, loader: BatchLoader[Tensor]) -> None:
        """Set the codes to k-means centres of encoder outputs over some batches of the loader."""
        batches = max(4, math.ceil(self.config.model.codebook_size * 128 / (self.config.batch * self._tokens())))
        with torch.no_grad():
            images = (next(loader)[1].to(self.device) for _ in range(batches))
            # k-means on the processor, whose random numbers are the same everywhere.
            features = [self.model.features(batch).movedim(1, -1).flatten(0, 2).cpu() for batch in images]
            centres_KD = kmeans(torch.cat(features), self.config.model.codebook_size, self._generator())
            self.model.quantize.embedding.weight.copy_(centres_KD)
        self.usage_K.zero_()

    def _tokens(self) -> int:
        return (self.config.image_size // self.config.model.stride) ** 2

    def losses(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Losses of one batch; before the codebook starts there is no quantisation and no codebook loss."""
        features_BDhw = self.model.features(images_BCHW)
        codebook = features_BDhw.new_zeros(())
        decoded_from = features_BDhw
        if self.step >= self.config.unquantized_steps:
            indices_Bhw = self.model.nearest(features_BDhw.detach())
            self.usage_K += torch.bincount(indices_Bhw.flatten(), minlength=len(self.usage_K))
            codes_BDhw = self.model.embed(indices_Bhw)
            codebook = F.mse_loss(codes_BDhw, features_BDhw.detach()) + self.config.commitment * F.mse_loss(
                features_BDhw, codes_BDhw.detach()
            )
            decoded_from = features_BDhw + (codes_BDhw - features_BDhw).detach()  # straight-through
        decoded = self.model.decode_features(decoded_from)
        l1, l2 = F.l1_loss(decoded, images_BCHW), F.mse_loss(decoded, images_BCHW)
        return {"loss": l1 + l2 + codebook, "l1": l1, "l2": l2, "codebook": codebook}

    def revive(self, images_BCHW: Tensor) -> int:
        """Move codes that were not chosen since the last call onto encoder outputs of this batch; returns how many."""
        dead = (self.usage_K == 0).nonzero().flatten()
        self.usage_K.zero_()
        if len(dead) == 0:
            return 0
        with torch.no_grad():
            points_ND = self.model.features(images_BCHW).movedim(1, -1).flatten(0, 2)
            # Where the codebook fits worst, a new code helps most.
            error_N = 1 - (points_ND @ self.model.quantize.normalized().T).amax(1)
            count = min(len(dead), len(points_ND))
            chosen = torch.multinomial(error_N.cpu() + 1e-6, count, generator=self._generator()).to(self.device)
            self.model.quantize.embedding.weight[dead[: len(chosen)]] = points_ND[chosen]
            state = self.optimizer.state[self.model.quantize.embedding.weight]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment][dead] = 0
        return len(chosen)

    def train_step(self, images_BCHW: Tensor) -> dict[str, float]:
        lr = self.config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self.losses(images_BCHW)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        report = {name: value.item() for name, value in losses.items()}
        quantized_for = self.step - self.config.unquantized_steps
        # The last fifth is left alone, so that what is learned there is not thrown about.
        if quantized_for > 0 and quantized_for % self.config.revive_every == 0 and self.step < 0.8 * self.config.steps:
            report["revived"] = self.revive(images_BCHW)
        return report

    # Measuring

    @torch.no_grad()
    def measure(self, preview: Path | None = None) -> dict[str, float]:
        """PSNR (dB) of reconstructions and share of the codebook in use, on the validation samples."""
        self.model.eval()
        numbers = range(len(self.shards) - self.config.validation, len(self.shards))
        squared, used_K = 0.0, torch.zeros(len(self.usage_K))
        for start in range(0, len(numbers), self.config.batch):
            batch = [self.shards.read_raw(i) for i in numbers[start : start + self.config.batch]]
            images = self.read_images(batch).to(self.device)
            indices = self.model.encode(images)
            decoded = self.model.decode(indices).clamp(-1, 1)
            used_K += torch.bincount(indices.flatten().cpu(), minlength=len(used_K))
            squared += F.mse_loss(decoded, images, reduction="none").mean((1, 2, 3)).sum().item()
            if preview is not None and start == 0:
                pairs = np.stack([tensor_to_images(images[:16]), tensor_to_images(decoded[:16])])
                grid = np.concatenate([np.concatenate(list(row), axis=1) for row in pairs], axis=0)
                Image.fromarray(grid).save(preview)
        self.model.train()
        share_K = used_K / used_K.sum()
        entropy = -(share_K * share_K.clamp_min(1e-12).log()).sum().item()
        return {
            "psnr": 10 * math.log10(4 / (squared / len(numbers))),
            "codebook_use": (used_K > 0).float().mean().item(),
            "perplexity": math.exp(entropy),
        }


def train_tokenizer(config: TokenizerTraining, progress: bool = True) -> dict[str, Any]:
    """Train (or go on training) a tokenizer; writes `config.json`, `model.safetensors` (float16), `metrics.jsonl`.

    Returns the final measurements, which are also in `result.json`.
    """

    def read_images(samples: Sequence[Any]) -> Tensor:
        return images_to_tensor([center_crop_resize(open_rgb(s.image), config.image_size) for s in samples])

    trainer = TokenizerTrainer(config, read_images)
    trainer.resume()
    order = LaneOrder(0, len(trainer.shards) - config.validation, config.lanes, config.seed)
    with (
        BatchLoader(trainer.shards, order, config.batch, 0, 1, trainer.step, read_images, workers=1) as loader,
        contextlib.closing(Rows(config.out / "metrics.jsonl", trainer.step)) as metrics,
        tqdm(total=config.steps, initial=trainer.step, desc="tokenizer", unit="step", disable=not progress) as bar,
    ):
        begun = time.perf_counter() - trainer.seconds
        while trainer.step < config.steps:
            if trainer.step == config.unquantized_steps:
                # A loader of its own: the training order must not depend on what the start reads.
                with BatchLoader(trainer.shards, order, config.batch, 0, 1, 10_000_000, read_images) as extra:
                    trainer.start_codebook(extra)
            report = trainer.train_step(next(loader)[1].to(trainer.device))
            trainer.seconds = time.perf_counter() - begun
            bar.update()
            bar.set_postfix(l1=f"{report['l1']:.4f}", codebook=f"{report['codebook']:.4f}")
            metrics.add({"step": trainer.step} | report)
            if trainer.step % config.save_every == 0 or trainer.step == config.steps:
                measured = trainer.measure(config.out / "preview.png")
                metrics.add({"step": trainer.step} | measured)
                trainer.save()
                trainer.model.save(config.out, torch.float16)
    result = {"steps": trainer.step, "seconds": round(trainer.seconds), **trainer.measure(config.out / "preview.png")}
    (config.out / "result.json").write_text(json.dumps(result, indent=2))
    return result
