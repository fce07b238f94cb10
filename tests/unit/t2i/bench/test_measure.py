import json
from pathlib import Path

import pytest
import torch

from t2i.bench.measure import PeakMemory, Timing, alternate, as_json, environment, mebibytes, report

CPU = torch.device("cpu")


def test_variants_take_turns() -> None:
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU, "test")
    assert "".join(calls) == "ab" * 3
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process start its peak anew")
def test_peak_memory_is_seen_although_it_has_been_freed() -> None:
    before = torch.ones(30 * 2**18)
    with PeakMemory(CPU) as memory:
        torch.ones(80 * 2**18)
    assert memory.peak is not None
    assert memory.before is not None
    assert 75 * 2**20 < memory.peak - memory.before < 120 * 2**20
    with PeakMemory(CPU) as less:
        pass
    assert less.peak is not None
    assert less.peak < memory.peak - 60 * 2**20
    assert before.sum() > 0


def test_median_and_memory() -> None:
    timing = Timing((3.0, 1.0, 9.0), 5 * 2**20, 2**20)
    assert (timing.median, timing.extra) == (3.0, 4 * 2**20)
    assert mebibytes(timing.extra) == "4"
    assert mebibytes(None) == "-"


def test_report_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    header = environment(CPU)
    assert set(header) == {"device", "threads", "python", "torch", "date"}
    rows = [Timing((1.5,), None, None)]
    report("title", header, rows, {"seconds": lambda row: f"{row.median:.1f}"})
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "1.5" in out
    assert json.loads(as_json(header, rows))["rows"][0]["seconds"] == [1.5]
