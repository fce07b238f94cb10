import pytest
import torch

from t2i import reports
from t2i.costs import GPUS
from t2i.reports import Window, device_peak, measured_peak


def test_what_happens_between_steps_is_left_out_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], [7.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    window = Window(lambda: waited[0])
    now[0] += 2
    waited[0] += 0.5
    with window.paused():
        now[0] += 50
    now[0] += 3
    assert window.seconds() == 5
    assert window.waited() == 0.5


def test_steps_that_were_left_out_have_no_loss() -> None:
    window = Window(lambda: 0.0)
    window.add(None, 0)
    assert (window.steps, window.mean_loss()) == (1, None)
    for loss in (1.0, 2.0, None, 6.0):
        window.add(loss, 7)
    assert (window.steps, window.mean_loss(), window.flops) == (5, 3.0, 4 * 7)


def test_the_peak_of_a_processor_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15
    assert device_peak(torch.device("cpu"), torch.float32, 0.25) == 0.25e12  # given


@pytest.mark.parametrize(
    ("name", "dtype", "known"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, True),
        ("NVIDIA H100 80GB HBM3", torch.float32, False),  # the data sheet's is of bf16
        ("NVIDIA Unheard Of", torch.bfloat16, False),
    ],
)
def test_the_peak_of_a_gpu_is_its_data_sheets_where_that_is_known(
    name: str, dtype: torch.dtype, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr(reports, "measured_peak", lambda device, dtype: 1.0)
    assert device_peak(torch.device("cuda:0"), dtype) == (GPUS["h100"].flops if known else 1.0)


def test_the_measured_peak_is_the_flops_of_a_product_over_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        now[0] += 0.5

    monkeypatch.setattr("torch.mm", mm)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert measured_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5
