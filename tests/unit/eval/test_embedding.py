"""Features in batches: what reaches the networks, and that neither batches nor damaged neighbours change it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.embedding import embed_pictures
from eval.pictures import PictureSet, list_pictures


class Means:
    """Means of the channels, and how many pictures came at once."""

    def __init__(self, channels: int = 3) -> None:
        self.channels, self.batches = channels, list[int]()

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.resize((4, 4), Image.Resampling.NEAREST)).astype(np.float32))

    def embed(self, batch: Tensor) -> Tensor:
        self.batches.append(len(batch))
        return batch.mean((1, 2))[:, : self.channels]


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSet:
    for n in range(11):
        Image.new("RGB", (8 + n, 6), (n, 2 * n, 3 * n)).save(tmp_path / f"{n:02d}.png")
    for n in (0, 4, 5):
        (tmp_path / f"{n:02d}.png").write_bytes(b"not a picture")
    return list_pictures(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_every_readable_picture_once_in_every_network(pictures: PictureSet, batch_size: int) -> None:
    first, second = Means(), Means(2)
    found = embed_pictures(pictures, [first, second], batch_size, progress=False)
    good = [1, 2, 3, 6, 7, 8, 9, 10]
    assert found.numbers.tolist() == good
    np.testing.assert_array_equal(found.features[0], [[n, 2 * n, 3 * n] for n in good])
    np.testing.assert_array_equal(found.features[1], [[n, 2 * n] for n in good])
    assert found.features[0].dtype == np.float32
    assert [(one.name, one.reason) for one in found.unreadable] == [
        (f"{n:02d}.png", "undecodable picture of 13 bytes: not a JPEG, PNG or WebP file") for n in (0, 4, 5)
    ]
    assert first.batches == second.batches == [batch_size] * (8 // batch_size) + [8 % batch_size] * (8 % batch_size > 0)


def test_nothing_to_embed(pictures: PictureSet) -> None:
    with pytest.raises(ValueError, match=r"none of 1 pictures in .* can be read; 00.png: undecodable"):
        embed_pictures(PictureSet(pictures.root, ("00.png",)), [Means()], progress=False)
    with pytest.raises(ValueError, match="batch size is 0"):
        embed_pictures(pictures, [Means()], 0, progress=False)


def test_features_that_are_no_numbers_are_named(pictures: PictureSet) -> None:
    class Broken(Means):
        def embed(self, batch: Tensor) -> Tensor:
            features = super().embed(batch)
            return torch.where(features[:, :1] == 7, torch.nan, features)

    with pytest.raises(ValueError, match=r"features of 1 pictures are not finite, such as of 07.png"):
        embed_pictures(pictures, [Broken()], 3, progress=False)
