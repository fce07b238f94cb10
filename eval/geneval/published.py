"""Published GenEval scores, for comparison: the share of right pictures over GenEval's own 553 prompts.

A figure that was not published is None. Sources: GenEval (Ghosh et al. 2023, arXiv 2310.11513) for Stable Diffusion; the
others as they are compared in NAR (arXiv 2503.10696).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.geneval_text import TAGS

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True)
class Published:
    """One model's published scores: task or 'overall' -> score, None where there is none."""

    name: str
    scores: Mapping[str, float | None]


def _row(name: str, *scores: float | None) -> Published:
    return Published(name, dict(zip((*TAGS, "overall"), scores, strict=True)))


PUBLISHED: tuple[Published, ...] = (
    _row("SD v1.5", 0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43),
    _row("SD v2.1", 0.98, 0.51, 0.44, 0.85, 0.07, 0.17, 0.50),
    _row("SDXL", 0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55),
    _row("LlamaGen-XL", 0.71, 0.34, 0.21, 0.58, 0.07, 0.04, 0.32),
    _row("NAR-XL", 0.98, 0.37, 0.34, 0.76, None, None, 0.43),
    _row("Chameleon-7B", None, None, None, None, None, None, 0.39),
)
"""In the tasks' order: single object, two objects, counting, colours, position, colour attribution; then overall."""
