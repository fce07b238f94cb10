import json
import math
from pathlib import Path

import pytest

from data_pipeline.index import ShardSet
from t2i.health import Health


def health(folder: Path, shards: Path, **options: float) -> Health:
    values = {"max_bad_steps": 3, "spike_deviations": 4.0} | options
    return Health(folder, 0, ShardSet(shards), enabled=True, **values)  # type: ignore[arg-type]


def test_a_leap_of_the_loss_is_a_spike_and_its_noise_is_none(encoded_shapes: Path, tmp_path: Path) -> None:
    with health(tmp_path, encoded_shapes) as judge:
        for step in range(200):
            loss = 5 - 0.01 * step + 0.1 * math.sin(7 * step)
            assert not judge.is_spike(loss)
            judge.good(loss)
        assert judge.is_spike(loss + 3)
        assert not judge.is_spike(loss - 3)
    with health(tmp_path, encoded_shapes, spike_deviations=0.0) as judge:
        for _ in range(50):
            judge.good(1.0)
        assert not judge.is_spike(100.0)


def test_a_constant_loss_has_no_spikes_in_its_last_digit(encoded_shapes: Path, tmp_path: Path) -> None:
    with health(tmp_path, encoded_shapes) as judge:
        for _ in range(50):
            judge.good(1.0)
        assert not judge.is_spike(1.0 + 1e-6)


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_samples(encoded_shapes: Path, tmp_path: Path) -> None:
    shards = ShardSet(encoded_shapes)
    with health(tmp_path, encoded_shapes) as judge:
        for step, bad in enumerate([True, True, False, True, True, True], start=1):
            if not bad:
                judge.good(1.0)
                continue
            judge.bad()
            problem = judge.problem(judge.report(step, "skipped", math.nan, [2, 5]))
            assert (problem is not None) == (step == 6)
    assert problem is not None
    assert "in 3 steps in a row; the last, step 6" in problem
    assert f"{shards.key(2)} in {shards.shard_of(2)}, {shards.key(5)} in {shards.shard_of(5)}" in problem
    assert judge.bad_steps == 5
    rows = [json.loads(line) for line in judge.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]
    assert rows[0] == {
        "step": 1, "kind": "skipped", "loss": None,
        "samples": [{"key": shards.key(i), "shard": shards.shard_of(i)} for i in (2, 5)],
    }  # fmt: skip


def test_rows_of_steps_that_are_made_again_are_removed(encoded_shapes: Path, tmp_path: Path) -> None:
    with health(tmp_path, encoded_shapes) as judge:
        for step in (2, 9):
            judge.report(step, "spike", 9.0, [0])
    with Health(
        tmp_path, 5, ShardSet(encoded_shapes), max_bad_steps=3, spike_deviations=0, enabled=True
    ):  # fmt: skip
        pass
    assert [json.loads(line)["step"] for line in judge.path.read_text().splitlines()] == [2]


@pytest.mark.parametrize("enabled", [True, False])
def test_only_the_first_rank_writes(encoded_shapes: Path, tmp_path: Path, enabled: bool) -> None:
    with Health(
        tmp_path, 0, ShardSet(encoded_shapes), max_bad_steps=3, spike_deviations=0, enabled=enabled
    ) as judge:  # fmt: skip
        assert judge.report(1, "spike", 9.0, [0])["samples"]
    assert judge.path.exists() == enabled
