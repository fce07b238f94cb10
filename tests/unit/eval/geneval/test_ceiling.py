"""What the tokenizer that the package ships promises: the judge still sees on its pictures what was drawn."""

import numpy as np
import pytest
import torch

from data_pipeline import shapes
from eval.geneval.ceiling import ground_truth_pictures, reconstructed_pictures
from eval.geneval.judging import judge_pictures
from eval.geneval.shapes_judge import ShapesJudge
from eval.geneval.statistics import summarize
from t2i.vq import images_to_tensor, load_vq, tensor_to_images

pytestmark = pytest.mark.slow


@torch.inference_mode()
def test_the_shipped_tokenizer_keeps_what_was_drawn_and_uses_its_codes() -> None:
    prompts = shapes.evaluation_metadata(per_task=60)
    vq = load_vq("shapes")
    used: set[int] = set()

    def encode_decode(images: np.ndarray) -> np.ndarray:
        indices = vq.encode(images_to_tensor(images))
        used.update(indices.flatten().tolist())
        return tensor_to_images(vq.decode(indices))

    rows = judge_pictures(
        ShapesJudge(), reconstructed_pictures(prompts, 2, encode_decode), len(prompts) * 2, progress=False
    )
    assert summarize(rows).overall.per_image.value >= 0.97
    assert len(used) >= 0.9 * vq.config.codebook_size


def test_reconstructions_are_of_the_same_pictures() -> None:
    prompts = shapes.evaluation_metadata(per_task=2)
    drawn = list(ground_truth_pictures(prompts, 2))
    same = list(reconstructed_pictures(prompts, 2, lambda images: images, batch_size=5))
    assert [picture.metadata for picture in same] == [picture.metadata for picture in drawn]
    for one, other in zip(same, drawn, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
