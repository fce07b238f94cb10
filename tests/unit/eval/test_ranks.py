"""Shares of the work from the launcher's environment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.ranks import Ranks


@given(st.integers(1, 20), st.integers(0, 200))
def test_every_piece_of_work_has_one_owner(ranks: int, number: int) -> None:
    assert sum(Ranks(rank, ranks).owns(number) for rank in range(ranks)) == 1


def test_the_environment_tells_the_share() -> None:
    assert Ranks.from_environment({}) == Ranks(0, 1)
    assert Ranks.from_environment({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}) == Ranks(2, 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "3"}, "RANK is 'x' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1' in the environment"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "RANK is 3 and WORLD_SIZE 3 in the environment"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1 in the environment"),
    ],
)
def test_odd_environments_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks.from_environment(environment)
