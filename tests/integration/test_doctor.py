"""The doctor on two ranks of this machine, through the launcher: a run that could begin, and one with all sorts of faults."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import t2i

pytestmark = pytest.mark.slow


def test_all_is_well(recipe_file: Path, deepspeed_config: Callable[[int], Path], tmp_path: Path) -> None:
    done = t2i(
        "doctor", recipe_file, "--deepspeed_config", deepspeed_config(2), "--ranks", "2", "--run-dir", tmp_path / "a" / "b",
        "--write-mib", "8", "--reduce-mib", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    status = {row["check"]: row["status"] for row in answer["rows"]}
    # Where tests run on fewer cores than ranks, that is rightly yellow.
    assert {check for check, one in status.items() if one != "green"} <= {"threads"}
    assert {
        "ranks",
        "shards",
        "recipe and set",
        "run folder",
        "free space",
        "all-reduce",
        "batch, lanes, ranks",
    } <= status.keys()
    first, second = answer["group"]
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["written"] == 8 * 2**20
    assert min(first["write_seconds"], first["reduce_seconds"], second["reduce_seconds"]) > 0
    assert [facts["ranks"] for facts in answer["local"]] == [2, 2]
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_faults_are_red_with_what_to_do(
    data: Path, recipe_file: Path, deepspeed_config: Callable[[int], Path], tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "set")
    gone = sorted((tmp_path / "set").glob("*.tar"))[1]
    gone.unlink()
    config = json.loads(deepspeed_config(2).read_text()) | {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    done = t2i(
        "doctor", recipe_file, "--deepspeed_config", tmp_path / "zero.json", "--ranks", "2", "--data.path", tmp_path / "set",
        "--run-dir", tmp_path / "zero.json" / "run", "--write-mib", "8", "--reduce-mib", "1", "--json",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)["rows"]}
    assert {check for check, row in rows.items() if row["status"] == "red"} == {
        "shards",
        "run folder",
        "batch, lanes, ranks",
    }
    assert gone.name in rows["shards"]["seen"]
    assert "t2i data index" in rows["shards"]["remedy"]
    assert "cannot be written" in rows["run folder"]["seen"]
    assert "--run-dir" in rows["run folder"]["remedy"]
    assert "batch 12, 8 lanes" in rows["batch, lanes, ranks"]["seen"]
    assert "train_micro_batch_size_per_gpu 2 (batch 8)" in rows["batch, lanes, ranks"]["remedy"]
    assert rows["DeepSpeed JSON"]["status"] == "yellow"
    assert rows["all-reduce"]["status"] == "green"


def test_a_host_that_is_not_there_is_named(
    recipe_file: Path, deepspeed_config: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=2\n")
    done = t2i(
        "doctor", recipe_file, "--deepspeed_config", deepspeed_config(2), "--hostfile", tmp_path / "hosts", "--run-dir",
        tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 of 2 came up" in done.stdout
    assert "no-such-host.invalid" in done.stdout
    assert "The last lines of the launcher's output" in done.stdout
    assert "shards" in done.stdout  # what this machine alone can tell
