import pytest
import torch

from t2i.devices import find_device


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_processor_is_always_there(device: torch.device | str) -> None:
    assert find_device(device) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda:99", torch.device("cuda:99")])
def test_a_device_that_is_not_there_is_refused_in_one_line(device: torch.device | str) -> None:
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used on this machine .*; give cpu") as caught:
        find_device(device)
    assert "\n" not in str(caught.value)


def test_of_a_long_reason_the_first_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(ValueError, match=r"machine \(CUDA error: invalid device ordinal\); give cpu or one that can$"):
        find_device("cuda:7")
