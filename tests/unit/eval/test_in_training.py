from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.geneval_text import TAGS
from eval.in_training import first_of_each_task, geneval_judge
from t2i.config import EvalConfig
from t2i.pipeline import TextToImagePipeline


@pytest.fixture(scope="module")
def pipe(make_export: Callable[..., Path]) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(make_export())


def test_scores_by_the_shapes_judge_are_the_same_each_time(pipe: TextToImagePipeline) -> None:
    judge = geneval_judge(EvalConfig(per_task=2), seed=3)
    scores = judge(pipe)
    assert list(scores) == [*(f"geneval_shapes/{tag}" for tag in TAGS), "geneval_shapes/overall"]
    assert all(0 <= score <= 1 for score in scores.values())
    assert judge(pipe) == scores


def test_scores_by_genevals_judge(pipe: TextToImagePipeline, small_detector: Path, small_clip: Path) -> None:
    config = EvalConfig(judge="mask2former", per_task=1, detector=str(small_detector), clip=f"local-dir:{small_clip}")
    scores = geneval_judge(config, seed=3, device="cpu")(pipe)
    assert list(scores) == [*(f"geneval/{tag}" for tag in TAGS), "geneval/overall"]


def test_missing_weights_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="detector"):
        geneval_judge(EvalConfig(judge="mask2former", detector=str(tmp_path / "none")), seed=0)


def test_the_first_prompts_of_each_task_are_taken_in_order() -> None:
    entries = [{"tag": tag, "number": number} for number in range(3) for tag in reversed(TAGS)]
    few = first_of_each_task(entries, 2)
    assert [(entry["tag"], entry["number"]) for entry in few] == [(tag, number) for tag in TAGS for number in (0, 1)]
