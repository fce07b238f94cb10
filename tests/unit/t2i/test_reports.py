import pytest

from t2i.reports import Window


def test_what_happens_between_steps_is_left_out_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [100.0], [7.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    window = Window(lambda: waited[0])
    now[0] += 2
    waited[0] += 0.5
    with window.paused():
        now[0] += 50
    now[0] += 3
    assert window.seconds() == 5
    assert window.waited() == 0.5


def test_steps_that_were_left_out_have_no_loss() -> None:
    window = Window(lambda: 0.0)
    window.add(None)
    assert (window.steps, window.mean_loss()) == (1, None)
    for loss in (1.0, 2.0, None, 6.0):
        window.add(loss)
    assert (window.steps, window.mean_loss()) == (5, 3.0)
