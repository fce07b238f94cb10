"""What the process group is started with."""

import datetime

import pytest

from t2i.engine import GROUP_TIMEOUT, group_timeout


def test_the_environment_changes_how_long_collectives_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T2I_GROUP_TIMEOUT_SECONDS", raising=False)
    assert group_timeout() == GROUP_TIMEOUT
    monkeypatch.setenv("T2I_GROUP_TIMEOUT_SECONDS", "12.5")
    assert group_timeout() == datetime.timedelta(seconds=12.5)


@pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2I_GROUP_TIMEOUT_SECONDS", given)
    with pytest.raises(ValueError, match=r"T2I_GROUP_TIMEOUT_SECONDS is .*; set it to a number of seconds"):
        group_timeout()
