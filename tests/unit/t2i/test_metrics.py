import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from t2i.config import Recipe
from t2i.metrics import MetricsLog, open_rows
from t2i.recipes import shapes_tiny


def recipe(run_dir: Path, wandb: str = "disabled") -> Recipe:
    tiny = shapes_tiny()
    return replace(tiny, run_dir=run_dir, train=replace(tiny.train, wandb=wandb))  # type: ignore[arg-type]


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_new_run_writes_every_row_at_once(tmp_path: Path) -> None:
    with MetricsLog(recipe(tmp_path / "new"), 0, enabled=True) as log:
        assert steps(tmp_path / "new") == []
        log.write({"step": 1, "loss": 2.5})
        assert steps(tmp_path / "new") == [1]  # before the file is closed
        log.write({"step": 1, "val_loss": 2.25})
        log.image(1, None)
    assert (
        tmp_path / "new" / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": 2.5}\n{"step": 1, "val_loss": 2.25}\n'


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 3}', "\0\0"])
def test_a_resumed_run_has_no_step_twice(tmp_path: Path, tail: str) -> None:
    rows = "".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(1, 5))
    (tmp_path / "metrics.jsonl").write_text(rows + tail)
    with MetricsLog(recipe(tmp_path), 2, enabled=True) as log:
        log.write({"step": 3, "loss": 0.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().startswith(rows[: rows.index('{"step": 3')])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(recipe(tmp_path / "run"), 0, enabled=False) as log:
        log.write({"step": 1})
    assert not (tmp_path / "run").exists()


def test_rows_stay_when_the_run_fails(tmp_path: Path) -> None:
    def failing_run() -> None:
        with MetricsLog(recipe(tmp_path), 0, enabled=True) as log:
            log.write({"step": 1})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing_run()
    assert steps(tmp_path) == [1]


def test_open_rows_makes_folder_and_file(tmp_path: Path) -> None:
    with open_rows(tmp_path / "a" / "rows.jsonl", 0) as rows:
        rows.write("{}\n")
    assert (tmp_path / "a" / "rows.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_wandb_is_offline_without_a_key_and_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    with MetricsLog(recipe(tmp_path, "auto"), 0, enabled=True) as log:
        log.write({"step": 1, "loss": 1.0})
        log.image(1, tmp_path / "grid.png")
    run_id = (tmp_path / "wandb_id").read_text()
    with MetricsLog(recipe(tmp_path, "auto"), 1, enabled=True) as log:
        log.write({"step": 2, "loss": 1.0})
    assert (tmp_path / "wandb_id").read_text() == run_id
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith(run_id) for run in runs)


@pytest.mark.slow
def test_a_run_outlives_its_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher that is told to stop ends wandb's service process too, while the ranks have still to save."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with MetricsLog(recipe(tmp_path, "auto"), 0, enabled=True) as log:
        log.write({"step": 1, "loss": 1.0})
        services = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        assert services
        for service in services:
            service.kill()
        psutil.wait_procs(services, timeout=30)
        for step in range(2, 200):
            log.write({"step": step, "loss": 1.0})
    assert steps(tmp_path) == list(range(1, 200))
    assert capsys.readouterr().err.count("wandb has failed") == 1


def test_wandb_is_not_sent_back_in_steps() -> None:
    """A run that was killed at step 7 makes steps 5 to 7 again."""
    logged: list[int] = []
    run = SimpleNamespace(step=8, log=lambda values, step: logged.append(step))
    for step in (5, 6, 7, 8, 8, 9):
        MetricsLog._log(run, {"loss": 1.0}, step)
    assert logged == [8, 8, 9]
