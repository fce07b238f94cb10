import threading
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_findings import plan

from t2i.doctor import folder
from t2i.doctor.facts import Plan
from t2i.doctor.folder import RunFolder, probe_folder


def plan_in(run_dir: Path, mark: str = "m") -> Plan:
    made = plan()
    return replace(made, recipe=replace(made.recipe, run_dir=run_dir), mark=mark, write_bytes=10 * 2**20 + 7)


def test_nothing_is_left_and_what_was_there_stays(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    ranks = [RunFolder(plan_in(run_dir)) for _ in range(2)]
    assert ranks[0].enter() is None
    assert [one.join(rank) for rank, one in enumerate(ranks)] == [None, None]
    written, seconds = ranks[1].write(1)
    assert written == 10 * 2**20 + 7
    assert seconds > 0
    for rank, one in enumerate(ranks):
        one.leave(rank)
    ranks[0].remove()
    assert list(tmp_path.iterdir()) == []

    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "model").write_bytes(b"12345")
    one = RunFolder(plan_in(run_dir))
    assert one.enter() is None
    free, kept = one.space()
    assert (free > 0, kept) == (True, 5)
    one.remove()
    assert [path.name for path in run_dir.iterdir()] == ["checkpoints"]


def test_the_file_is_written_whole_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = RunFolder(plan_in(tmp_path))
    one.enter()
    sizes = []
    monkeypatch.setattr("os.fsync", lambda number: sizes.append((one.path / "data-0").stat().st_size))
    one.write(0)
    assert sizes == [10 * 2**20 + 7]
    assert not (one.path / "data-0").exists()


def test_another_folder_under_the_same_path_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_PATIENCE", 0.2)
    assert RunFolder(plan_in(tmp_path / "here")).enter() is None
    problem = RunFolder(plan_in(tmp_path / "there")).join(1)
    assert problem is not None
    assert "not the folder that the first rank sees" in problem
    one = plan_in(tmp_path / "here")
    (probe_folder(one) / "token").write_text("other")
    assert "another probe" in str(RunFolder(one).join(1))


def test_a_token_that_takes_its_time_is_waited_for(tmp_path: Path) -> None:
    late = threading.Timer(0.3, RunFolder(plan_in(tmp_path)).enter)
    late.start()
    assert RunFolder(plan_in(tmp_path)).join(1) is None
    late.join()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = RunFolder(plan_in(tmp_path / "file" / "run"))
    assert "cannot be written" in str(one.enter())
    assert one.space()[0] > 0
    one.leave(0)
    one.remove()
