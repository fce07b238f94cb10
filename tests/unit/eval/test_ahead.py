import threading

import pytest

from eval.ahead import READERS, done_ahead


def test_results_come_in_order_and_so_do_errors() -> None:
    results = done_ahead(lambda n: 12 // (5 - n), range(9), ahead=3)
    assert [next(results) for _ in range(5)] == [2, 3, 4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_who_stops_early_does_not_wait_for_the_rest() -> None:
    """The first is done at once; the others hold all threads until it is known that nothing more is wanted."""
    started: list[int] = []
    go_on = threading.Event()

    def work(number: int) -> int:
        started.append(number)
        if number:
            go_on.wait(30)
        return number

    results = done_ahead(work, range(100), ahead=50)
    assert next(results) == 0
    timer = threading.Timer(0.5, go_on.set)  # once what has not begun is cancelled
    timer.start()
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 1 + READERS
