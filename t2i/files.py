"""JSON and safetensors files of models, read whole or refused in one line that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_LISTED = 8
"""Problems that a message names; of a file that is something else there are hundreds."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where it is no JSON object, OSError where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or make its folder again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, not an object; restore it, or make its folder again"
        )
    return value


def load_weights(module: nn.Module, path: Path, made_by: str) -> None:
    """Load the weights of a module from a safetensors file, in the module's own types.

    `made_by` is the file that says how the module is made. Raises ValueError where the file is damaged, or does not hold
    exactly the module's weights.
    """
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); restore it, or make it again") from error
    if problems := _misfits(module.state_dict(), weights):
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError(f"{path} does not fit its {made_by}: {'; '.join(problems[:_LISTED] + more)}")
    module.load_state_dict(weights)


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    return problems + [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
