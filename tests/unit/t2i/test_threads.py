import os

import pytest

from t2i.threads import cores_per_rank


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, 16),
        ({"WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "2"}, 8),  # eight hosts under the DeepSpeed launcher
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2),  # two under torchrun
        ({"WORLD_SIZE": "64"}, 1),
    ],
)
def test_the_ranks_of_one_host_share_its_cores(
    environment: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert cores_per_rank() == cores
