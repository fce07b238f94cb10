"""Feature vectors of pictures by one or several networks at once, decoded once, in batches.

    result = embed_pictures(pictures, [clip, inception])
    result.features[0]   # float32 [K, D] of the K pictures that can be read
    result.unreadable    # the others, by name

Shape suffixes: K pictures that could be read, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.pictures import Found, PictureSet, Unreadable, read_ahead

__all__ = ["Embedded", "Network", "embed_pictures"]


class Network(Protocol):
    """What makes feature vectors of pictures."""

    def prepare(self, image: Image.Image) -> Tensor:
        """What the network takes of an RGB picture of any size, on the processor; always of one shape, so that it stacks."""
        ...

    def embed(self, batch: Tensor) -> Tensor:
        """Features [N, D] of N prepared pictures."""
        ...


@dataclass(frozen=True, eq=False)
class Embedded:
    """Features of pictures.

    Attributes:
        features: One float32 [K, D] for each network, on the processor.
        numbers: Which pictures of the set they are of, int64 [K], ascending.
        unreadable: The others.
    """

    features: tuple[NDArray[np.float32], ...]
    numbers: NDArray[np.int64]
    unreadable: tuple[Unreadable, ...]


def embed_pictures(
    pictures: PictureSet,
    networks: Sequence[Network],
    batch_size: int = 64,
    what: str = "embed",
    progress: bool = True,
) -> Embedded:
    """Features of every picture that can be read.

    Args:
        pictures: Which ones.
        networks: Each sees every picture, which is decoded once.
        batch_size: Pictures that a network gets at once.
        what: Name of the progress bar.
        progress: Show it.

    Raises ValueError for a batch size below one, where no picture can be read, and where features are not finite.
    """
    assert networks, "nothing to embed with"
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    unreadable: list[Unreadable] = []
    numbers: list[int] = []
    features: list[list[Tensor]] = [[] for _ in networks]

    def prepare(image: Image.Image) -> list[Tensor]:
        return [network.prepare(image) for network in networks]

    with tqdm(total=len(pictures.names), desc=what, unit="picture", disable=not progress) as bar:
        for batch in _batches(read_ahead(pictures.paths, prepare, ahead=2 * batch_size), batch_size):
            good = [one.value for one in batch if one.value is not None]
            numbers += [one.number for one in batch if one.value is not None]
            unreadable += [Unreadable(pictures.names[one.number], one.problem) for one in batch if one.value is None]
            for network, of_network, found in zip(networks, zip(*good, strict=True), features, strict=False):
                with torch.inference_mode():
                    found.append(network.embed(torch.stack(of_network)).float().cpu())
            bar.update(len(batch))
    if not numbers:
        first = unreadable[0]
        raise ValueError(
            f"none of {len(unreadable):,} pictures in {pictures.root} can be read; {first.name}: {first.reason}"
        )
    arrays = tuple(torch.cat(found).numpy() for found in features)
    for array_KD in arrays:
        if bad := np.flatnonzero(~np.isfinite(array_KD).all(axis=1)).tolist():
            raise ValueError(
                f"features of {len(bad):,} pictures are not finite, such as of {pictures.names[numbers[bad[0]]]}; the weights "
                "are damaged"
            )
    return Embedded(arrays, np.array(numbers, dtype=np.int64), tuple(unreadable))


def _batches(found: Iterator[Found[list[Tensor]]], size: int) -> Iterator[list[Found[list[Tensor]]]]:
    """Lists with `size` readable pictures each, the last one perhaps fewer, and whatever lies between them."""
    batch: list[Found[list[Tensor]]] = []
    readable = 0
    for one in found:
        batch.append(one)
        readable += one.value is not None
        if readable == size:
            yield batch
            batch, readable = [], 0
    if batch:
        yield batch
