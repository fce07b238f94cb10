"""Stopped, killed and cut off at every kind of moment, and resumed: the run ends as if nothing had happened."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i.checkpoint import checkpoints
from t2i.config import EvalConfig, Recipe
from t2i.export import merged_weights

from .conftest import Entry, entries, forked, losses, results, rows, small_recipe
from .forked import FAULTS
from .test_training import assert_same_weights

pytestmark = pytest.mark.slow

STEPS = 40
STOPS = (7, 13, 29)


@pytest.fixture(scope="module")
def recipe(data: Path) -> Recipe:
    """40 steps with dropout, dropped captions and an average, and a checkpoint now and then; one of the stops is at a step
    whose validation is due."""
    small = small_recipe(data)
    train = replace(small.train, steps=STEPS, sample_every=0, validate_every=13, save_every=10, keep_last=3)
    return replace(small, train=train, eval=EvalConfig())


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return entries(recipe, tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stopped_three_times_is_as_never_stopped(stage: int, run: Entry, recipe: Recipe, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    runs = [run(straight, stage)]
    for stop in (*STOPS, None):
        runs.append(run(stopped, stage, 2, signal_at=stop))
    answers = forked(tmp_path, runs)
    assert [answer["codes"] for answer in answers] == [[0, 0], *[[85, 85]] * len(STOPS), [0, 0]]
    assert results(stopped) == results(straight)  # bit for bit, and no step twice
    assert len(losses(straight)) == STEPS
    assert_same_weights(stopped, straight)


def test_who_sends_a_signal_does_not_wait_for_the_validation_that_is_due(run: Entry, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    (answer,) = forked(tmp_path, [run(stopped, 1, 2, signal_at=13)])
    assert answer["codes"] == [85, 85]
    assert not any("val_loss" in row for row in rows(stopped))  # made by the next start, as above
    newest = checkpoints(stopped)[-1].info
    assert (newest.step, newest.inspected) == (13, False)


def test_killed_at_any_moment(run: Entry, tmp_path: Path) -> None:
    """26 kills in one run: at chosen moments, and at random ones; of one rank, or of all."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    often = (
        "--train.steps",
        "120",
        "--train.save-every",
        "3",
        "--train.keep-last",
        "1",
        "--train.validate-every",
        "100",
    )
    chance = random.Random(5)
    kills: list[dict[str, Any]] = [{"fault": name} for name in FAULTS for _ in range(2)]
    kills += [{"kill": {"after": chance.uniform(0, 0.3), "who": who}} for who in ("all", "one") * 5]
    chance.shuffle(kills)
    runs = [
        run(straight, 2, 2, *often),
        *(run(killed, 2, 2, *often, **kill) for kill in kills),
        run(killed, 2, 2, *often),
    ]
    answers = forked(tmp_path, runs)
    assert answers[0]["codes"] == answers[-1]["codes"] == [0, 0]
    deaths = sum(-9 in answer["codes"] for answer in answers)
    assert deaths >= 25, answers
    assert all(answer["outlived"] < 30 for answer in answers), answers
    assert results(killed) == results(straight)
    assert_same_weights(killed, straight)
    steps = [whole.info.step for whole in checkpoints(killed)]
    assert steps[-1] == 120
    assert len(steps) <= 2  # the newest, and the one that was gone on from


def test_other_numbers_of_ranks_and_stages_go_on(run: Entry, tmp_path: Path) -> None:
    """Every number of ranks and every stage takes up what another has written; without dropout, which differs from rank to
    rank."""
    still = ("--model.dropout", "0")
    straight, changed, alone = (tmp_path / name for name in ("straight", "changed", "alone"))
    runs = [
        run(straight, 2, 2, *still),
        run(changed, 2, 2, *still, signal_at=10),
        run(changed, 1, 4, *still, signal_at=18),
        run(changed, 3, 1, *still, signal_at=25),
        run(changed, 3, 4, *still, signal_at=33),
        run(changed, 2, 2, *still),
        run(alone, 3, 2, *still, signal_at=20),
        run(alone, 2, 1, *still),
    ]
    answers = forked(tmp_path, runs)
    expected = [{0}, {85}, {85}, {85}, {85}, {0}, {85}, {0}]
    assert [set(answer["codes"]) for answer in answers] == expected, (tmp_path / "scenario.log").read_text()[-4000:]
    for other in (changed, alone):
        assert losses(other) == pytest.approx(losses(straight), rel=0, abs=1e-5)
        for averaged in (False, True):
            mine, theirs = (merged_weights(checkpoints(folder)[-1], averaged) for folder in (other, straight))
            for name, tensor in theirs.items():
                torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-4)
