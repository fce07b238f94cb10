"""The command line of t2i/train.py, up to where the process group starts."""

from typing import Any

import pytest

from t2i import train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local_rank=0"], "usage: deepspeed t2i/train.py RECIPE"),
        (["--local_rank=0", "shapes-huge"], "error: no recipe or file 'shapes-huge'; recipes are "),
        (["shapes-tiny"], "error: no --deepspeed_config; give one of the files in deepspeed_configs/"),
        (
            ["shapes-tiny", "--deepspeed_config", "nowhere.json"],
            "error: DeepSpeed configuration nowhere.json cannot be read",
        ),
        (["shapes-tiny", "--train.lr", "0.1", "--deepspeed_config", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", *arguments])
    assert train.main() == 2
    assert message in capsys.readouterr().err


def test_a_value_out_of_range_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", "shapes-tiny", "--train.steps", "0"])
    try:
        code: Any = train.main()
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert "steps is 0; it must be at least 1" in capsys.readouterr().err


def test_help_lists_the_fields_of_a_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", "shapes-tiny", "--help"])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for option in ("--train.steps", "--model.width", "--run-dir", "--text-encoder.dim", "--data.lanes"):
        assert option in out
