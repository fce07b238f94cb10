"""What the tests of the package share: reference fixtures and small data sets. Models are in `small_models`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from torch import Tensor

from data_pipeline.index import build_index
from data_pipeline.shapes_set import write_shards
from t2i.encoding import encode

# Times of single examples say little on a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ASSETS = Path(__file__).parents[2] / "assets"


@dataclass(frozen=True)
class Reference:
    """Inputs and outputs of the published computation, with its weights under their published names."""

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def condition(self) -> Tensor:
        return self.tensors["in.labels"] if "in.labels" in self.tensors else self.tensors["in.caption_embedding"]

    @property
    def mask(self) -> Tensor | None:
        return self.tensors["in.caption_mask"].bool() if "in.caption_mask" in self.tensors else None


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """reference("nar_t2i") -> that fixture; weights are fresh dictionaries, so a test may change them."""

    def read(name: str) -> Reference:
        with safe_open(ASSETS / f"{name}_reference.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
            config = json.loads(file.metadata()["config"])
        weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
        rest = {key: t for key, t in tensors.items() if not key.startswith("weights.")}
        return Reference(weights, rest, config)

    return read


@pytest.fixture(scope="session")
def raw_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed raw set of 96 shapes pictures in two shards."""
    root = tmp_path_factory.mktemp("shapes")
    write_shards(root, 96, seed=0, shard_size=48, workers=1)
    build_index(root, progress=False)
    return root


@pytest.fixture(scope="session")
def encoded_shapes(raw_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set, encoded with the shipped tokenizer."""
    out = tmp_path_factory.mktemp("encoded")
    threads = torch.get_num_threads()
    encode(raw_shapes, out, tokenizer="shapes", image_size=64, batch_size=16)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="session")
def raw_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed raw set of 24 clips of four frames in one shard."""
    root = tmp_path_factory.mktemp("clips")
    write_shards(root, 24, seed=0, shard_size=24, workers=1, frames=4)
    build_index(root, progress=False)
    return root


@pytest.fixture(scope="session")
def encoded_clips(raw_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same set, encoded with the shipped tokenizer."""
    out = tmp_path_factory.mktemp("encoded-clips")
    threads = torch.get_num_threads()
    encode(raw_clips, out, tokenizer="shapes", image_size=64, frames=4, batch_size=16)
    torch.set_num_threads(threads)
    return out
