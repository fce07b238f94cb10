"""`t2i bench` end to end, on small models in place of the named sizes."""

import json
import sys

import pytest
import torch
from small_models import small_config

from t2i import cli
from t2i.recipes import PRESETS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "B", lambda: small_config((4, 4)))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests keep theirs


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["t2i", "bench", *args])
    cli.main()


def test_decode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["decode", "--sizes", "B", "--grids", "3", "4", "--batches", "1", "2", "--repeats", "2", "--caption", "4"]
    run(monkeypatch, *args, "--json", "--device", "cpu")
    result = json.loads(capsys.readouterr().out)
    assert result["header"]["guidance"] == 7.5
    rows = {(row["grid"], row["batch"], row["variant"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * 4
    assert [rows[4, 1, kind]["passes"] for kind in ("nar", "naive", "raster", "zipar")] == [7, 7, 16, 12]
    for (grid, batch, variant), row in rows.items():
        median = sum(row["timing"]["seconds"]) / 2
        assert row["tokens_per_s"] == pytest.approx(batch * grid * grid / median)
        assert (row["floor"] is None) == (variant == "naive")
        assert row["same_tokens"] == (1.0 if variant == "naive" else None)
        if row["floor"] is not None:
            assert 0 < min(row["floor"]["seconds"]) < max(row["timing"]["seconds"])
    run(monkeypatch, *args, "--variants", "nar", "--threads", "1")
    table = capsys.readouterr().out
    assert "B 4x4, batch 2, nar" in table
    assert "raster" not in table


def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--sizes", "B", "--grid", "3", "--batch", "2", "--repeats", "1", "--caption", "4"]
    run(monkeypatch, *args, "--activation-checkpointing", "--json", "--device", "cpu")
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["ours", "ours, checkpointed", "naive"]
    for name in ("ours", "ours, checkpointed"):
        assert rows[name]["loss_error"] <= 1e-5
        assert rows[name]["gradient_error"] <= 1e-4
    assert rows["naive"]["loss"] == pytest.approx(2.4, abs=1.0)  # log 11 and what random weights add
    run(monkeypatch, *args, "--threads", "1")
    assert "B 3x3, batch 2, naive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["decode", "--sizes", "Q"], "no size 'Q'; sizes are B, M, L, XL, XXL"),
        (["decode", "--batches", "0"], "have to be at least 1"),
        (["decode", "--window", "-1", "--sizes", "B", "--grids", "3"], "window is -1"),
        (["train", "--sizes", "Q"], "no size 'Q'"),
        (["train", "--caption", "121"], "a caption of 121 tokens is longer than the 120"),
        (["decode", "--caption", "121"], "a caption of 121 tokens is longer than the 120"),
        (["decode", "--dtype", "bfloat16", "--sizes", "B"], "computed in float32 on the processor only"),
        (["train", "--repeats", "0"], "have to be at least 1"),
        (["train", "--threads", "0"], "threads is 0; use at least 1"),
        (["decode", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
