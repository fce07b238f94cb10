import json
import resource
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from t2i.config import Recipe
from t2i.metrics import MetricsLog, Rows
from t2i.recipes import shapes_tiny


def recipe(run_dir: Path, wandb: str = "disabled") -> Recipe:
    tiny = shapes_tiny()
    return replace(tiny, run_dir=run_dir, train=replace(tiny.train, wandb=wandb))  # type: ignore[arg-type]


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return steps_in(run_dir / "metrics.jsonl")


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


def test_rows_make_folder_and_file(tmp_path: Path) -> None:
    with closing(Rows(tmp_path / "a" / "rows.jsonl", 0)) as rows:
        rows.add({"step": 1})
    assert (tmp_path / "a" / "rows.jsonl").read_text() == '{"step": 1}\n'


def test_damaged_lines_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n[2]\n{"loss": 1}\n{"step": 2}\n{"step": 7}\n{"st')
    with closing(Rows(path, 3)) as rows:
        assert [row["step"] for row in rows.kept] == [1, 2]
        assert rows.last_step == 7
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{path}, line {line} is damaged and left out" for line in (2, 3, 4)]


def test_rows_wait_where_there_is_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with closing(Rows(path, 0)) as rows:
            rows.add({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            rows.add({"step": 2})
            rows.add({"step": 3})
            assert path.read_text() == '{"step": 1}\n'  # and no half line
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            rows.add({"step": 4})
            assert steps_in(path) == [1, 2, 3, 4]
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
            rows.add({"step": 5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    told = capsys.readouterr().err
    assert told.count("cannot be written ([Errno 27] File too large); its rows wait") == 2  # once for each time
    assert told.endswith(f"{path}: 1 rows could not be written\n")


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


@pytest.mark.parametrize("counts", [8, 0])
def test_wandb_is_sent_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: int) -> None:
    """A run that was killed at step 7 makes steps 5 to 7 again, is killed at 6, and makes them once more; wandb counts steps
    itself online, and begins at 0 in each process offline."""
    logged: list[int] = []
    run = SimpleNamespace(step=counts, log=lambda values, step: logged.append(step), finish=lambda exit_code: None)
    monkeypatch.setattr("wandb.init", lambda **options: run)
    for last in (6, 9):
        if last == 6:
            (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
        with MetricsLog(recipe(tmp_path, "offline"), 4, enabled=True) as log:
            for step in range(5, last + 1):
                log.write({"step": step, "loss": 1.0})
                log.write({"step": step, "val_loss": 1.0})
    assert logged == [8, 8, 9, 9]


def test_a_run_begins_without_a_wandb_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("wandb.init", fail)
    with MetricsLog(recipe(tmp_path, "online"), 0, enabled=True) as log:
        log.write({"step": 1})
    assert steps(tmp_path) == [1]
    assert "wandb has failed (no network) and gets no more of this run" in capsys.readouterr().err
