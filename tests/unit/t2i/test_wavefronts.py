import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.wavefronts import (
    Grid,
    attention_mask,
    check_grid,
    coordinates,
    head_weights,
    levels,
    order,
    predecessors,
    rank,
    wavefront_sizes,
)

grids = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def positions(grid: Grid) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in grid)))


@given(grids)
def test_wavefronts_partition_the_grid_in_row_major_order(grid: Grid) -> None:
    sizes = wavefront_sizes(grid)
    assert len(sizes) == sum(grid) - len(grid) + 1
    assert sum(sizes) == math.prod(grid)
    written = order(grid).tolist()
    assert sorted(written) == list(range(math.prod(grid)))
    start = 0
    for level, size in enumerate(sizes):
        wavefront = written[start : start + size]
        assert wavefront == [i for i, p in enumerate(positions(grid)) if sum(p) == level]
        start += size
    assert rank(grid)[order(grid)].tolist() == list(range(len(written)))


@given(grids)
def test_coordinates_and_levels(grid: Grid) -> None:
    assert [tuple(c) for c in coordinates(grid).tolist()] == positions(grid)
    assert levels(grid).tolist() == [sum(p) for p in positions(grid)]


@given(grids)
def test_predecessors_are_one_step_back_along_each_axis(grid: Grid) -> None:
    places = {positions(grid)[i]: place for place, i in enumerate(order(grid).tolist())}
    table = predecessors(grid).tolist()
    for position, place in places.items():
        for axis in range(len(grid)):
            back = tuple(c - (a == axis) for a, c in enumerate(position))
            assert table[place][axis] == places.get(back, -1)


@given(grids, st.integers(0, 4))
def test_attention_is_causal_by_level(grid: Grid, prefix: int) -> None:
    mask = attention_mask(grid, prefix)
    by_place = [positions(grid)[i] for i in order(grid).tolist()]
    for i, j in itertools.product(range(len(mask)), repeat=2):
        if i < prefix or j < prefix:
            assert bool(mask[i, j]) == (j <= i), (i, j)
        else:
            assert bool(mask[i, j]) == (sum(by_place[j - prefix]) <= sum(by_place[i - prefix])), (i, j)


@given(grids)
def test_attention_is_block_lower_triangular_in_wavefront_order(grid: Grid) -> None:
    sizes = wavefront_sizes(grid)
    mask = attention_mask(grid, 0)
    for i, row in enumerate(mask.split(list(sizes))):
        for j, block in enumerate(row.split(list(sizes), dim=1)):
            assert bool((block == (j <= i)).all()), (i, j)


@given(grids)
def test_head_weights_are_a_mean_over_the_predecessors_inside(grid: Grid) -> None:
    weights = head_weights(grid)
    torch.testing.assert_close(weights.sum(1), torch.ones(math.prod(grid)))
    torch.testing.assert_close(weights[0], torch.full((len(grid),), 1 / len(grid)))
    for row, places in zip(weights[1:], predecessors(grid)[1:], strict=True):
        inside = places >= 0
        torch.testing.assert_close(row, inside / inside.sum())


def test_numbers_of_passes_of_the_known_grids() -> None:
    assert [len(wavefront_sizes(grid)) for grid in ((16, 16), (32, 32), (4, 16, 16), (7,))] == [31, 63, 34, 7]


@pytest.mark.parametrize("grid", [(), (2, 2, 2, 2), (0,), (3, -1)])
def test_a_grid_that_is_none_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="one to three axes"):
        check_grid(grid)
