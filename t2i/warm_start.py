"""Starting a new run from the weights of another: `--train.init-from`, an export or a run folder.

The second stage of the published recipe is one: 512 pixels a side, from the weights of the 256-pixel model, all of whose
parameters it has, since rotary positions are no parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i import checkpoint
from t2i.optimizer import AVERAGE
from t2i.pipeline import read_description
from t2i.text_encoder import TextEncoder

_LISTED = 8


@dataclass(frozen=True)
class KeyReport:
    """Which parameters of a new model come from another: `taken` do, `fresh` ones it has alone, `unused` only the other."""

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} parameters taken"]
        for what, names in (("start anew", self.fresh), ("of it unused", self.unused)):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                parts.append(f"{len(names)} {what} ({', '.join(names[:_LISTED])}{more})")
        return "; ".join(parts)


def read_weights(source: Path) -> dict[str, Tensor]:
    """Weights of an export, or of the newest checkpoint of a run (their moving average where there is one), by the names
    that they have in `t2i.objective.TrainingModel`. Raises ValueError where it is neither."""
    source = Path(source)
    if (found := checkpoint.newest(source)) is not None:
        return found.states().state_dict(AVERAGE if found.info.averaged else None)
    description = read_description(source)
    weights = {f"nar.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    if description.model.condition == "text":
        encoder = TextEncoder.from_pretrained(source / "text_encoder")
        weights |= {f"text_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return weights


def vocabulary_in(source: Path) -> bytes | None:
    """The vocabulary of the trained text encoder that comes along with the weights, None where there is none."""
    source = Path(source)
    if (found := checkpoint.newest(source)) is not None:
        return found.vocabulary()
    path = source / "text_encoder" / checkpoint.VOCABULARY
    return path.read_bytes() if path.is_file() else None


def match(own: Mapping[str, torch.Size], weights: Mapping[str, Tensor], source: Path | str) -> KeyReport:
    """Which of the model's parameters the weights are for. Raises ValueError where one has another shape, or none fits."""
    differing = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(shape)} here"
        for name, shape in own.items()
        if name in weights and weights[name].shape != shape
    ]
    if differing:
        more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
        raise ValueError(
            f"cannot start from {source}: {'; '.join(differing[:_LISTED])}{more}; give the run a model like it, or another "
            "train.init_from"
        )
    taken = tuple(name for name in own if name in weights)
    if not taken:
        raise ValueError(f"cannot start from {source}: it has no parameter of this model; give another train.init_from")
    return KeyReport(
        taken, tuple(name for name in own if name not in weights), tuple(name for name in weights if name not in own)
    )
