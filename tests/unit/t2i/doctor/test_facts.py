import base64
import json
import random
from typing import Any

import pytest
from doctor_findings import group, local, plan

from t2i.doctor import facts
from t2i.doctor.facts import Inbox, LocalFacts, Plan, pack, send, unpack


def test_plans_and_facts_survive_the_journey() -> None:
    for value in (plan(), local(3), group(0)):
        text = pack(value)
        assert unpack(type(value), text) == value
        assert not set(text) & set(" \"'$;&|")  # nothing that a shell on the way would take notice of
    assert isinstance(unpack(Plan, pack(plan())), Plan)


def sent(capfd: pytest.CaptureFixture[str], *messages: Any) -> list[str]:
    for message in messages:
        send(*message)
    return capfd.readouterr().out.splitlines(keepends=True)


def test_messages_are_found_among_other_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_CHUNK", 40)
    messages = [(rank, "local", local(rank)) for rank in range(4)]
    mine = [sent(capfd, message) for message in messages]
    assert len(mine[0]) > 5  # in several lines, which come mixed, each rank's in order
    draw = random.Random(0)
    inbox = Inbox()
    while any(mine):
        lines = draw.choice([lines for lines in mine if lines])
        inbox.take("host-b: " + lines.pop(0))
        inbox.take("[INFO] something else\n")
    assert inbox.local == {rank: local(rank) for rank in range(4)}
    assert set(inbox.lines) == {"[INFO] something else"}


def test_lines_are_short_enough_not_to_be_mixed(capfd: pytest.CaptureFixture[str]) -> None:
    big = LocalFacts(
        **{**vars(local(0)), "variables": {f"NCCL_{i}": str(random.Random(i).random()) for i in range(900)}}
    )
    lines = sent(capfd, (0, "local", big))
    assert len(lines) > 5
    assert max(len(line.encode()) for line in lines) < 4096  # PIPE_BUF: written at once
    inbox = Inbox()
    for line in lines:
        inbox.take(line)
    assert inbox.local[0] == big


def test_half_a_message_is_none(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_CHUNK", 40)
    lines = sent(capfd, (0, "local", local(0)))
    inbox = Inbox()
    for line in lines[:-1]:
        inbox.take(line)
    assert inbox.local == {}


def test_stages_errors_and_the_launchers_hosts(capfd: pytest.CaptureFixture[str]) -> None:
    inbox = Inbox()
    for line in sent(
        capfd, (0, "stage", "one"), (0, "stage", "two"), (1, "error", "ValueError: no 'ü'"), (2, "group", group(2))
    ):
        inbox.take(line)
    assert (inbox.stages, inbox.errors, inbox.group) == ({0: "two"}, {1: "ValueError: no 'ü'"}, {2: group(2)})
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 1], "b": [1]}).encode()).decode()
    inbox.take(f"[INFO] cmd = python -m deepspeed.launcher.launch --world_info={world} --node_rank=%n")
    assert inbox.hosts == {"a": 2, "b": 1}
