"""The order in which a NAR model writes a grid: levels, wavefronts, the attention mask, predecessors.

Everything that depends on the order - mask, targets, decoder - takes it from here. Pure functions of the grid; results
are cached and must not be written to.

A grid (n_1, ..., n_D) has N = prod(n) positions in row-major order. A position's level is the sum of its coordinates;
a wavefront is all positions of one level, in row-major order (NAR, arXiv 2503.10696, section 3).

Shape suffixes: D axes, N grid positions, W wavefronts, P prefix positions, L = P + N.
"""

from functools import cache

import torch
from torch import Tensor

from t2i.grid import Grid, check_grid


@cache
def coordinates(grid: Grid) -> Tensor:
    """Coordinates of each position in row-major order: int64 [N, D]."""
    check_grid(grid)
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, len(grid))


@cache
def levels(grid: Grid) -> Tensor:
    """Level (Manhattan distance from the origin) of each position in row-major order: int64 [N]."""
    return coordinates(grid).sum(-1)


@cache
def wavefront_sizes(grid: Grid) -> tuple[int, ...]:
    """Number of positions of each wavefront, W = sum(n) - D + 1 of them."""
    return tuple(torch.bincount(levels(grid)).tolist())


@cache
def order(grid: Grid) -> Tensor:
    """Row-major positions in wavefront order: int64 [N]; position order[i] is written i-th."""
    return torch.argsort(levels(grid), stable=True)


@cache
def rank(grid: Grid) -> Tensor:
    """The inverse of `order`: place in wavefront order of each row-major position, int64 [N]."""
    return torch.argsort(order(grid))


@cache
def predecessors(grid: Grid) -> Tensor:
    """For each position, in wavefront order, the places (also in wavefront order) of its predecessors: int64 [N, D].

    Column a is the predecessor p - e_a, whose head of axis a predicts p; -1 where it lies outside the grid.
    """
    coords_ND = coordinates(grid)[order(grid)]
    strides = torch.tensor(
        [int(torch.tensor(grid[a + 1 :]).prod()) if a + 1 < len(grid) else 1 for a in range(len(grid))]
    )
    row_major_N = coords_ND @ strides
    places_ND = rank(grid)[(row_major_N[:, None] - strides).clamp_min(0)]
    return torch.where(coords_ND > 0, places_ND, -1)


@cache
def attention_mask(grid: Grid, prefix: int) -> Tensor:
    """What may attend to what, prefix first and the grid in wavefront order: bool [L, L], True = attends.

    The prefix is causal within itself; a grid token attends to the whole prefix and to every token of its own level or
    lower. Padding of the prefix is not in here: it differs from sample to sample.
    """
    levels_N = levels(grid)[order(grid)]
    # The prefix has levels of its own, each below the grid's: causal and level-wise then are one rule.
    levels_L = torch.cat([torch.arange(-prefix, 0), levels_N])
    return levels_L[:, None] >= levels_L[None, :]


@cache
def head_weights(grid: Grid) -> Tensor:
    """Weight of the head of each axis in the mean that predicts each position (wavefront order): float32 [N, D].

    The mean is over the predecessors that lie inside the grid; the origin's is over all heads at the last prefix
    position.
    """
    inside_ND = (predecessors(grid) >= 0).float()
    inside_ND[0] = 1
    return inside_ND / inside_ND.sum(-1, keepdim=True)
