"""How high a model can score at all: the judge on pictures that are right, and on what the tokenizer makes of them.

A judge that errs on correct pictures bounds every model's score, and so does an image tokenizer that blurs what the
judge must recognise. Both bounds stand beside the model's score, over the same prompts and as many pictures of each.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline import shapes
from eval.generate import picture_seed
from eval.geneval.judging import Picture, batched
from eval.geneval.prompts import Metadata

__all__ = ["ground_truth_pictures", "reconstructed_pictures"]

Images = NDArray[np.uint8]


def ground_truth_pictures(prompts: Sequence[Metadata], images_per_prompt: int) -> Iterator[Picture]:
    """Correct pictures of shapes prompts, `images_per_prompt` of each, drawn as they are asked for."""
    for index, metadata in enumerate(prompts):
        for number in range(images_per_prompt):
            sample = shapes.ground_truth(metadata, picture_seed(index, number))
            yield Picture(f"ground_truth/{index:05d}/{number:04d}", metadata, sample.image)


def reconstructed_pictures(
    prompts: Sequence[Metadata],
    images_per_prompt: int,
    encode_decode: Callable[[Images], Images],
    batch_size: int = 64,
) -> Iterator[Picture]:
    """The same pictures through the image tokenizer and back.

    `encode_decode` maps uint8 [B, H, W, 3] to the same, B <= `batch_size`.
    """
    for batch in batched(ground_truth_pictures(prompts, images_per_prompt), batch_size):
        images = encode_decode(np.stack([picture.image for picture in batch if picture.image is not None]))
        for picture, image in zip(batch, images, strict=True):
            yield Picture(picture.filename.replace("ground_truth", "reconstruction"), picture.metadata, image)
