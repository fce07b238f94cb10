from pathlib import Path

import pytest

from t2i.doctor.commands import _hosts_in, doctor

CONFIG = ["--deepspeed-config", str(Path(__file__).parents[4] / "deepspeed_configs" / "cpu.json")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-recipe"], "no recipe or file 'no-recipe'"),
        (["shapes-tiny", "--hostfile", "none"], "hostfile none is no file"),
        (["shapes-tiny", "--ranks", "0"], "ranks 0"),
        (["shapes-tiny", "--write-mib", "0"], "write_mib 0"),
        (["shapes-tiny", "--ranks", "2", "--hostfile", CONFIG[1]], "leave one out"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        doctor([*arguments, *CONFIG])


def test_a_field_that_no_recipe_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        doctor(["shapes-tiny", *CONFIG, "--data.lane", "4"])
    assert refused.value.code == 2


def test_hosts_of_a_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nworker-0 slots=8\n\n  worker-1   slots=4\nnonsense\n")
    assert _hosts_in(tmp_path / "hosts") == {"worker-0": 8, "worker-1": 4}
