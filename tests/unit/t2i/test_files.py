import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from t2i.files import load_weights, read_json


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"a\.json is not JSON"),
        (b"", r"a\.json is not JSON"),
        (b"\xff\xfe", r"a\.json is not JSON .*utf-8"),
        (b"[" * 100_000, r"a\.json is not JSON .*recursion"),
        (b"[1]", r"a\.json holds a JSON list, not an object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_a_json_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"ä": [1]}), encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1]}


def test_weights_are_loaded_in_the_modules_own_type(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    save_file(weights, tmp_path / "w.safetensors")
    module = nn.Linear(3, 2)
    load_weights(module, tmp_path / "w.safetensors", "config.json")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, torch.ones(2, 3))


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(2, 2), "other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(nn.Linear(3, 2), path, "config.json")
    assert str(caught.value) == (
        f"{path} does not fit its config.json: missing bias; unexpected other; weight is (2, 2), expected (2, 3)"
    )
    save_file({f"layer{n}": torch.zeros(1) for n in range(20)}, path)
    with pytest.raises(ValueError, match=r"unexpected layer\d+; and 14 more$"):
        load_weights(nn.Linear(3, 2), path, "config.json")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_damaged_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged or no safetensors file"):
        load_weights(nn.Linear(3, 2), path, "config.json")
