import io
import json
from typing import Any

from doctor_findings import findings
from rich.console import Console

from t2i.doctor.facts import Inbox
from t2i.doctor.findings import Row
from t2i.doctor.launch import Launched
from t2i.doctor.report import as_json, judge, launching, print_report


def launched(stages: dict[int, str], code: int | None = 0, late: bool = False, **more: Any) -> Launched:
    inbox = Inbox()
    inbox.stages = stages
    for name, value in more.items():
        setattr(inbox, name, value)
    return Launched(code, inbox, late)


ALL_DONE = dict.fromkeys(range(4), "done")


def test_all_up_met_and_ended() -> None:
    assert [row.status for row in launching(launched(ALL_DONE), findings())] == ["green"]


def test_ranks_that_never_came_up_are_named_with_their_hosts() -> None:
    half = launched({0: "joining the process group", 1: "joining the process group"}, None, True, local={0: 1})
    (row,) = launching(half, findings())
    assert row.status == "red"
    assert "2 of 4 came up; not 2, 3 on b; not done after 600 s" in row.seen
    assert "alone" not in row.seen
    assert "ssh b hostname" in row.remedy
    (row,) = launching(launched({}, 255), findings())
    assert "0 of 4 came up; not 0, 1, 2, 3 on a, b; the launcher ended with code 255" in row.seen
    assert "of this machine alone" in row.seen


def test_ranks_that_never_met() -> None:
    stages = dict.fromkeys(range(4), "joining the process group")
    (row,) = launching(launched(stages, 1, True), findings())
    assert "0 (a), 1 (a), 2 (b), 3 (b) stopped while joining the process group" in row.seen
    assert "GLOO_SOCKET_IFNAME" in row.remedy


def test_ranks_that_failed_say_why_and_those_that_failed_alike_together() -> None:
    stages = {
        0: "comparing clocks",
        1: "comparing clocks",
        2: "joining the process group",
        3: "joining the process group",
    }
    errors = {3: "RuntimeError: refused", 2: "RuntimeError: refused", 1: "ValueError: no"}
    joining, clocks = launching(launched(stages, 1, errors=errors), findings())
    assert joining.seen == "2 (b), 3 (b) failed while joining the process group: RuntimeError: refused"
    assert "GLOO_SOCKET_IFNAME" in joining.remedy
    assert clocks.seen == "1 (a) failed while comparing clocks: ValueError: no"
    assert "last lines" in clocks.remedy
    assert (joining.status, clocks.status) == ("red", "red")


def test_a_launcher_that_fails_in_the_end_is_red() -> None:
    (row,) = launching(launched(ALL_DONE, 3), findings())
    assert (row.status, row.seen) == ("red", "the launcher ended with code 3")


def printed(rows: list[Row], result: Launched) -> str:
    stream = io.StringIO()
    print_report(rows, result, "title", Console(file=stream, width=200))
    return stream.getvalue()


def test_one_table_with_all_rows_and_the_last_lines_of_a_failure() -> None:
    rows = judge(launched(ALL_DONE), findings())
    text = printed([*rows, Row("red", "odd", "[bold]x[/]", "do [this]")], launched(ALL_DONE, lines=["unseen"]))
    assert "[bold]x[/]" in text
    assert "do [this]" in text
    assert f"1 red, 0 yellow, {len(rows)} green" in text
    assert "unseen" not in text
    text = printed(rows, launched(ALL_DONE, 1, lines=[f"line {n}." for n in range(30)]))
    assert "line 29." in text
    assert "line 14." not in text


def test_json_has_rows_and_facts() -> None:
    result = launched(ALL_DONE)
    answer = json.loads(as_json(judge(result, findings()), result, findings()))
    assert {row["status"] for row in answer["rows"]} == {"green"}
    assert [facts["rank"] for facts in answer["local"]] == [0, 1, 2, 3]
    assert answer["group"][0]["clocks"][0]["node"] == 1
