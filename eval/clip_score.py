"""CLIPScore: how well pictures fit their prompts, by the cosine of CLIP's embeddings of both.

    clip = Clip(find_clip("ViT-L-14", "openai"), device)
    texts = clip.embed_texts(prompts)
    scores = clip_scores(cosines_K, prompt_of_K)

Two numbers of the same cosines, since both are reported under one name:

- `clip_score`: 2.5 · max(cos, 0), as published (Hessel et al. 2021, arXiv 2104.08718, with ViT-B/32 and the words "A photo
  depicts " before each caption);
- `cosine_x100`: 100 · cos, as torchmetrics and most text-to-image papers have it (no words before the caption).

The interval is a bootstrap over prompts, because pictures of one prompt are not independent.

Shape suffixes: N texts, K pictures, P prompts, D features, R bootstrap replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.geneval.clip_colors import ClipWeights, load_clip
from eval.geneval.intervals import REPLICATES, Interval, bootstrap_means, percentiles

__all__ = ["Clip", "ClipScores", "clip_scores", "mean_over_prompts"]

_COUNTS = 2**23
"""Numbers of a table of bootstrap draws, at most: with all replicates of 30,000 prompts at once it would take 2.4 GB."""


@dataclass(frozen=True)
class ClipScores:
    """Means over pictures with their 95% intervals over prompts."""

    clip_score: Interval
    cosine_x100: Interval
    prompts: int
    pictures: int


class Clip:
    """CLIP's unit-length embeddings of pictures and texts; an `eval.embedding.Network`."""

    def __init__(self, weights: ClipWeights, device: torch.device | str = "cpu", prefix: str = "") -> None:
        """Load the model, in float32; `prefix` is put before each text.

        Raises ValueError where the files are damaged or are not of that architecture.
        """
        self.weights, self.device, self.prefix = weights, torch.device(device), prefix
        self._model, self._preprocess, self._tokenizer = load_clip(weights)
        self._model.to(self.device).eval()

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture scaled, cropped to its centre and normalised, as the model's weights want it."""
        return self._preprocess(image)

    def embed(self, batch: Tensor) -> Tensor:
        """Embeddings [N, D] of prepared pictures."""
        return F.normalize(self._model.encode_image(batch.to(self.device)), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64, progress: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, float32 [N, D]; those that are too long are cut, see `cut`."""
        batches: list[Tensor] = []
        with tqdm(total=len(texts), desc="embed prompts", unit="prompt", disable=not progress) as bar:
            for start in range(0, len(texts), batch_size):
                ids = self._tokens(texts[start : start + batch_size]).to(self.device)
                batches.append(F.normalize(self._model.encode_text(ids), dim=-1).float().cpu())
                bar.update(len(ids))
        return torch.cat(batches).numpy()

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Which texts are longer than the model takes: of these, it sees only the beginning."""
        # With room for one token more, that token is padding, as in an empty text, unless the text goes on.
        room = self._tokenizer.context_length + 1
        padding = int(self._tokenizer([""], context_length=room)[0, -1])
        return [n for n, text in enumerate(texts) if int(self._tokens([text], room)[0, -1]) != padding]

    def _tokens(self, texts: Sequence[str], room: int | None = None) -> Tensor:
        return self._tokenizer([self.prefix + text for text in texts], context_length=room)


def clip_scores(cosines_K: NDArray[np.floating], prompt_of_K: Sequence[int], seed: int = 0) -> ClipScores:
    """Scores of pictures from the cosine of each with its prompt, -1..1, and the number of its prompt."""
    cosines = np.asarray(cosines_K, dtype=np.float64)
    return ClipScores(
        clip_score=mean_over_prompts(2.5 * cosines.clip(min=0), prompt_of_K, seed),
        cosine_x100=mean_over_prompts(100 * cosines, prompt_of_K, seed),
        prompts=len(set(prompt_of_K)),
        pictures=len(cosines),
    )


def mean_over_prompts(
    values_K: NDArray[np.float64], prompt_of_K: Sequence[int], seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """The mean over pictures, with the 95% percentile interval of a bootstrap over prompts."""
    assert len(values_K) == len(prompt_of_K) > 0
    _, prompt_K = np.unique(np.asarray(prompt_of_K), return_inverse=True)
    totals_P = np.bincount(prompt_K, weights=values_K).astype(np.float64)
    pictures_P = np.bincount(prompt_K).astype(np.float64)
    rng = np.random.default_rng(seed)
    step = max(1, _COUNTS // len(totals_P))
    means_R = np.concatenate(
        [
            bootstrap_means(totals_P, pictures_P, rng, min(step, replicates - start))
            for start in range(0, replicates, step)
        ]
    )
    return percentiles(float(values_K.mean()), means_R)
